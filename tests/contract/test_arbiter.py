"""gunicorn.arbiter: its start, its loop and its workers; its end is in test_arbiter_end.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from gunicorn.errors import AppImportError, HaltServer

from tests.contract.stock import App, Arbiter, Calls, Os, a_worker, an_arbiter, exits, module


@pytest.fixture(autouse=True)
def no_upgrade_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GUNICORN_PID", "GUNICORN_FD", "LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)


# -- its start


def test_first_hook_comes_before_pid_file_and_process_name() -> None:
    seen: list[tuple[bool, bool]] = []

    def nworkers_changed(server: Any, new: int, old: int | None) -> None:
        seen.append((hasattr(server, "pidfile"), hasattr(server, "proc_name")))

    an_arbiter(nworkers_changed=nworkers_changed)
    assert seen[0] == (False, False)


def test_pid_file_comes_before_on_starting(tmp_path: Any) -> None:
    path = tmp_path / "pid"

    def on_starting(server: Any) -> None:
        assert path.read_text() == f"{os.getpid()}\n"
        raise RuntimeError("on_starting")

    with pytest.raises(RuntimeError, match="on_starting"):
        an_arbiter(pidfile=str(path), on_starting=on_starting).start()
    # ... and is left behind.
    assert path.exists()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of a start in which no socket is made and no signal handled."""
    calls = Calls()
    monkeypatch.setattr(Arbiter, "init_signals", calls.noting("init_signals"))
    monkeypatch.setattr(module.sock, "create_sockets", calls.noting("create_sockets", lambda *arguments: []))
    monkeypatch.setattr(module.systemd, "sd_notify", calls.noting("sd_notify"))
    return calls


def test_on_starting_comes_before_signals_and_listeners(start: Calls) -> None:
    arbiter = an_arbiter()
    arbiter.cfg.set("on_starting", lambda server: start.append("on_starting"))
    arbiter.start()
    assert start[:3] == ["on_starting", "init_signals", "create_sockets"]


def test_listeners_that_are_there_are_left_alone(start: Calls) -> None:
    arbiter = an_arbiter()
    arbiter.LISTENERS = ["a listener"]
    arbiter.start()
    assert "create_sockets" not in start


def test_successor_reads_numbers_from_gunicorn_fd(start: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUNICORN_PID", "1")
    monkeypatch.setenv("GUNICORN_FD", "zdd_web")
    with pytest.raises(ValueError, match="zdd_web"):
        an_arbiter().start()
    assert "create_sockets" not in start


def test_successor_adopts_the_descriptors_of_gunicorn_fd(start: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUNICORN_PID", "4711")
    monkeypatch.setenv("GUNICORN_FD", "5,6")
    given: list[Any] = []
    monkeypatch.setattr(module.sock, "create_sockets", lambda cfg, log, fds=None: given.extend(fds) or [])
    arbiter = an_arbiter()
    arbiter.start()
    assert (given, arbiter.master_pid) == ([5, 6], 4711)
    assert "GUNICORN_FD" not in os.environ


def test_ready_is_sent_before_there_is_a_worker(start: Calls) -> None:
    arbiter = an_arbiter()
    arbiter.start()
    assert "sd_notify" in start
    assert arbiter.WORKERS == {}


def test_values_that_are_written_are_attributes_of_an_arbiter() -> None:
    from zdd_web.gunicorn.adapter.patches import PATCHES

    arbiter = an_arbiter()
    rows = [row for row in PATCHES if row.owner == "gunicorn.arbiter.Arbiter" and not row.takes]
    assert len(rows) >= 9
    assert [row.name for row in rows if not hasattr(arbiter, row.name)] == []
    assert [name for name in ("WORKERS", "num_workers", "worker_age", "SIGNALS") if not hasattr(arbiter, name)] == []


# -- its loop


def looping(calls: Calls, signals: list[int], **methods: Any) -> Any:
    """Make an arbiter whose loop takes one turn with these signals; instance methods are all that it calls."""
    arbiter = an_arbiter()
    turns = iter([calls.noting("manage_workers"), calls.noting("manage_workers", StopIteration())])
    # 24 waits in wait_for_signals(); 23 pops from its queue, and sleeps when there is none.
    arbiter.wait_for_signals = lambda timeout=1.0: calls.append("wait") or list(signals)
    arbiter.sleep = lambda: calls.append("wait")
    if isinstance(getattr(arbiter, "SIG_QUEUE", None), list):
        arbiter.SIG_QUEUE = list(signals)
    arbiter.start = calls.noting("start")
    arbiter.manage_workers = lambda: next(turns)()
    arbiter._start_control_server = lambda: None
    arbiter.maybe_promote_master = calls.noting("maybe_promote_master")
    arbiter.murder_workers = calls.noting("murder_workers")
    arbiter.halt = lambda reason=None, exit_status=0: calls.append(f"halt {exit_status}")
    arbiter.wakeup = lambda: None
    vars(arbiter).update(methods)
    return arbiter


def test_loop_looks_its_methods_up_on_the_instance_each_turn() -> None:
    calls = Calls()
    looping(calls, [], handle_hup=calls.noting("handle_hup")).run()
    assert [call for call in calls if call != "wait"] == [
        "start", "manage_workers", "maybe_promote_master", "murder_workers", "manage_workers", "halt 0",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["hup", "quit", "int", "term", "ttin", "ttou", "usr1", "usr2", "winch"])
def test_signals_are_handled_by_methods_of_the_instance(name: str) -> None:
    calls = Calls()
    sig = getattr(signal, f"SIG{name.upper()}")
    looping(calls, [sig], **{f"handle_{name}": calls.noting("handled", StopIteration())}).run()
    assert calls[-2:] == ["handled", "halt 0"]


def test_halt_server_ends_the_loop_with_its_status() -> None:
    calls = Calls()
    looping(calls, [], maybe_promote_master=calls.noting("tick", HaltServer("enough", 7))).run()
    assert calls[-1] == "halt 7"


def test_sigterm_ends_the_loop_by_stop_iteration() -> None:
    with pytest.raises(StopIteration):
        an_arbiter().handle_term()


def test_sigint_and_sigquit_stop_at_once_and_end_the_loop() -> None:
    for name in ("handle_int", "handle_quit"):
        arbiter, calls = an_arbiter(), Calls()
        arbiter.stop = lambda graceful=True, calls=calls: calls.append(f"stop {graceful}")
        with pytest.raises(StopIteration):
            getattr(arbiter, name)()
        assert calls == ["stop False"]


def test_keyboard_interrupt_ends_the_loop() -> None:
    calls = Calls()
    looping(calls, [], maybe_promote_master=calls.noting("tick", KeyboardInterrupt())).run()
    assert calls[-1] == "halt 0"


def test_any_other_exception_in_the_loop_ends_the_service() -> None:
    calls = Calls()
    stop = lambda graceful=True: calls.append(f"stop {graceful}")  # noqa: E731
    with pytest.raises(SystemExit):
        looping(calls, [], maybe_promote_master=calls.noting("tick", RuntimeError()), stop=stop).run()
    assert calls[-1] == "stop False"


def test_control_socket_is_opened_after_the_first_workers() -> None:
    if not hasattr(Arbiter, "_start_control_server"):
        pytest.skip("this gunicorn has none")
    calls = Calls()
    looping(calls, [], _start_control_server=calls.noting("control")).run()
    assert calls[:4] == ["start", "manage_workers", "control", "maybe_promote_master"]
    assert an_arbiter()._control_server is None


# -- its workers


def test_reaper_ends_the_service_at_two_exit_statuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (Arbiter.WORKER_BOOT_ERROR, Arbiter.APP_LOAD_ERROR):
        monkeypatch.setattr(module, "os", exits((11, status << 8)))
        arbiter = an_arbiter()
        arbiter.WORKERS = {11: a_worker(pid=11)}
        with pytest.raises(HaltServer) as halt:
            arbiter.reap_workers()
        assert halt.value.exit_status == status
        # It compares with what the instance says.
        monkeypatch.setattr(module, "os", exits((11, status << 8)))
        arbiter = an_arbiter()
        arbiter.WORKERS, arbiter.WORKER_BOOT_ERROR, arbiter.APP_LOAD_ERROR = {11: a_worker(pid=11)}, -1, -1
        arbiter.reap_workers()
        assert arbiter.WORKERS == {}


def test_reaper_asks_the_waitpid_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "os", exits((11, 0), (12, 9)))
    arbiter = an_arbiter()
    arbiter.WORKERS = {11: a_worker(), 12: a_worker()}
    arbiter.reap_workers()
    assert arbiter.WORKERS == {}


def test_timeout_compares_the_monotonic_clock_with_the_last_update() -> None:
    arbiter, killed = an_arbiter(timeout=5), []
    arbiter.kill_worker = lambda pid, sig: killed.append((pid, sig))
    beating, silent = a_worker(), a_worker()
    beating.tmp.last_update = lambda: time.monotonic() - 4
    silent.tmp.last_update = lambda: time.monotonic() - 6
    arbiter.WORKERS = {11: beating, 12: silent}
    arbiter.murder_workers()
    assert killed == [(12, signal.SIGABRT)]


def test_worker_exit_is_called_in_the_master_for_a_worker_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    arbiter = an_arbiter(worker_exit=lambda server, worker: called.append(worker))
    gone = arbiter.WORKERS[11] = a_worker()

    def kill(pid: int, sig: int) -> None:
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(module, "os", Os(kill=kill))
    arbiter.kill_worker(11, signal.SIGTERM)
    assert called == [gone]
    assert arbiter.WORKERS == {}


class Recorded:
    """A logger that notes the level of each line."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __getattr__(self, level: str) -> Any:
        return lambda *arguments, **options: self._calls.append(f"log {level}")


def noting_hook(calls: Calls, name: str) -> Callable[[Any, Any], None]:
    def hook(server: Any, worker: Any) -> None:
        calls.append(name)

    return hook


def in_the_child(
    monkeypatch: pytest.MonkeyPatch, calls: Calls, error: BaseException | None, app: App | None = None
) -> Any:
    """Have an arbiter fork, as the child; `error` is what the worker's boot raises."""
    arbiter = Arbiter(app or App())
    arbiter.log = Recorded(calls)
    arbiter.pid = os.getpid()
    worker = a_worker(calls, init_process=calls.noting("init_process", error))
    arbiter.worker_class = lambda *arguments: worker
    for hook in ("pre_fork", "post_fork", "worker_exit"):
        arbiter.cfg.set(hook, noting_hook(calls, hook))
    monkeypatch.setattr(module, "os", Os(fork=lambda: 0))
    monkeypatch.setattr(module.util, "_setproctitle", lambda title: None)
    return arbiter


def test_heartbeat_is_closed_before_worker_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    with pytest.raises(SystemExit) as end:
        in_the_child(monkeypatch, calls, None).spawn_worker()
    assert not end.value.code
    assert [call for call in calls if not call.startswith("log")] == [
        "pre_fork", "post_fork", "init_process", "tmp.close", "worker_exit",
    ]  # fmt: skip


def test_worker_that_cannot_import_the_app_says_so_at_debug_level(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    with pytest.raises(SystemExit) as end:
        in_the_child(monkeypatch, calls, AppImportError("no app")).spawn_worker()
    assert end.value.code == Arbiter.APP_LOAD_ERROR
    assert {"log error", "log exception", "log critical"} & set(calls) == set()
    calls.clear()
    with pytest.raises(SystemExit) as end:
        in_the_child(monkeypatch, calls, SystemExit(5)).spawn_worker()
    assert end.value.code == 5
    assert {"log error", "log exception", "log critical", "log debug"} & set(calls) == set()


def test_worker_that_fails_before_it_has_booted_exits_with_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls()
    with pytest.raises(SystemExit) as end:
        in_the_child(monkeypatch, calls, RuntimeError("broken")).spawn_worker()
    assert end.value.code == Arbiter.WORKER_BOOT_ERROR
    assert "log exception" in calls


def test_error_that_cannot_be_printed_leaves_spawn_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unprintable(AppImportError):
        def __str__(self) -> str:
            raise ValueError("it cannot be printed")

    with pytest.raises(ValueError, match="cannot be printed"):
        in_the_child(monkeypatch, Calls(), Unprintable("no app")).spawn_worker()


# -- a reload


def test_reload_retires_workers_before_new_ones_have_booted() -> None:
    calls, arbiter = Calls(), an_arbiter(workers=2)
    arbiter.spawn_worker = calls.noting("spawn_worker")
    arbiter.manage_workers = calls.noting("manage_workers")
    arbiter.log = Recorded(Calls())
    arbiter.setup = calls.noting("setup")
    arbiter.pid = os.getpid()
    arbiter.reload()
    assert calls == ["setup", "spawn_worker", "spawn_worker", "manage_workers"]


def test_reload_takes_raw_env_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZDD_WEB_CONTRACT", "before")
    app = App(raw_env=["ZDD_WEB_CONTRACT=in the configuration", "ZDD_WEB_CONTRACT_NEW=1"])
    arbiter, seen = Arbiter(app), {}
    assert os.environ["ZDD_WEB_CONTRACT"] == "in the configuration"
    app.before_reload = lambda: seen.update(os.environ)
    for name in ("setup", "spawn_worker", "manage_workers"):
        setattr(arbiter, name, lambda *arguments: None)
    arbiter.log = Recorded(Calls())
    arbiter.pid = os.getpid()
    arbiter.reload()
    assert seen["ZDD_WEB_CONTRACT"] == "before"
    assert "ZDD_WEB_CONTRACT_NEW" not in seen


# -- an upgrade of gunicorn's own


def test_pre_exec_edits_the_environment_of_a_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[dict[str, str]] = []

    def pre_exec(server: Any) -> None:
        server.cfg.env_orig["ZDD_WEB_CONTRACT"] = "1"

    arbiter = an_arbiter(pre_exec=pre_exec)
    monkeypatch.setattr(
        module, "os", Os(fork=lambda: 0, chdir=lambda path: None, execvpe=lambda file, args, env: ran.append(env))
    )
    arbiter.reexec()
    assert ran[0]["ZDD_WEB_CONTRACT"] == "1"
    assert ran[0]["GUNICORN_PID"] == str(os.getpid())
    assert "GUNICORN_FD" in ran[0]
