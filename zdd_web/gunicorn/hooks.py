"""gunicorn's hooks, ours and the user's runtime by runtime.

State lives in this module and not in the functions that `install()` puts into the configuration: a reload runs that
file again, in a fresh namespace, and must find the master that is there.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from zdd_web import log
from zdd_web.errors import ListenerError, SettingsError, UpgradeError, ZddError
from zdd_web.gunicorn import settings_in_force, start_problems, termination_message
from zdd_web.gunicorn.adapter import check_config_option, logger_class, patches, versions
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade, discount_pauses
from zdd_web.gunicorn.adapter.boundary import guarded
from zdd_web.gunicorn.adapter.config import Config, Hook, normalise_hook
from zdd_web.gunicorn.adapter.worker import WorkerFacade
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.gunicorn.master.master import Master
from zdd_web.gunicorn.pid_file import PidFile
from zdd_web.gunicorn.termination_message import StartMessage
from zdd_web.gunicorn.upgrade import takeover
from zdd_web.gunicorn.workers import boot_watch
from zdd_web.gunicorn.workers.runtime import WorkerRuntime
from zdd_web.settings import Settings
from zdd_web.system import masking, stdio

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import App, Arbiter, Request, Response, Worker

MARK = "__zdd_web__"


@dataclass(eq=False, repr=False)
class State:
    """What this process knows: set in the master, inherited by its workers."""

    launch: Launch
    inherited: Inheritance | None
    master: Master | None = None
    worker: WorkerRuntime | None = None
    users: dict[str, Hook] = field(default_factory=dict)
    #: As far as it is known before the settings are, or when one of them cannot work.
    termination_log: str = ""


state: State | None = None


def install(namespace: dict[str, Any], settings: dict[str, object]) -> None:
    """See `zdd_web.gunicorn.install`. Raises `ZddError`."""
    global state
    if MARK in namespace:
        raise SettingsError(
            "install() was called twice in one configuration: keep the last call, at the end of the file"
        )
    if state is None:
        # First of all, before anything is opened that would get the number of a stream.
        stdio.fill_closed_descriptors()
        # Before anything else: what is inherited is in the environment, where no successor and no app may find it.
        inherited = Inheritance.take(os.environ)
        state = State(launch=Launch.record(inherited.passed_on if inherited else None), inherited=inherited)
        state.termination_log = termination_message.path(settings, os.environ)
        check_config_option.examine(_examine_configuration, _examine_app)
    versions.check_version()
    patches.check()
    settings_in_force.take(settings)
    state.users = {name: normalise_hook(name, namespace[name]) for name in _OURS if namespace.get(name) is not None}
    for name, ours in _OURS.items():
        namespace[name] = ours
    namespace[MARK] = True


def _user_hook(name: str) -> Hook | None:
    assert state is not None
    return state.users.get(name)


def fail(error: ZddError, server: ArbiterFacade | None = None) -> NoReturn:
    """End a start that cannot work: the reason on stderr and in the log, exit status 1, no traceback, no pid file."""
    logged = False
    _start_message().failed(str(error))
    if server is not None:
        log.emit("settings.invalid", logging.CRITICAL, error=str(error))
        if server.pid_file is not None:
            server.pid_file.unlink()
        logged = server.cfg.errorlog == "-" and logger_class.is_standard(server.log)
    if not logged:
        # Not by SystemExit(text): Python's own attempt to print it may make the exit status another.
        stdio.print_error(masking.printable(f"zdd_web: {error}"))
    stdio.flush_streams()
    raise SystemExit(1)


def _start_message() -> StartMessage:
    """Return the termination message of the start that is under way; none in a reload, or in an upgrade."""
    if state is None or (state.inherited is not None and not state.inherited.taken):
        return StartMessage("")
    if state.master is not None:
        return state.master.start_message
    return StartMessage(state.termination_log)


def check(cfg: Config) -> None:
    """Check what only the finished configuration can tell, command line included. Raises `SettingsError`."""
    for name, ours in _OURS.items():
        if getattr(cfg, name) is not ours:
            raise SettingsError(
                f"{name} was set after install() in the configuration file, so zdd_web's own is lost: "
                f"define it before install(), which runs both"
            )
    if settings_in_force.in_force().keep_pid and cfg.daemon:
        raise SettingsError("KEEP_PID = True and daemon = True contradict each other: a daemon has no parent to keep")
    if cfg.reuse_port:
        raise SettingsError(
            "reuse_port = True (or --reuse-port) loses the requests that wait in a closing worker's queue, and breaks "
            "SIGUSR2: remove it"
        )
    # Once more: the module of the worker class is loaded now.
    patches.check(*versions.MODULES.get(versions.check_worker_class(cfg), ()))


def _examine_configuration(cfg: Config) -> None:
    assert state is not None
    # The service that runs in this container, if there is one, has a message of its own.
    state.termination_log = ""
    try:
        settings = settings_in_force.settle(cfg)
        check(cfg)
        start_problems.examine_configuration(cfg, settings)
    except ZddError as error:
        fail(error)


def _examine_app() -> None:
    assert state is not None
    try:
        start_problems.examine_app(settings_in_force.in_force())
    except ZddError as error:
        fail(error)


def service_name(settings: Settings, cfg: Config) -> str:
    """Return what the commands call this service: NAME, else `proc_name`, else the first bind."""
    name = settings.name or cfg.settings["proc_name"].get() or cfg.bind[0]
    return re.sub(r"[^A-Za-z0-9._:@/\[\]-]", "-", name)[:100]


# -- the hooks, in the order in which they run


def nworkers_changed(server: Arbiter, new_value: int, old_value: int | None) -> None:
    """The first hook that sees the whole configuration: before the pid file, and before `preload_app` loads the app."""
    assert state is not None
    if old_value is None and state.master is None:
        facade = ArbiterFacade(server)
        log.use_gunicorn(server.log)
        try:
            settings = settings_in_force.settle(server.cfg)
            state.termination_log = settings.termination_log
            check(server.cfg)
        except SettingsError as error:
            fail(error, facade)
        try:
            name = service_name(settings, server.cfg)
            if state.inherited is None and settings.takeover:
                state.inherited = takeover.ask(settings, name, server.cfg.pidfile or "")
            state.master = Master(facade, settings_in_force.in_force, state.launch, name, state.inherited)
            if server.cfg.pidfile and state.inherited is None:
                PidFile(server.cfg.pidfile, os.getpid()).remove_if_stale()
        except OSError as error:
            takeover.decline(state.inherited, str(error))
            fail(ZddError(f"the board or the pid file cannot be made: {error}"), facade)
        except (SettingsError, ListenerError, UpgradeError) as error:
            takeover.decline(state.inherited, str(error))
            fail(error, facade)
        if state.master.predecessor_link is not None:
            state.master.predecessor_link.hide_pid_file()
        if server.cfg.preload_app:
            _report_preloading(facade, state.master.start_message)
    else:
        # After a reload: the arguments of install() are new.
        settings_in_force.settle(server.cfg)
    hook = _user_hook("nworkers_changed")
    if hook is not None:
        # Called from SIGTTIN's handler too, where what it raises would end a service that serves.
        serves = state.master is not None and state.master.gate.opened
        call = guarded("nworkers_changed", hook) if serves else hook
        call(server, new_value, old_value)


def _report_preloading(server: ArbiterFacade, message: StartMessage) -> None:
    def load(wsgi: Callable[[], App]) -> App:
        with message.reporting(), boot_watch.watched("importing the app (preload_app)"):
            return wsgi()

    server.report_preload(load)


def on_starting(server: Arbiter) -> None:
    """Put the master's methods in place."""
    assert state is not None
    if state.master is None:
        server_error = SettingsError("nworkers_changed was set after install(): define it before, install() runs both")
        fail(server_error, ArbiterFacade(server))
    predecessor_link = state.master.predecessor_link
    try:
        patches.check_values(server)
        if predecessor_link is not None:
            predecessor_link.speak()
        hook = _user_hook("on_starting")
        if hook is not None:
            hook(server)
        state.master.take_over()
    except (SettingsError, UpgradeError, ListenerError) as error:
        if predecessor_link is not None:
            predecessor_link.fail(str(error))
        fail(error, state.master.server)
    except BaseException as error:
        reason = f"on_starting: {type(error).__name__}: {error}"
        state.master.start_message.failed(reason)
        if predecessor_link is not None:
            predecessor_link.fail(reason)
        # gunicorn creates the pid file before this hook and leaves it behind: test_pid_file_comes_before_on_starting.
        if state.master.server.pid_file is not None:
            state.master.server.pid_file.unlink()
        raise


def when_ready(server: Arbiter) -> None:
    """Nothing of ours; but a predecessor should hear why its successor ends here."""
    assert state is not None and state.master is not None
    hook = _user_hook("when_ready")
    if hook is None:
        return
    try:
        hook(server)
    except BaseException as error:
        reason = f"when_ready: {type(error).__name__}: {error}"
        state.master.start_message.failed(reason)
        if state.master.predecessor_link is not None:
            state.master.predecessor_link.fail(reason)
        raise


def pre_fork(server: Arbiter, worker: Worker) -> None:
    """Give the worker its slot."""
    assert state is not None and state.master is not None
    state.master.roster.claim(worker)
    discount_pauses(worker)
    hook = _user_hook("pre_fork")
    if hook is not None:
        hook(server, worker)


def post_fork(server: Arbiter, worker: Worker) -> None:
    """Become a worker of ours."""
    assert state is not None and state.master is not None
    master = state.master
    slot = master.roster.slot_of(worker)
    boot_log = master.predecessor_link.handler if master.predecessor_link is not None else None
    master.after_fork(slot)
    facade, settings = WorkerFacade(worker), master.generation.settings
    listeners = master.listening.for_worker(facade, slot)
    state.worker = WorkerRuntime(
        facade, master.board, slot, settings, master.gate, boot_log, listeners, master.exchange
    )
    state.worker.run_exit_hook = lambda: worker.cfg.worker_exit(server, worker)
    state.worker.enter(master.once)
    # On every request: where the user has no hook there is nothing in between either.
    counts, requests = state.worker.adapter.counts_by_hook, state.worker.requests
    for name, ours in (("pre_request", requests.started), ("post_request", requests.finished)):
        if name not in state.users:
            worker.cfg.set(name, ours if counts else worker.cfg.settings[name].default)
    hook = _user_hook("post_fork")
    if hook is not None:
        with state.worker.boot_step() as step:
            step("post_fork")
            hook(server, worker)


def post_worker_init(worker: Worker) -> None:
    """Stand at the gate, after whatever the user does to a worker that is about to serve."""
    assert state is not None and state.worker is not None
    hook = _user_hook("post_worker_init")
    if hook is not None:
        with state.worker.boot_step():
            hook(worker)
    state.worker.stand_at_gate()


def pre_request(worker: Worker, req: Request) -> None:
    """Count the request in; only called where the user has such a hook, see `post_fork`."""
    if state.worker.adapter.counts_by_hook:  # type: ignore[union-attr]
        state.worker.requests.started(worker, req)  # type: ignore[union-attr]
    state.users["pre_request"](worker, req)  # type: ignore[union-attr]


def post_request(worker: Worker, req: Request, environ: object, resp: Response | None) -> None:
    """Count the request out, also when the user's hook raises; only called where there is one, see `post_fork`."""
    try:
        state.users["post_request"](worker, req, environ, resp)  # type: ignore[union-attr]
    finally:
        if state.worker.adapter.counts_by_hook:  # type: ignore[union-attr]
            state.worker.requests.finished(worker, req, environ, resp)  # type: ignore[union-attr]


def worker_exit(server: Arbiter, worker: Worker) -> None:
    """Let the user's hook run, then leave for good."""
    assert state is not None
    try:
        hook = _user_hook("worker_exit")
        if hook is not None:
            hook(server, worker)
    finally:
        # gunicorn calls this hook in the master too, for a worker that was gone when it was signalled:
        # test_worker_exit_is_called_in_the_master_for_a_worker_that_is_gone.
        if state.worker is not None and worker.pid == os.getpid():
            state.worker.end.exit()


def on_exit(server: Arbiter) -> None:
    """Let the user's hook run, while probes are still answered; then close the probe port, as the very last thing."""
    assert state is not None and state.master is not None
    try:
        hook = _user_hook("on_exit")
        # A generation that was given up before it was active has nothing to end: the generation before it serves.
        if hook is not None and not state.master.generation.awaits_promotion:
            hook(server)
    finally:
        guarded("probe port", state.master.probes.end)()
        stdio.flush_streams()


_OURS: dict[str, Hook] = {
    hook.__name__: hook
    for hook in (
        nworkers_changed,
        on_starting,
        when_ready,
        pre_fork,
        post_fork,
        post_worker_init,
        pre_request,
        post_request,
        worker_exit,
        on_exit,
    )
}
__all__ = ["State", "check", "fail", "install", "service_name", "state"]
