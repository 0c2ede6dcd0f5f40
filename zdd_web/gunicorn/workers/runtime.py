"""The worker's runtime: its slot, its boot, the gate, its loop, and the parts that end it.

The methods of gunicorn's worker are replaced between the fork and `init_process()`, which looks them up by name as it
installs its signal handlers and enters its loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from zdd_web import access_log, checks, log, process, waitgroup, watch
from zdd_web.board import Board, Slot, WorkerState
from zdd_web.gunicorn import settings_in_force
from zdd_web.gunicorn.adapter.exits import AppImportError
from zdd_web.gunicorn.adapter.worker import WorkerFacade
from zdd_web.gunicorn.log_rotation import reopening
from zdd_web.gunicorn.sockets.exchange import Exchange
from zdd_web.gunicorn.workers import app_forks, boot_watch, registry
from zdd_web.gunicorn.workers.exit_states import STATUS, Event, State, StateMachine
from zdd_web.gunicorn.workers.gate import Gate
from zdd_web.gunicorn.workers.kept_connections import KeptConnections
from zdd_web.gunicorn.workers.orders import Once, Orders
from zdd_web.gunicorn.workers.request_counts import RequestCounter
from zdd_web.gunicorn.workers.shutdown import WorkerShutdown
from zdd_web.gunicorn.workers.worker_end import WorkerEnd
from zdd_web.settings import Settings
from zdd_web.system import boot_log, log_files, proc

if TYPE_CHECKING:
    import asyncio


class WorkerRuntime:
    """What zdd_web adds to one gunicorn worker, in that worker's process."""

    def __init__(
        self,
        worker: WorkerFacade,
        board: Board,
        slot: Slot,
        settings: Settings,
        gate: Gate,
        boot_log: boot_log.Handler | None,
        listeners: dict[int, int],
        exchange: Exchange,
    ) -> None:
        self.worker, self.board, self.slot, self.gate = worker, board, slot, gate
        self.boot_log = boot_log
        self.process = process.attach(board, slot, settings)
        self.pid = os.getpid()
        self._boot_has_failed = False
        self.boot = boot_watch.BootWatch(self._note_step, boot_log.fd if boot_log is not None else 2)
        self._checks: checks.Runner | None = None
        self._listeners = (*listeners, *exchange.descriptors())
        limit = worker.take_max_requests()
        self.kept = KeptConnections(self, exchange)
        worker.adapt(self.process, self.kept.hands_over)
        self.adapter = registry.adapter_for(self)
        self.kept.store = self.adapter.connection_store()
        self._machine = StateMachine()
        is_new = self.adapter.is_on_new_connection
        self.requests = RequestCounter(self.process, limit, worker.cfg.forwarded_allow_ips, is_new)
        self.end = WorkerEnd(worker, self.process, self._machine, self.adapter)
        self.shutdown = WorkerShutdown(
            worker, self.process, listeners, self._machine, self.adapter, self.end, self.kept.is_exchange_empty
        )
        #: Calls `worker_exit`, for a worker that ends within a signal handler.
        self.run_exit_hook: Callable[[], None] = self.end.exit

    @property
    def settings(self) -> Settings:
        """Those in force, with those of the app once it is loaded."""
        return self.process.settings

    def enter(self, once: Once) -> None:
        """Take the slot and replace the methods of gunicorn's worker; called right after the fork."""
        self.slot.start = proc.start_time(os.getpid())
        self.slot.pid = self.pid
        worker, shutdown = self.worker, self.shutdown
        worker.replace("handle_exit", shutdown.handle_exit)
        worker.replace("handle_quit", shutdown.handle_quit)
        worker.replace("handle_abort", shutdown.handle_abort)
        worker.wrap("handle_usr1", reopening)
        self._load: Callable[[], None] = worker.replace("load_wsgi", self.load)
        self._run: Callable[[], None] = worker.replace("run", self.run)
        self.adapter.enter()
        app_forks.attach(worker, self.slot, self._listeners, self.adapter.in_a_child_of_the_app)
        shutdown.turn = Orders(shutdown, once).turn(self.adapter.beat)
        worker.replace("notify", shutdown.turn)

    # -- boot

    def load(self) -> None:
        """Load the app. A worker that hangs here cannot notice that its master died, so the kernel kills it then."""
        # After set_owner_process(): the kernel drops the setting as the user changes.
        if not proc.die_with_parent(signal.SIGKILL, self.worker.ppid):
            os._exit(0)
        # They are for the master. A worker would die of one that is sent to all processes of gunicorn.
        app_forks.ignore(signal.SIGHUP, signal.SIGUSR2)
        if log_files.were_renamed():
            # SIGUSR1 came before this process had its handler.
            self.worker.handle_usr1(signal.SIGUSR1, None)
        with self.boot_step() as step:
            step("importing the app")
            self.adapter.before_load()
            self._load()
            step("starting up (lifespan, post_worker_init)")

    @contextlib.contextmanager
    def boot_step(self) -> Iterator[Callable[[str], None]]:
        """Report what a step of the boot raises, on the board and in the log, for the operator of an upgrade."""
        try:
            yield self.boot.step
        except BaseException as error:
            if os.getpid() == self.pid:
                self._boot_failed(error)
            raise

    def _note_step(self, what: str) -> None:
        if not self._boot_has_failed and os.getpid() == self.pid:
            self.slot.error = what

    def _boot_failed(self, error: BaseException) -> None:
        if self._boot_has_failed:
            return  # what an asyncio worker makes of the error, as its loop ends
        self._boot_has_failed = True
        self.boot.over()
        self.slot.error = f"{type(error).__name__}: {error}"
        if self.boot_log is not None and isinstance(error, (SystemExit, AppImportError)):
            # gunicorn logs these at debug only, or not at all; the others it logs itself:
            # test_worker_that_cannot_import_the_app_says_so_at_debug_level.
            self.boot_log.handle(
                logging.LogRecord(
                    "zdd_web",
                    logging.ERROR,
                    "",
                    0,
                    "the app could not be loaded",
                    (),
                    (type(error), error, error.__traceback__),
                )
            )
        log.emit("boot.failed", logging.ERROR, pid=os.getpid(), error=self.slot.error)

    def stand_at_gate(self) -> None:
        """Warm up and wait for the gate, as soon as the worker class can; called after the app was loaded."""
        with self.boot_step():
            checks.load(settings_in_force.apply_app_settings(self.settings).checks)
        if not self.settings.log_probes:
            access_log.leave_probes_out(self.worker.log)
        watch.start()
        self.adapter.stand_at_gate()

    def pass_checks(self, beat: Callable[[], None], loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Wait until the app's own checks pass; meanwhile the board shows which one does not.

        `loop` is the event loop in which async checks are to run.
        """

        self._checks = self.process.checks_runner(loop)
        names = ", ".join(state.check.name for state in self._checks.states if state.check.critical)
        step = f"waiting for its checks ({names})" if names else "starting its checks"
        self.boot.step(step)

        def show(why: str) -> None:
            self.slot.error = why or step

        checks.pass_all(self._checks, beat, show)

    # -- the gate

    def wait_at_gate(self, interval: float) -> None:
        """Mark this worker as ready, wait for the gate with a heartbeat each `interval` seconds, and pass it."""
        self.arrive_at_gate()
        self.gate.wait(self.board, self.shutdown.turn, interval)
        self.pass_gate()

    def arrive_at_gate(self) -> int:
        """Mark this worker as ready and return the descriptor to wait for. Ends one that is to leave already."""
        self.shutdown.move(Event.ARRIVED)
        self.boot.over()
        if self._machine.state is not State.AT_GATE or not self.worker.alive or self.slot.retire:
            sys.exit(0)
        self.process.set_state(WorkerState.READY)
        return self.gate.fileno()

    def pass_gate(self) -> None:
        """Mark this worker as serving, now that the gate is open. Ends it if the master is gone instead."""
        self.gate.look(self.board)
        self.shutdown.move(Event.GATE_OPENED)
        if self.boot_log is not None:
            self.boot_log.end()
            self.boot_log = None
        self.gate.leave()
        self.process.set_state(WorkerState.SERVING)
        if self._checks is not None:
            self._checks.start()
        # From here on it may have requests in hand, which it finishes when its master dies.
        if not proc.die_with_parent(signal.SIGTERM, self.worker.ppid):
            self.shutdown.handle_exit(signal.SIGTERM, None)

    # -- the loop, and after it

    def notify(self) -> None:
        """Take a turn: send the heartbeat, follow orders, and go on with the shutdown."""
        self.shutdown.notify()

    @property
    def is_finishing(self) -> bool:
        """Whether the next turn may bring the shutdown forward."""
        return self.shutdown.is_finishing

    def accepts_no_more(self) -> None:
        """Mark this worker as leaving on the board, and close its listeners."""
        self.shutdown.accepts_no_more()

    def run(self) -> None:
        """The worker's loop, then the wait for background work.

        Not in `worker_exit`: the heartbeat's file is closed by then (test_heartbeat_is_closed_before_worker_exit), and
        gunicorn would kill it.
        """
        self.adapter.run(self._run)
        if os.getpid() != self.pid:
            return  # the app forked, and the child has come back from the view
        # gthread's loop ends at the deadline, whatever its threads do.
        self.adapter.has_cut = self.adapter.has_cut or bool(self.slot.in_flight)
        self.shutdown.move(Event.LOOP_OVER)
        if self._machine.state in STATUS:
            sys.exit(STATUS[self._machine.state])
        self.process.going = True
        self.shutdown.accepts_no_more()
        # The master repeats it each second.
        app_forks.ignore(signal.SIGTERM)
        watch.end()
        # Not called yet if the loop has ended by itself, because the master is gone.
        waitgroup.run_stop_hooks()
        self.end.finish()
