"""Attacks on what probes, checks, metrics and the probe port promise: by the app, by clients, by signals, by limits."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import resource
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gunicorn
import pytest

from tests.processes.harness import PATIENCE, Service, serving_workers, settled, until
from tests.processes.test_metrics import counters, scrape
from tests.processes.test_probe_port import ask, listening_on, port_of, prober, process_of, refuses, says, statuses
from tests.processes.trial import HeldBy

#: For the two that are known to fail: long enough for what works, seconds.
SHORT = 2.0

LIVE, READY = "/livez", "/readyz"

Make = Callable[..., Service]

WSGI = """
    import asyncio, os, sys, threading, time
    import zdd_web
    from zdd_web.wsgi import ProbeMiddleware

    def bad(name="bad"):
        return os.path.exists(name)

{checks}

    def app(environ, start_response):
        body = f"1 {{zdd_web.generation()}} {{os.getpid()}}".encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    app = ProbeMiddleware(app)
"""

ASGI = """
    import asyncio, os, sys, threading, time
    import zdd_web
    from zdd_web.asgi import ProbeMiddleware

    def bad(name="bad"):
        return os.path.exists(name)

{checks}

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                await send({{"type": (await receive())["type"] + ".complete"}})
        if scope["path"] == "/thread":
            await asyncio.to_thread(int)
        await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}})
        await send({{"type": "http.response.body", "body": b"ok"}})

    app = ProbeMiddleware(app)
"""

needs_asgi = pytest.mark.skipif(gunicorn.version_info < (25,), reason="gunicorn has an asgi worker since 25")
needs_gevent = pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed")
needs_django = pytest.mark.skipif(importlib.util.find_spec("django") is None, reason="django is not installed")


def with_checks(service: Service, checks: str, app: str = WSGI) -> Service:
    body = textwrap.indent(textwrap.dedent(checks), "    ")
    service.write_app(app.format(checks=body))
    return service.configure(probe_bind="127.0.0.1:0", details="always")


def finding(port: int, name: str) -> dict[str, Any]:
    said = json.loads(body_of(port, f"{READY}?verbose", Accept="application/json"))
    return next((each for each in said["findings"] if each["name"] == name), {})


def body_of(port: int, path: str, **headers: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def becomes(port: int, status: int, service: Service, path: str = READY, patience: float = PATIENCE) -> None:
    until(f"{path} {status}", lambda: ask(port, path).status == status, service, patience)


# -- checks that do what they should not


def test_a_check_whose_error_cannot_be_said_is_run_again(make_service: Make):
    service = with_checks(
        make_service(workers=1),
        """
        class Unspeakable(Exception):
            def __str__(self):
                raise ValueError("no words")

        @zdd_web.check("database", interval=0.05, timeout=0.3)
        def database():
            if bad():
                raise Unspeakable
        """,
    ).start()
    port = port_of(service)
    (service.directory / "bad").touch()
    becomes(port, 503, service)
    (service.directory / "bad").unlink()
    becomes(port, 200, service)


def test_checks_go_on_where_no_thread_could_be_started_for_a_moment(make_service: Make):
    service = with_checks(
        make_service(workers=1),
        """
        zdd_web.check("database", interval=0.05, timeout=0.3)(lambda: not bad("down"))
        real = threading.Thread.start

        def start(self):
            if bad() and self.name.startswith("zdd_web-check-"):
                open("refused", "w").close()
                raise RuntimeError("can't start new thread")
            real(self)

        threading.Thread.start = start
        """,
    ).start()
    port = port_of(service)
    (service.directory / "bad").touch()
    until("a thread that was refused", (service.directory / "refused").exists, service)
    (service.directory / "bad").unlink()
    (service.directory / "down").touch()
    becomes(port, 503, service)


def test_a_check_that_hangs_does_not_fail_another(make_service: Make):
    service = with_checks(
        make_service(workers=1),
        """
        @zdd_web.check("aside", interval=0.05, timeout=3, critical=False)
        async def aside():
            while bad():
                await asyncio.sleep(0.01)

        @zdd_web.check("database", interval=0.05, timeout=0.3)
        async def database():
            pass
        """,
    ).start()
    (service.directory / "bad").touch()
    assert "check=aside" in service.wait_for(r"event=check\.failed")
    assert ask(port_of(service), READY).status == 200


@pytest.mark.xfail(strict=True, reason="cancelled, it is started again, and takes all threads of the loop's executor")
@needs_asgi
def test_an_async_check_that_hangs_in_a_thread_takes_one_thread(make_service: Make):
    service = with_checks(
        make_service("asgi", workers=1),
        """
        def block(asked=[]):
            asked.append(None)
            open(f"asked-{len(asked)}", "w").close()
            while bad():
                time.sleep(0.01)

        @zdd_web.check("database", interval=0.05, timeout=0.1)
        async def database():
            await asyncio.to_thread(block)

        @zdd_web.check("pulse", interval=0.05)
        def pulse():
            open("pulse", "a").write("x")
        """,
        ASGI,
    ).start()
    (service.directory / "bad").touch()
    service.wait_for(r"event=check\.failed check=database")
    pulse = service.directory / "pulse"
    intervals = len(pulse.read_text()) + 30
    until("thirty intervals", lambda: len(pulse.read_text()) >= intervals, service)
    try:
        # The pool is the app's too.
        assert service.get("/thread", timeout=SHORT).status == 200
    finally:
        (service.directory / "bad").unlink()


@pytest.mark.parametrize(
    "worker_class",
    [
        "asgi",
        "uvicorn_worker.UvicornWorker",
    ],
)
def test_an_async_check_that_exits_costs_no_worker(make_service: Make, worker_class: str):
    if worker_class == "asgi" and gunicorn.version_info < (25,):
        pytest.skip("gunicorn has an asgi worker since 25")
    if worker_class.startswith("uvicorn") and importlib.util.find_spec("uvicorn_worker") is None:
        pytest.skip("uvicorn_worker is not installed")
    service = with_checks(
        make_service(worker_class, workers=1),
        """
        @zdd_web.check("database", interval=0.05, timeout=0.3)
        async def database():
            if bad():
                raise SystemExit("no database")
        """,
        ASGI,
    ).start()
    before = settled(service, service.workers)
    port = port_of(service)
    (service.directory / "bad").touch()
    becomes(port, 503, service)
    (service.directory / "bad").unlink()
    becomes(port, 200, service)
    assert sorted(serving_workers(service)) == sorted(before)


def test_a_check_that_returns_something_to_await_is_awaited(make_service: Make):
    service = with_checks(
        make_service(workers=1),
        """
        class Later:
            def __await__(self):
                if bad():
                    raise ConnectionError("refused")
                return iter(())

        zdd_web.check("database", interval=0.05, timeout=0.3)(Later)
        """,
    ).start()
    (service.directory / "bad").touch()
    becomes(port_of(service), 503, service)


def test_a_check_of_any_name_that_is_taken_can_be_asked_for(make_service: Make):
    name = "überprüfung_der_täglichen_währungsumrechnung_äöü"
    service = with_checks(make_service(workers=1), f"zdd_web.check('{name}', interval=0.05)(lambda: None)")
    process = service.spawn()
    until("an end", lambda: process.poll() is not None or service.matches(r"event=phase\.serving"), service)
    if process.poll() is None:
        assert ask(port_of(service), f"{READY}/{quote(name)}").status == 200
    else:
        assert service.matches(f"check '{name}': a name must be")


def test_a_check_called_phase_is_no_phase(make_service: Make):
    service = with_checks(make_service(workers=1), "zdd_web.check('phase', interval=0.05)(lambda: not bad())")
    service.configure(details="never").start()
    (service.directory / "bad").touch()
    becomes(port_of(service), 503, service)
    assert body_of(port_of(service), READY) == "failed\n"


def test_a_check_that_is_registered_by_a_request_is_run_or_refused_aloud(make_service: Make):
    service = with_checks(
        make_service(workers=1),
        """
        def late():
            zdd_web.check("late", interval=0.05, timeout=0.3)(lambda: False)
        """,
    )
    text = (service.directory / "app.py").read_text().replace("    body =", "    late()\n    body =")
    service.write_app(text)
    service.start()
    port = port_of(service)
    service.get()
    until("a word", lambda: ask(port, READY).status == 503 or service.matches("late"), service, PATIENCE)


def test_a_message_of_many_lines_is_one_line(make_service: Make):
    service = with_checks(
        make_service(workers=1),
        """
        @zdd_web.check("database", interval=0.05, timeout=0.3)
        def database():
            if bad():
                raise RuntimeError("down" + chr(10) + "[+]forged ok" + chr(10) + "readyz passed")
        """,
    ).start()
    port = port_of(service)
    (service.directory / "bad").touch()
    becomes(port, 503, service)
    assert "\n[+]forged" not in body_of(port, f"{READY}?verbose")


NASTY = """
    import ctypes, subprocess

    def kinds():
        yield lambda: sys.exit(3)
        yield lambda: (_ for _ in ()).throw(KeyboardInterrupt())
        yield lambda: (_ for _ in ()).throw(GeneratorExit())
        yield lambda: (_ for _ in ()).throw(RuntimeError("x" * 10_000))
        yield lambda: (_ for _ in ()).throw(RuntimeError(os.fsdecode(b"caf\\xe9 \\xff") + chr(0)))
        yield lambda: (_ for _ in ()).throw(RuntimeError("\\u20ac" * 300))
        yield lambda: time.sleep(600)
        yield lambda: subprocess.run([sys.executable, "-c", "raise SystemExit(1)"], check=True)
        yield lambda: os.waitpid(os.fork() or os._exit(0), 0) and False
        yield lambda: zdd_web.check("registered_late")(print)

    def nasty(index, function):
        def run():
            return function() if bad() else None
        run.__qualname__ = f"nasty{index}"
        zdd_web.check(f"nasty{index}", interval=0.05, timeout=0.4)(run)

    for index, function in enumerate(kinds()):
        nasty(index, function)

    @zdd_web.check("sound", interval=0.05)
    def sound():
        pass
"""


def test_nasty_checks_cost_nobody_else_anything_and_say_nothing_in_public(make_service: Make):
    service = with_checks(make_service(), NASTY)
    service.configure(details="never").start()
    port, workers = port_of(service), settled(service, 2)
    with service.under_load(4), prober(port, LIVE):
        (service.directory / "bad").touch()
        for index in range(9):
            service.wait_for(rf"event=check\.failed check=nasty{index} ", 2)
        for each in (port, service.port):
            for path in (READY, f"{READY}?verbose", "/healthz/nasty3", "/readyz/nasty4?verbose"):
                said = body_of(each, path, Accept="application/json;q=0.5, */*;q=0.1") + body_of(each, path)
                assert not re.search(r"nasty|xxx|caf|File|Error|/", said.replace("application/", "")), said
        assert ask(port, READY).status == 503
        assert ask(port, "/readyz/sound").status == 200
    assert settled(service, 2) == workers
    service.stop(None)


def test_threads_of_checks_that_hang_do_not_pile_up_over_many_workers(make_service: Make):
    service = with_checks(
        make_service("sync", workers=4),
        """
        for index in range(32):
            def hang(index=index):
                while bad():
                    time.sleep(0.05)
            hang.__qualname__ = f"hang{index}"
            zdd_web.check(f"hang{index}", interval=0.2, timeout=0.4)(hang)
        """,
    ).start()
    port = port_of(service)
    with prober(port, LIVE, 0.05):
        (service.directory / "bad").touch()
        becomes(port, 503, service, patience=PATIENCE)
        service.wait_for(r"event=check\.failed check=hang", 4 * 32)
        for pid in settled(service, 4):
            assert len(os.listdir(f"/proc/{pid}/task")) <= 32 + 2
        assert len(json.loads(body_of(port, f"{READY}?verbose", Accept="application/json"))["findings"]) == 35
        (service.directory / "bad").unlink()
        becomes(port, 200, service, patience=PATIENCE)
    service.stop()


# -- the app and the configuration


@needs_gevent
def test_probe_port_answers_where_the_configuration_has_gevent_patch_everything(make_service: Make):
    service = make_service("gevent", workers=1)
    service.configure("from gevent import monkey\nmonkey.patch_all()\n", probe_bind="127.0.0.1:0").start()
    port = port_of(service)
    assert [ask(port, path, PATIENCE).status for path in (LIVE, READY)] == [200, 200]
    with prober(port):
        service.upgrade()
        service.until_one_generation()
    os.kill(process_of(service), signal.SIGKILL)
    service.wait_for(r"event=probes\.restarted")
    assert [ask(port, path, PATIENCE).status for path in (LIVE, READY)] == [200, 200]
    service.stop()
    assert refuses(port)


IMPORTING = """
import importlib.machinery, os, sys, threading, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name != "h11._readers" or threading.current_thread().name != "importer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        real = spec.loader.exec_module

        def execute(module):
            started.set()
            while not os.path.exists("go"):
                time.sleep(0.01)
            real(module)

        spec.loader.exec_module = execute
        return spec

started = threading.Event()
sys.meta_path.insert(0, Slow())
threading.Thread(target=lambda: __import__("h11"), name="importer", daemon=True).start()
started.wait(10)
"""


def test_probe_port_answers_where_a_thread_of_a_preloaded_app_imports(make_service: Make):
    service = make_service(workers=1).configure(probe_bind="127.0.0.1:0")
    service.arguments = ["--preload"]
    service.start()
    port = port_of(service)
    app = (service.directory / "app.py").read_text()
    (service.directory / "app.py").write_text(IMPORTING + app)
    service.signal(signal.SIGUSR2)
    service.wait_for(r"event=upgrade\.committed")
    (service.directory / "go").touch()
    until("an answer", lambda: answers(port), service, PATIENCE)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return ask(port, LIVE, 1.0).status == 200
    return False


def test_process_that_hangs_before_it_serves_ends_with_its_master(make_service: Make):
    service = (
        make_service(workers=1)
        .configure(
            "import zdd_web.gunicorn.master.probe_process as module, time\n"
            "module._let_go_of_all_but = lambda keep: time.sleep(600)\n",
            probe_bind="127.0.0.1:0",
        )
        .start()
    )
    port = port_of(service)
    os.kill(service.pid, signal.SIGKILL)
    until("a closed port", lambda: refuses(port), service, PATIENCE)


GONE = """
import os, sys

class Gone:
    def find_spec(self, name, path=None, target=None):
        if os.path.exists("gone") and name.partition(".")[0] in ("h11", "asyncio", "zdd_web", "prometheus_client"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Gone())
"""


@pytest.mark.xfail(strict=True, reason="asyncio and h11 are imported by each process anew")
def test_process_is_forked_again_where_the_virtualenv_is_gone(make_service: Make):
    service = make_service(workers=1).configure(GONE, probe_bind="127.0.0.1:0").start()
    port = port_of(service)
    assert ask(port, LIVE).status == 200
    (service.directory / "gone").touch()
    os.kill(process_of(service), signal.SIGKILL)
    until("an answer", lambda: answers(port), service, SHORT)


def test_unix_socket_and_probe_port_of_version_6(make_service: Make):
    service = make_service(workers=1)
    service.bind = f"unix:{service.directory}/app.sock"
    service.configure(probe_bind="[::1]:0", drain_delay=20).spawn()
    service.wait_for(r"event=phase\.serving")
    line = service.wait_for(r"event=probes\.listening address=.*\[::1\]:")
    found = re.search(r"\[::1\]:(\d+)", line)
    assert found

    def status(path: str) -> int:
        connection = http.client.HTTPConnection("::1", int(found[1]), timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    assert [status(path) for path in (LIVE, READY, "/metrics")] == [200, 200, 200]
    service.signal(signal.SIGUSR2)
    service.wait_for(r"event=upgrade\.committed")
    assert [status(path) for path in (LIVE, READY, "/metrics")] == [200, 200, 200]
    service.signal(signal.SIGTERM)
    service.wait_for(r"event=phase\.lame_duck")
    assert [status(path) for path in (LIVE, READY)] == [200, 503]
    service.signal(signal.SIGTERM)
    service.ends()


def test_log_on_a_full_disk_costs_no_probe(make_service: Make):
    service = with_checks(make_service(workers=1), "zdd_web.check('database', interval=0.05)(lambda: not bad())")
    service.start()
    address = port_of(service)
    service.stop()
    service.arguments = ["--error-logfile", "/dev/full"]
    service.configure(probe_bind=f"127.0.0.1:{address}").spawn()
    until("readiness", lambda: not refuses(address) and ask(address, READY).status == 200, service)
    with prober(address, LIVE):
        for _ in range(2):
            (service.directory / "bad").touch()
            becomes(address, 503, service)
            (service.directory / "bad").unlink()
            becomes(address, 200, service)
    # What it has in hand it cannot answer any more; nobody is asked meanwhile.
    before = process_of(service)
    os.kill(before, signal.SIGKILL)
    until("another", lambda: process_of(service) != before, service)
    becomes(address, 200, service)
    service.stop()


# -- what probes say of the service


def test_readiness_falls_where_the_service_is_ended_now(make_service: Make):
    service = (
        make_service(workers=1)
        .configure(
            "import os, time\n"
            "def on_exit(server):\n"
            "    open('exiting', 'w').close()\n"
            "    while not os.path.exists('go'): time.sleep(0.01)\n",
            probe_bind="127.0.0.1:0",
        )
        .start()
    )
    port = port_of(service)
    service.signal(signal.SIGQUIT)
    until("on_exit", (service.directory / "exiting").exists, service)
    assert not service.is_open()
    status = ask(port, READY).status
    (service.directory / "go").touch()
    service.ends(None)
    assert status == 503


def test_readiness_falls_at_once_where_the_service_is_ended_now_and_a_worker_stands_still(make_service: Make):
    service = make_service(workers=1).configure(probe_bind="127.0.0.1:0").start()
    port, master = port_of(service), service.pid
    os.kill(settled(service, 1)[0], signal.SIGSTOP)
    os.kill(master, signal.SIGQUIT)
    service.wait_for("Handling signal: quit")
    until("the listener's end", lambda: not listens(master, service.port), service)
    assert ask(port, READY).status == 503


def listens(pid: int, port: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(listening_on(pid, port))
    return False


def test_readiness_falls_where_a_daemon_has_no_workers_any_more(make_service: Make):
    service = make_service(workers=1).configure(probe_bind="127.0.0.1:0")
    service.arguments = ["--daemon", "--error-logfile", str(service.log_file), "--chdir", str(service.directory)]
    service.spawn()
    service.wait_for(r"event=phase\.serving")
    port = port_of(service)
    assert statuses(port) == (200, 200, 200)
    service.signal(signal.SIGWINCH)
    until("the workers' end", lambda: not service.snapshot().workers, service)
    assert ask(port, READY).status == 503


def test_workers_that_all_stand_still_without_a_timeout_keep_liveness(make_service: Make):
    service = with_checks(make_service(), "zdd_web.check('database', interval=0.05, timeout=0.3)(lambda: None)")
    service.arguments = ["--timeout", "0"]
    service.start()
    port = port_of(service)
    for pid in settled(service, 2):
        os.kill(pid, signal.SIGSTOP)
    # What they say gets old; they may be debugged, and a restart is not asked for.
    becomes(port, 503, service, patience=PATIENCE)
    assert ask(port, LIVE).status == 200
    for pid in service.snapshot().workers:
        os.kill(pid.pid, signal.SIGCONT)
    becomes(port, 200, service)
    service.stop()


# -- counters


class Scraper:
    """Scrapes one after the other, and notes which counters went backwards."""

    def __init__(self, service: Service) -> None:
        self.service, self.backwards = service, []  # type: ignore[var-annotated]
        self.last: dict[str, float] = {}
        self.generations: set[float] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                found = scrape(self.service)
            except (OSError, http.client.HTTPException):
                continue  # its process was killed by the test
            now = counters(found)
            self.generations.add(found["generation"])
            self.backwards += [
                (found["generation"], each, last, now[each]) for each, last in self.last.items() if now[each] < last
            ]
            self.last = now

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE)


def test_counters_never_go_backwards_in_upgrades_and_reloads_under_load(make_service: Make):
    service = make_service().configure(probe_bind="127.0.0.1:0")
    service.arguments = ["--max-requests", "100"]
    service.start()
    with service.under_load(8), Scraper(service) as scraper:
        for number in (2, 3):
            service.upgrade()
            until("scrapes of it", lambda number=number: number in scraper.generations, service)
        os.kill(process_of(service), signal.SIGKILL)
        service.signal(signal.SIGHUP)
        service.wait_for(r"event=reload\.done")
        service.wait_for(r"event=probes\.restarted")
        os.kill(serving_workers(service)[0], 0)
    assert scraper.backwards == []


def test_counters_do_not_go_backwards_when_a_successor_is_lost(make_service: Make):
    service = make_service().configure(probe_bind="127.0.0.1:0").start()
    port = port_of(service)
    held = HeldBy(service, 1)
    service.upgrade()
    for _ in range(50):
        assert service.get().generation == 2
    before = until("50 requests", lambda: of(service, "requests_total", 50), service)
    os.kill(service.pid, signal.SIGKILL)
    service.wait_for(r"event=successor\.lost")
    becomes(port, 200, service, patience=PATIENCE)
    after = scrape(service)["requests_total"]
    assert held.release() == 1
    assert after >= before


def of(service: Service, name: str, least: float) -> float | None:
    value = scrape(service)[name]
    return value if value >= least else None


# -- its process


def test_descriptors_that_are_used_up_leave_no_processes_behind(make_service: Make):
    service = make_service(workers=1).configure(probe_bind="127.0.0.1:0").start()
    port, master = port_of(service), service.pid
    limits = resource.prlimit(master, resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir(f"/proc/{master}/fd")))
    none_free = next(fd for fd in range(1024) if fd not in used)
    resource.prlimit(master, resource.RLIMIT_NOFILE, (none_free, limits[1]))
    os.kill(process_of(service), signal.SIGKILL)
    service.wait_for(r"internal\.error|probes\.restarted")
    until("some tries", lambda: len(service.matches(r"internal\.error")) >= 3, service, PATIENCE)
    resource.prlimit(master, resource.RLIMIT_NOFILE, limits)
    until("an answer", lambda: answers(port), service)
    until("one process", lambda: len(service.processes()) == 2 + service.workers, service, PATIENCE)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_process_is_hit_at_every_moment_of_upgrades_and_reloads(make_service: Make, sig: signal.Signals):
    service = make_service(workers=1).configure(probe_bind="127.0.0.1:0").start()
    port = port_of(service)
    over = threading.Event()

    def hit() -> None:
        while not over.wait(0.05):
            for each in service.generations():
                pid = each.board.header.probe_pid
                if pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, sig)
                        if sig == signal.SIGSTOP:
                            over.wait(0.02)
                            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=hit, daemon=True)
    with service.under_load(4):
        thread.start()
        try:
            for _ in range(2):
                service.upgrade()
            service.signal(signal.SIGHUP)
            service.wait_for(r"event=reload\.done")
        finally:
            over.set()
            thread.join()
    service.until_one_generation()
    until("answers", lambda: answers(port) and statuses(port) == (200, 200, 200), service)
    until("one process", lambda: len(service.processes()) == 2 + service.workers, service)
    service.stop()
    assert refuses(port)


def test_storm_of_signals_costs_no_probe(make_service: Make):
    service = make_service().configure(probe_bind="127.0.0.1:0", keep_pid=True).start()
    port = port_of(service)
    with prober(port), prober(port, LIVE), service.under_load(2):
        # Of signals that arrive together Python handles the lowest first: a SIGHUP would have the upgrade refused.
        service.signal(signal.SIGUSR2)
        service.wait_for(r"event=upgrade\.started")
        for sig in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTTIN, signal.SIGUSR2, signal.SIGTTOU,
                    signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):  # fmt: skip
            service.signal(sig)
        service.wait_for(r"event=upgrade\.committed")
        service.until_one_generation()
        settled(service, 2)
    assert len(process_lines(service)) == 1
    service.stop()
    assert refuses(port)


def process_lines(service: Service) -> list[int]:
    """The pids of the processes of the probe port that are left."""
    return [pid for pid in service.processes() if b"probes" in Path(f"/proc/{pid}/cmdline").read_bytes()] or [0]


# -- clients


def test_strange_clients_are_answered_or_refused_and_cost_nothing(make_service: Make):
    service = make_service(workers=1).configure(probe_bind="127.0.0.1:0").start()
    port, pid = port_of(service), process_of(service)
    close = b"Connection: close\r\n\r\n"
    for request, status in (
        (b"GET /readyz?" + b"exclude=%00%ff&" * 700 + b" HTTP/1.1\r\n" + close, b" 200 "),
        (b"GET /%72eadyz HTTP/1.1\r\n" + close, b" 200 "),
        (b"GET /readyz/%ff%00 HTTP/1.1\r\n" + close, b" 404 "),
        (b"GET http://[::1]:99/livez?x=://y HTTP/1.1\r\n" + close, b" 200 "),
        (b"GET //livez HTTP/1.1\r\n" + close, b" 404 "),
        (b"OPTIONS * HTTP/1.1\r\n" + close, b" 404 "),
        (b"CONNECT a:1 HTTP/1.1\r\n" + close, b" 404 "),
        (b"PUT /readyz HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", b" 405 "),
        (b"POST /readyz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b" 405 "),
        (b"GET /livez HTTP/1.1\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nConnection: Upgrade, close\r\n\r\n", b" 200 "),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b" 4"),
        (b"GET /livez\r\n\r\n", b" 4"),
        (b"\r\n\r\nGET /livez HTTP/1.1\r\n" + close, b" 4"),
        (b"GET /livez HTTP/1.1\r\n folded\r\n" + close, b" "),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + close, b" 4"),
        (b"GET /livez HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b" 4"),
    ):  # fmt: skip
        assert status in says(port, request)[:20], request
    # Pipelined, in pieces, with the other half closed.
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        for piece in re.findall(rb".{1,7}", b"GET /livez HTTP/1.1\r\n\r\n" * 30 + b"HEAD /x HTTP/1.0\r\n\r\n", re.S):
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        received = b""
        while data := sock.recv(65536):
            received += data
    assert received.count(b" 200 OK\r\n") == 30
    assert received.count(b" 404 ") == 1
    assert process_of(service) == pid
    assert not service.matches(r"event=internal\.error")


def test_liveness_is_fast_beside_clients_that_pipeline_scrapes_and_many_that_are_silent(make_service: Make):
    service = make_service(workers=1).configure(probe_bind="127.0.0.1:0").start()
    port = port_of(service)
    ask(port, "/metrics")  # the first one imports prometheus_client
    scrapes = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 400
    took = []
    with contextlib.ExitStack() as stack:
        for _ in range(700):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
        # Together they ask for ten seconds' worth of metrics, rendered one after the other.
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)).sendall(scrapes)
        for _ in range(20):
            began = time.monotonic()
            assert ask(port, LIVE).status == 200
            took.append(time.monotonic() - began)
    assert max(took) < 1, took
    assert not service.matches(r"event=internal\.error")


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=x.y.z",
        "application/openmetrics-text; version=1.0.0; escaping=?,\xff",
        "application/openmetrics-text; version=1; escaping=values,;;=",
        "text/plain; version=",
        "text/plain; version",
    ],
)
def test_a_scrape_that_accepts_anything_is_answered(make_service: Make, accept: str):
    service = make_service(workers=1).configure(probe_bind="127.0.0.1:0").start()
    request = f"GET /metrics HTTP/1.1\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
    assert b" 200 " in says(port_of(service), request.encode("latin-1"))[:20]
    assert not service.matches(r"event=internal\.error")


def test_a_thousand_connections_during_an_upgrade_cost_no_probe(make_service: Make):
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    service = make_service(workers=1).configure(probe_bind="127.0.0.1:0").start()
    port = port_of(service)
    with contextlib.ExitStack() as clients, service.under_load(2):
        for count in range(1000):
            sock = clients.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            with contextlib.suppress(OSError):
                sock.sendall(b"GET /readyz HTT")
            if count == 500:
                service.signal(signal.SIGUSR2)
            if count % 10 == 0:
                assert ask(port, READY).status == 200
        while not service.matches(r"event=upgrade\.committed"):
            assert statuses(port) == (200, 200, 200)
        service.until_one_generation()
        assert statuses(port) == (200, 200, 200)
    service.stop()
    assert refuses(port)


# -- Django


DJANGO = """
    import os, sys
    from django.conf import settings
    settings.configure(
        DEBUG=True, SECRET_KEY="only-for-the-test", ALLOWED_HOSTS=["shop.example"], ROOT_URLCONF=__name__,
        INSTALLED_APPS=["zdd_web"], MIDDLEWARE=["zdd_web.django.middleware.ProbeMiddleware"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3", "ATOMIC_REQUESTS": True}},
    )
    urlpatterns = []
    import zdd_web
    from asgiref.sync import sync_to_async
    from django.db import connections

    def ask():
        connection = connections["default"]
        if connection.connection is not None:
            open("kept", "w").close()
        connection.ensure_connection()
        open("asked", "a").write("x")
        if os.path.exists("bad"):
            raise RuntimeError("secret of " + __file__)

    @zdd_web.check("plain", interval=0.05)
    def plain():
        ask()

    @zdd_web.check("aside", interval=0.05)
    async def aside():
        await sync_to_async(ask)()

    from django.core.{kind} import get_{kind}_application
    app = get_{kind}_application()
"""


@needs_django
@pytest.mark.parametrize("worker_class", ["gthread", "asgi"])
def test_connections_of_django_in_async_checks_are_closed_after_each_run(make_service: Make, worker_class: str):
    if worker_class == "asgi" and gunicorn.version_info < (25,):
        pytest.skip("gunicorn has an asgi worker since 25")
    service = make_service(worker_class, workers=1)
    service.write_app(DJANGO.replace("{kind}", "asgi" if worker_class == "asgi" else "wsgi"))
    service.configure(probe_bind="127.0.0.1:0").start()
    asked = service.directory / "asked"
    until("some runs", lambda: len(asked.read_text()) > 10, service)
    assert not (service.directory / "kept").exists()


@needs_django
@pytest.mark.parametrize("worker_class", ["gthread", "asgi"])
def test_debug_pages_of_django_show_nothing_of_a_check(make_service: Make, worker_class: str):
    if worker_class == "asgi" and gunicorn.version_info < (25,):
        pytest.skip("gunicorn has an asgi worker since 25")
    service = make_service(worker_class, workers=1)
    service.write_app(DJANGO.replace("{kind}", "asgi" if worker_class == "asgi" else "wsgi"))
    service.configure(probe_bind="127.0.0.1:0").start()
    (service.directory / "bad").touch()
    # Each fails at a run of its own.
    service.wait_for("event=check.failed check=plain")
    service.wait_for("event=check.failed check=aside")
    becomes(service.port, 503, service)
    for path in (READY, "/readyz/plain", "/readyz/", "/readyz?verbose&exclude=nothing", "/readyz/plain/?verbose"):
        assert body_of(service.port, path) == "failed\n"
    with socket.create_connection(("127.0.0.1", service.port), PATIENCE) as sock:
        sock.sendall(b"POST /readyz HTTP/1.1\r\nHost: <x>\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        assert b"Traceback" not in sock.recv(65536)
    service.stop()
