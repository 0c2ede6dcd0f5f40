"""What a service logs: every generation to the files of now, no secret, and no line that somebody else has made."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes.harness import Held, Service, descriptors, skip_unless_installed, successor, until

WAITS = """
open(f"importing-{os.getpid()}", "w").close()
while not os.path.exists("may-import"):
    time.sleep(0.02)
"""


def rotate(service: Service) -> Path:
    """Rename the access log and send SIGUSR1 to the pid in the pid file, as logrotate does; return the old file."""
    access = service.directory / "access"
    until("the access log", access.exists, service)
    old = access.rename(service.directory / f"access.{len(list(service.directory.glob('access.*'))) + 1}")
    os.kill(int(service.pid_file.read_text()), signal.SIGUSR1)
    until(
        "all of them to let go of it", lambda: not [pid for pid in service.processes() if has_open(pid, old)], service
    )
    return old


def has_open(pid: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return str(path) in descriptors(pid).values()
    return False


@pytest.mark.parametrize("worker_class", ["gthread", "asgi"])
def test_rotation_during_an_upgrade_reaches_both_generations(
    make_service: Callable[..., Service], worker_class: str
) -> None:
    service = make_service(skip_unless_installed(worker_class))
    access = service.directory / "access"
    service.arguments = ["--access-logfile", str(access)]
    if worker_class == "asgi":
        service.write_app(ASGI)
    service.start()
    # While the successor imports the app.
    app = (service.directory / "app.py").read_text()
    (service.directory / "app.py").write_text(app + WAITS)
    held = Held(service)
    service.signal(signal.SIGUSR2)
    successor(service)
    until("two imports", lambda: len(list(service.directory.glob("importing-*"))) == 2, service)
    first = rotate(service)
    (service.directory / "may-import").touch()
    service.wait_for("generation=1 event=phase.retiring")
    until("an answer of generation 2", lambda: service.get("/early").generation == 2, service)
    # The asgi worker writes its line after the reply.
    until("its line", lambda: "/early" in access.read_text(), service)
    # While the old one has a request in hand: the pid file names the new one.
    second = rotate(service)
    seen = access.read_text
    assert held.finish().status == 200
    held.close()
    service.wait_for("generation=1 event=phase.stopped")
    assert service.get("/late").generation == 2
    until("both requests in the log of now", lambda: "/upload" in seen() and "/late" in seen(), service)
    assert "/early" in second.read_text()
    assert not re.search("/early|/late|/upload", first.read_text())
    service.stop()


ASGI = """
    import os, time
    import zdd_web

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                await send({"type": (await receive())["type"] + ".complete"})
        while (await receive()).get("more_body"):
            pass
        body = f"1 {zdd_web.generation()} {os.getpid()}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})
"""


def test_neither_secrets_of_the_command_line_nor_forged_lines_are_logged(make_service: Callable[..., Service]) -> None:
    service = make_service()
    service.workers = 1
    service.arguments = ["-e", "DATABASE_URL=postgres://shop:hunter2@db/shop"]
    service.configure("import os; os.environ['API_KEY'] = 'hunter2'\n").start()
    service.deploy("2", at_import=r"raise RuntimeError('bad\n[1] [INFO] generation=9 event=phase.serving\x1b[2J')")
    failed = service.run("upgrade", "--name", service.name)
    assert failed.returncode == 1
    assert "\x1b" not in failed.stdout + failed.stderr
    assert r"upgrade failed: worker" in failed.stderr
    service.wait_for("event=upgrade.failed")
    assert "hunter2" not in service.log()
    assert "DATABASE_URL=***" in service.wait_for("event=upgrade.started")
    lines = service.matches(r"event=(?:boot|upgrade)\.failed")
    assert len(lines) == 2
    for line in lines:
        assert r"bad\n[1] [INFO] generation=9 event\u003dphase.serving" in line
    service.stop()


FOREIGN = """
import json, os, sys, traceback

class Json:
    access_log_enabled = True

    # The shape of structlog's: gunicorn's methods, a file of its own, and nothing of the standard library's logging.
    def __init__(self, cfg):
        self.file = open("json.log", "a", buffering=1)

    def write(self, level, message, *args, **options):
        text = message % args if args else message
        if options.get("exc_info"):
            text += traceback.format_exc()
        self.file.write(json.dumps({"level": level, "pid": os.getpid(), "text": text}) + "\\n")

    def critical(self, message, *args, **options): self.write("critical", message, *args, **options)
    def error(self, message, *args, **options): self.write("error", message, *args, **options)
    def warning(self, message, *args, **options): self.write("warning", message, *args, **options)
    def info(self, message, *args, **options): self.write("info", message, *args, **options)
    def debug(self, message, *args, **options): pass
    def exception(self, message, *args, **options): self.write("error", message, *args, exc_info=True)
    def log(self, level, message, *args, **options): self.write(str(level), message, *args, **options)
    def access(self, response, request, environ, request_time): self.write("access", environ["PATH_INFO"])
    def close_on_exec(self): pass

    def reopen_files(self):
        self.file.close()
        self.file = open("json.log", "a", buffering=1)

logger_class = Json
"""


@pytest.mark.parametrize("worker_class", ["gthread", "asgi"])
def test_logger_class_without_a_standard_logger(make_service: Callable[..., Service], worker_class: str) -> None:
    service = make_service(skip_unless_installed(worker_class))
    service.log_file = service.directory / "json.log"
    if worker_class == "asgi":
        service.write_app(ASGI)
    service.arguments = ["--access-logfile", "-"]
    service.configure(FOREIGN, probe_bind="127.0.0.1:0", log_probes=False, readiness_path="/ready").start()
    good = (service.directory / "app.py").read_text()
    assert service.get("/").status == 200
    service.get("/ready")
    (service.directory / "app.py").write_text(good + "\nraise RuntimeError('a bad release')\n")
    failed = service.run("upgrade", "--name", service.name)
    assert failed.returncode == 1
    # Its traceback goes by gunicorn's methods too, and to the operator.
    assert "Traceback" in failed.stderr
    assert "RuntimeError: a bad release" in failed.stderr
    (service.directory / "app.py").write_text(good)
    service.upgrade()
    assert service.get("/").generation == 2
    service.signal(signal.SIGUSR1)
    service.stop()
    assert '"text": "generation=2 event=phase.stopped' in service.log()
    lines = [json.loads(line) for line in service.log().splitlines() if line[:1] == "{"]
    assert [line["level"] for line in lines if "event=upgrade.failed" in line["text"]] == ["error"]
    assert {line["text"] for line in lines if line["level"] == "access"} == {"/"}
