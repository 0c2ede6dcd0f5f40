"""gunicorn's arbiter, as the parts of the master use it.

`ArbiterFacade` is all that they know of it: what is read has a type, what is written has a verb, and what is replaced
has a row in patches.py.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gunicorn import arbiter, systemd

from zdd_web.gunicorn.adapter import control_socket, logger_class, signal_queue
from zdd_web.gunicorn.adapter.config import Config
from zdd_web.gunicorn.adapter.ownership import set_process_title
from zdd_web.gunicorn.adapter.patches import replace, restore, write
from zdd_web.system import pauses

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.protocols import App, Arbiter, Logger, Worker

#: No process can exit with a negative status.
NO_EXIT_STATUS = -1

#: The methods of the arbiter that a part of the master may take the place of; see patches.py.
Replaceable = Literal[
    "maybe_promote_master",
    "manage_workers",
    "reap_workers",
    "stop",
    "halt",
    "handle_term",
    "handle_int",
    "handle_quit",
    "handle_hup",
    "handle_usr1",
    "handle_usr2",
    "handle_winch",
    "handle_ttin",
    "handle_ttou",
]

#: The signals whose handlers have a name of gunicorn's.
HANDLERS: Mapping[int, Replaceable] = {
    signal.SIGUSR1: "handle_usr1",
    signal.SIGTTIN: "handle_ttin",
    signal.SIGTTOU: "handle_ttou",
    signal.SIGWINCH: "handle_winch",
}


class PidFile(Protocol):
    """A pid file: zdd_web's; gunicorn's own, which is there until `on_starting`, has the first three."""

    fname: str

    def create(self, pid: int) -> None:
        """Write it. Raises OSError."""

    def unlink(self) -> None:
        """Remove it if it names this process."""

    def prepare(self, pid: int) -> str:
        """Write it beside the one that is there, and return the path. Raises OSError."""

    def commit(self, prepared: str) -> None:
        """Put what was prepared in its place."""


class ArbiterFacade:
    """The arbiter of this process. `raw` is gunicorn's object, for the user's hooks alone."""

    def __init__(self, raw: Arbiter) -> None:
        self.raw = raw

    # -- what it knows

    @property
    def cfg(self) -> Config:
        """The configuration in force; after a reload another object."""
        return self.raw.cfg

    @property
    def log(self) -> Logger:
        """gunicorn's logger, of the user's `logger_class`."""
        return self.raw.log

    @property
    def pid(self) -> int:
        """The master's pid, as it has it since its start."""
        return self.raw.pid

    @property
    def has_dirty_apps(self) -> bool:
        """Whether there are apps in processes beside its workers (25 and later)."""
        setting = self.cfg.settings.get("dirty_apps")
        return setting is not None and bool(setting.get())

    @property
    def signals(self) -> tuple[int, ...]:
        """The signals that it queues for its loop."""
        return tuple(self.raw.SIGNALS)

    # -- its workers

    @property
    def num_workers(self) -> int:
        """How many workers there are to be."""
        return self.raw.num_workers

    def want(self, workers: int) -> None:
        """Set how many workers there are to be; the hook `nworkers_changed` is called."""
        write(self.raw, "num_workers", workers)

    @property
    def has_workers(self) -> bool:
        """Whether there is a worker that was not reaped yet."""
        return bool(self.raw.WORKERS)

    def has(self, worker: object) -> bool:
        """Tell whether a worker was forked and not reaped yet."""
        pid: int = getattr(worker, "pid", 0)
        return self.raw.WORKERS.get(pid) is worker

    @property
    def newest_age(self) -> int:
        """The age of the worker that was forked last; ages count up."""
        return self.raw.worker_age

    def spawn_worker(self) -> None:
        """Fork a worker. In the child this raises SystemExit."""
        self.raw.spawn_worker()

    def kill_worker(self, pid: int, sig: int) -> None:
        """Send a signal to a worker; one that is gone is forgotten."""
        self.raw.kill_worker(pid, sig)

    def kill_workers(self, sig: int) -> None:
        """Send a signal to every worker."""
        self.raw.kill_workers(sig)

    def reap_workers(self) -> None:
        """Reap the children that have ended, as the loop does."""
        self.raw.reap_workers()

    def survive_failed_boots(self) -> None:
        """Keep the reaper from ending the service at the exit statuses of failed boots.

        Up to 23 it runs in a signal handler, in the middle of anything; zdd_web's master decides in the loop. See
        tests/contract: test_reaper_ends_the_service_at_two_exit_statuses.
        """
        write(self.raw, "WORKER_BOOT_ERROR", NO_EXIT_STATUS)
        write(self.raw, "APP_LOAD_ERROR", NO_EXIT_STATUS)

    def own_exit_statuses(self) -> None:
        """Undo `survive_failed_boots()` in a worker, whose exit statuses are gunicorn's."""
        restore(self.raw, "WORKER_BOOT_ERROR")
        restore(self.raw, "APP_LOAD_ERROR")

    # -- its loop

    def replace(self, name: Replaceable, new: Callable[..., None]) -> Callable[..., None]:
        """Have the loop call `new`; return what it has called so far."""
        before: Callable[..., None] = replace(self.raw, name, new)
        return before

    def replace_handler(self, sig: int, made: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """Have `made(handler)` handle a signal in the place of `handler`."""
        name = HANDLERS[sig]
        self.replace(name, made(getattr(self.raw, name)))

    def set_wait(self, interval: Callable[[], float]) -> None:
        """Make the loop turn after `interval()` seconds where it would wait for a whole one.

        24 waits on a queue in `wait_for_signals(timeout)`; 23 sleeps in `sleep()` on a pipe.
        """
        raw = self.raw
        signal_queue.replace_queue(raw)
        if hasattr(raw, "wait_for_signals"):
            wait = raw.wait_for_signals
            replace(raw, "wait_for_signals", lambda timeout=1.0: wait(timeout=min(timeout, interval())))
            return

        def sleep() -> None:
            reader = raw.PIPE[0]
            if select.select([reader], [], [], interval())[0]:
                try:
                    while os.read(reader, 1):
                        pass
                except BlockingIOError:
                    pass

        replace(raw, "sleep", sleep)

    def stop(self) -> None:
        """Stop the workers and close the listeners, as at the loop's end."""
        self.raw.stop()

    def handle_term(self) -> None:
        """Do what SIGTERM does."""
        self.raw.handle_term()

    def ignore_signals(self) -> None:
        """Have a master that has ended its loop ignore the signals that gunicorn would queue for it."""
        for sig in self.signals:
            signal.signal(sig, signal.SIG_IGN)

    def has_queued(self, sig: int) -> bool:
        """Tell whether a signal was caught that the loop has not handled yet."""
        return signal_queue.waits(self.raw, sig)

    def take_queued_signals(self) -> list[int]:
        """Return the signals that the loop has not handled yet, and empty its queue."""
        return signal_queue.take(self.raw)

    # -- its place among other masters

    def set_listeners(self, sockets: Sequence[object]) -> None:
        """Set what gunicorn names as its listeners, and gives to its workers."""
        write(self.raw, "LISTENERS", list(sockets))

    def mark_sockets_as_systemds(self) -> None:
        """Note that the listeners are systemd's: gunicorn does not unlink them."""
        write(self.raw, "systemd", True)

    @property
    def predecessor_pid(self) -> int:
        """The pid of the master that this one replaces, 0 for none."""
        return self.raw.master_pid

    def set_predecessor(self, pid: int) -> None:
        """Set the pid of the master that this one replaces, 0 for none.

        See tests/contract: test_stop_unlinks_sockets_without_predecessor_and_successor.
        """
        write(self.raw, "master_pid", pid)

    @property
    def has_stock_predecessor(self) -> bool:
        """Whether the listeners are those of a gunicorn without zdd_web that was sent USR2, and serves on."""
        # A predecessor with zdd_web has taken GUNICORN_PID out.
        return self.predecessor_pid != 0 and self.predecessor_pid == os.getppid()

    @property
    def successor_pid(self) -> int:
        """The pid of the master that replaces this one, 0 for none."""
        return self.raw.reexec_pid

    def set_successor(self, pid: int) -> None:
        """Set the pid of the master that replaces this one, 0 for none."""
        write(self.raw, "reexec_pid", pid)

    @property
    def pid_file(self) -> PidFile | None:
        """Its pid file; None without one, and before it was made."""
        # tests/contract: test_first_hook_comes_before_pid_file_and_process_name
        pid_file: PidFile | None = getattr(self.raw, "pidfile", None)
        return pid_file

    def set_pid_file(self, pid_file: PidFile | None) -> None:
        """Put another pid file in the place of gunicorn's; nothing is written or removed."""
        write(self.raw, "pidfile", pid_file)

    def suspend_control_server(self) -> None:
        """See `control_socket.suspend()`."""
        control_socket.suspend(self.raw)

    def hold_control_server(self) -> None:
        """See `control_socket.hold()`."""
        control_socket.hold(self.raw)

    def resume_control_server(self) -> None:
        """See `control_socket.resume()`."""
        control_socket.resume(self.raw)

    # -- the user's

    def call_pre_exec(self) -> tuple[dict[str, str], set[str]]:
        """Call the user's `pre_exec` as gunicorn does: in the child that is about to exec.

        Returns the variables that it has set in `cfg.env_orig`, of which gunicorn makes the environment, and the names
        of those that it has removed. See tests/contract: test_pre_exec_edits_the_environment_of_a_successor.
        """
        environ = self.cfg.env_orig
        before = dict(environ)
        self.raw.cfg.pre_exec(self.raw)
        return {
            key: value for key, value in environ.items() if before.get(key) != value
        }, before.keys() - environ.keys()

    def call_on_exit(self) -> None:
        """Call the hook `on_exit`."""
        self.raw.cfg.on_exit(self.raw)

    def copy_log_to(self, handler: logging.Handler) -> None:
        """Have every line of gunicorn's logger go to a handler too."""
        if logger_class.is_standard(self.log):
            logging.getLogger("gunicorn.error").addHandler(handler)
        else:
            write(self.raw, "log", logger_class.Copying(self.log, handler))

    def report_preload(self, load: Callable[[Callable[[], App]], App]) -> None:
        """Have `load(wsgi)` called where `preload_app` has gunicorn call `app.wsgi()`, once."""
        app = self.raw.app

        def wsgi() -> App:
            restore(app, "wsgi")
            return load(app.wsgi)

        replace(app, "wsgi", wsgi)

    # -- a new configuration

    def load_configuration(self) -> Config:
        """Load the configuration and return it, in the app and not in force yet. Raises what its file raises.

        See tests/contract: test_configuration_file_that_raises_ends_the_process.
        """
        self.raw.app.reload()
        return self.raw.app.cfg

    def take_back_configuration(self, cfg: Config) -> None:
        """Give the app its former configuration back."""
        write(self.raw.app, "cfg", cfg)

    def load_app(self) -> None:
        """Import the app anew. Raises what it raises."""
        write(self.raw.app, "callable", None)
        self.raw.app.wsgi()

    def set_up(self) -> None:
        """Put the app's configuration in force."""
        self.raw.setup(self.raw.app)

    def call_on_reload(self) -> None:
        """Call the hook `on_reload`."""
        self.raw.cfg.on_reload(self.raw)

    def set_process_title(self) -> None:
        """Name the process after the configuration."""
        set_process_title(f"master [{self.raw.proc_name}]")


def tell_exits(tell: Callable[[int, int], None]) -> None:
    """Have `tell(pid, status)` called for each child that gunicorn reaps, before it forgets the status.

    No hook is given it, and a look at the children before gunicorn's reaper runs misses whichever ends in between.
    """

    class Telling(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        @staticmethod
        def waitpid(pid: int, options: int) -> tuple[int, int]:
            found, status = os.waitpid(pid, options)
            if found:
                tell(found, status)
            return found, status

    write(arbiter, "os", Telling("os"))


def silence_systemd() -> None:
    """Keep the arbiter from sending READY=1 before a worker exists: test_ready_is_sent_before_there_is_a_worker."""

    class Silent(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(systemd, name)

        @staticmethod
        def sd_notify(*said: object, **options: object) -> None:
            pass

    write(arbiter, "systemd", Silent("gunicorn.systemd"))


def discount_pauses(worker: Worker) -> None:
    """Have gunicorn's `murder_workers()` not count the time in which this master itself was paused.

    It compares the monotonic clock with what `last_update()` returns, in the master's own copy of the worker; see
    tests/contract: test_timeout_compares_the_monotonic_clock_with_the_last_update.
    """
    last_update = worker.tmp.last_update
    replace(worker.tmp, "last_update", lambda: time.monotonic() - pauses.since(int(last_update() * 1e9)))
