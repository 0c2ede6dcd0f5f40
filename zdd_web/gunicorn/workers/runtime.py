"""The worker's runtime: its slot, the gate, SIGTERM, and the wait for background work.

Everything is hung on the worker object between the fork and `init_process()`, which looks the methods up by name when
it installs its signal handlers and enters its loop.

SIGTERM and who sent it: the master writes `retire` into the slot first, so a worker that finds it obeys at once, as
it does once its generation drains or retires, or when its master is gone. Otherwise the signal came from somebody
who signals whole groups (systemd's KillMode=control-group) or from a person: the worker waits a second for
the master's word, then leaves alone if the service is still serving.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from gunicorn.errors import AppImportError

from zdd_web import access_log, checks, log, process, waitgroup, watch
from zdd_web.board import Board, Header, ListenerRecord, Slot, WorkerState
from zdd_web.board.admission import SHUT, Admission
from zdd_web.gunicorn import process_exit, settings_sources
from zdd_web.gunicorn.adapter import compat, gthread, sync
from zdd_web.gunicorn.log_rotation import reopening
from zdd_web.gunicorn.sockets.exchange import Exchange
from zdd_web.gunicorn.workers import app_forks, boot_watch, registry
from zdd_web.gunicorn.workers.base import Leaving
from zdd_web.gunicorn.workers.exchange import KeptConnections
from zdd_web.gunicorn.workers.gate import Gate
from zdd_web.gunicorn.workers.late_arrivals import LateCounter
from zdd_web.gunicorn.workers.orders import Once, Orders
from zdd_web.health import table
from zdd_web.lifecycle import STOPPING, WORKERS_LEAVE, Phase
from zdd_web.listeners import accept_queue
from zdd_web.settings import Settings
from zdd_web.system import boot_log, clock, log_files, proc

#: How long a worker that was signalled directly waits for its master's word, seconds.
PATIENCE = 1.0

#: How long a closed door waits for handshakes that were under way, seconds: a long round trip.
SETTLE = 0.25

#: Where the door cannot be closed the queue may never be found empty under load, seconds.
NARROW_AT_MOST = 2.0

#: Of a worker's last words, the part for background work that is given up; `on_drained` comes after it.
GIVE_UP_SHARE = 0.65

#: Python's `sys.setswitchinterval()` from the deadline on, seconds.
LAST_SWITCH_INTERVAL = 0.0002

#: With no deadline, a drain that gunicorn itself bounds (`graceful_timeout`) gets a day.
NO_LIMIT = 86_400


class WorkerRuntime:
    """What zdd_web adds to one gunicorn worker, in that worker's process."""

    def __init__(
        self,
        worker: Any,
        board: Board,
        slot: Slot,
        settings: Settings,
        gate: Gate,
        boot_log: boot_log.Handler | None,
        listeners: dict[int, int],
        exchange: Exchange,
    ) -> None:
        #: The index of each listener, by descriptor.
        self.listeners = listeners
        self.worker, self.board, self.slot, self.settings, self.gate = worker, board, slot, settings, gate
        self.boot_log = boot_log
        self.process = process.attach(board, slot, settings)
        self.pid = os.getpid()
        self._at_gate = False
        self.boot_has_failed = False
        self.boot = boot_watch.BootWatch(self._note_step, boot_log.fd if boot_log is not None else 2)
        self._left = False
        self._emptying = False
        self._signalled_at = 0.0
        self._status_now: int | None = None
        self._give_up_once = threading.Lock()
        self.loop_is_over = False
        self._watched_deadline = clock.NEVER
        self._wind_down: Leaving | None = None
        self._background_own = clock.NEVER
        self._threads_own = clock.NEVER
        self._threads_cut = False
        self._last_beat: Callable[[], None] = lambda: None
        self._checks: checks.Runner | None = None
        #: Runs `worker_exit`, where a worker ends from within a signal handler.
        self.run_exit_hook: Callable[[], None] = self.exit
        self._limit = compat.take_max_requests(worker)
        self._words, self._seldom_lock = board.header.words, threading.Lock()
        self._late = LateCounter(slot, settings.drain_delay, worker.cfg.forwarded_allow_ips)
        self._count_in, self._count_out = self.process.request_counters()
        self.exchange = exchange
        self.kept = KeptConnections(self, exchange)
        compat.close_connections_when(self.kept.are_to_close)
        compat.end_by_signal_alone(worker)
        compat.remember_names(worker)
        gthread.adapt(worker, self.process)
        sync.adapt(worker, self.process)
        self.adapter = registry.adapter_for(self)
        self.kept.store = self.adapter.connection_store()
        self._beat = self.adapter.beat
        self._load: Callable[[], None] = worker.load_wsgi
        self._run: Callable[[], None] = worker.run

    def enter(self, once: Once) -> None:
        """Take the slot and hang everything on the worker; called right after the fork."""
        self.slot.start = proc.start_time(os.getpid())
        self.slot.pid = self.pid
        worker = self.worker
        worker.handle_exit = self.handle_exit
        worker.handle_quit, worker.handle_abort = self.handle_quit, self.handle_abort
        worker.handle_usr1 = reopening(worker.handle_usr1)
        worker.load_wsgi, worker.run = self.load, self.run
        self.adapter.enter()
        app_forks.attach(self)
        #: The heartbeat of a worker that serves.
        worker.notify = self.turn = Orders(self, once).turn(self._beat)

    # -- boot

    def load(self) -> None:
        """Load the app; a worker that hangs here must not outlive its master, which it cannot notice."""
        # After set_owner_process(), which makes the kernel forget the wish.
        if not proc.die_with_parent(signal.SIGKILL, self.worker.ppid):
            os._exit(0)
        # To the master they mean something; a worker whom a signal to all of gunicorn reaches would die of them.
        app_forks.ignore(signal.SIGHUP, signal.SIGUSR2)
        if log_files.were_renamed():
            # SIGUSR1 came before this process had its handler.
            self.worker.handle_usr1(signal.SIGUSR1, None)
        with self.boot_step():
            self.boot.step("importing the app")
            self.adapter.before_load()
            self._load()
            self.boot.step("starting up (lifespan, post_worker_init)")

    @contextlib.contextmanager
    def boot_step(self) -> Iterator[None]:
        """Have what a step of the boot raises stand on the board and in the log, for the operator of an upgrade."""
        try:
            yield
        except BaseException as error:
            if os.getpid() == self.pid:
                self._boot_failed(error)
            raise

    def _note_step(self, what: str) -> None:
        if not self.boot_has_failed and os.getpid() == self.pid:
            self.slot.error = what

    def _boot_failed(self, error: BaseException) -> None:
        self.boot_has_failed = True
        self.boot.over()
        self.slot.error = f"{type(error).__name__}: {error}"
        if self.boot_log is not None and isinstance(error, (SystemExit, AppImportError)):
            # gunicorn logs these at debug only, or not at all (arbiter.py:754-757); the others it logs itself.
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
        """Warm up and wait for the gate, where the worker class does so; called after the app was loaded."""
        with self.boot_step():
            self.settings = settings_sources.apply_app_settings(self.settings)
            checks.load(self.settings.checks)
        if not self.settings.log_probes:
            access_log.leave_probes_out(self.worker.log)
        watch.start()
        self.adapter.stand_at_gate()

    def pass_checks(self, beat: Callable[[], None], loop: Any = None) -> None:
        """Wait until the app's own checks pass; meanwhile the board says which one does not.

        `loop` is the event loop in which async checks are to run.
        """

        self._checks = self.process.checks_runner(loop)
        names = ", ".join(state.check.name for state in self._checks.states if state.check.critical)
        step = f"waiting for its checks ({names})" if names else "starting its checks"
        self.boot.step(step)

        def say(why: str) -> None:
            self.slot.error = why or step

        checks.pass_all(self._checks, beat, say)

    def arrive_at_gate(self) -> None:
        """Say that this worker is ready. Ends one that is not wanted any more."""
        self._at_gate = True
        self.boot.over()
        if not self.worker.alive or self._left or self.slot.retire:
            sys.exit(0)
        self.process.set_state(WorkerState.READY)

    def pass_gate(self) -> None:
        """Say that this worker serves, now that the gate is open."""
        self._at_gate = False
        if self.boot_log is not None:
            self.boot_log.end()
            self.boot_log = None
        self.gate.leave()
        self.process.set_state(WorkerState.SERVING)
        if self._checks is not None:
            self._checks.start()
        # From here on requests may be in hand: the master's death means "finish and go".
        if not proc.die_with_parent(signal.SIGTERM, self.worker.ppid):
            self.handle_exit(signal.SIGTERM, None)

    # -- the way out

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM."""
        if self._at_gate:
            sys.exit(0)
        if self._emptying and self._has_emptied():
            # Said again, to a sync worker in the middle of a request: it holds a queue that nobody waits in.
            self._emptying = False
            self.leave()
        if self._emptying:
            # One that has lost the last connection to another worker sleeps.
            self.adapter.wake()
        if self._left:
            # A stop that came after this worker was told to leave has brought a deadline.
            self._watch_deadline()
        if self._left or self._emptying:
            return
        phase = Phase(self.board.header.phase)
        if self.slot.retire or phase in WORKERS_LEAVE or os.getppid() != self.worker.ppid:
            if self.slot.state == WorkerState.BOOTING:
                # It has promised nothing yet, and may hang.
                os._exit(0)
            header = self.board.header
            nobody_after = phase is Phase.DRAINING and not header.successor_pid
            shut = header.blocked_since and any(
                header.listener(index).door in SHUT for index in self.listeners.values()
            )
            if nobody_after or shut:
                # Nobody comes after: what has been accepted by the kernel for us is ours to answer.
                self._emptying = True
                self.worker.notify = self.notify
                self.adapter.wake()
                self.adapter.later(SETTLE, self.adapter.wake)
                self.adapter.call_stop_hooks()
            else:
                self.leave()
        elif self._signalled_at and time.monotonic() - self._signalled_at >= PATIENCE:
            self._signalled_at = 0.0
            if phase is not Phase.LAME_DUCK:
                self.leave()
        elif not self._signalled_at:
            self._signalled_at = time.monotonic()
            self.adapter.later(PATIENCE, os.kill, os.getpid(), signal.SIGTERM)

    def follow_orders(self) -> None:
        """Do as the board says, between two turns of the loop: SIGTERM may not have reached this worker."""
        if self._left:
            self._watch_deadline()
        elif not self._emptying:
            self.handle_exit(signal.SIGTERM, None)

    def note_deadline(self) -> None:
        """Have what is in hand named at the deadline, in a worker that is in the middle of a request."""
        self._watch_deadline()

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGQUIT, SIGINT: end now, with what is in hand."""
        self.note_leaving()
        self._end_now(self.worker.cfg.worker_int, 0)

    def handle_abort(self, sig: int, frame: Any) -> None:
        """SIGABRT: the master missed this worker's heartbeat (`timeout`)."""
        # A worker that has not served yet has failed to boot, which the master sees by its state.
        if self.slot.state == WorkerState.SERVING:
            self.note_leaving()
        self._end_now(self.worker.cfg.worker_abort, 1)

    def _end_now(self, hook: Callable[[Any], None], status: int) -> None:
        # Not gunicorn's own for gthread: it takes the pool's lock inside a signal handler (gthread.py:313), and Python
        # joins the pool's threads at exit.
        self._status_now = status
        self.worker.alive = False
        self.worker.cfg.set("graceful_timeout", 0)
        hook(self.worker)
        self.adapter.end_now(status)

    def notify(self) -> None:
        """Beat, and between two turns of a leaving worker's loop have emptying and winding down come to their end."""
        self.turn()
        if self._emptying and self._has_emptied():
            self._emptying = False
            self.leave()
        if self._wind_down is not None:
            over = self._wind_down.over()
            self.accepts_no_more()
            if over:
                self._wind_down = None
                self._end_loop()

    def _has_emptied(self) -> bool:
        header = self.board.header
        if clock.passed(header.deadline):
            return True
        if not self.kept.is_exchange_empty():
            return False
        if not header.blocked_since:
            return accept_queue.is_empty(self.worker.sockets)
        return all(_is_emptied(fd, header.listener(index)) for fd, index in self.listeners.items())

    def leave(self) -> None:
        """Have the worker finish what it has and end its loop."""
        self._left = self.process.going = True
        self._wind_down = self.adapter.leaving()
        if self._wind_down is not None:
            self.worker.notify = self.notify
        else:
            self._end_loop()
        # Last: the app's hooks may take their time.
        self.adapter.call_stop_hooks()

    @property
    def is_finishing(self) -> bool:
        """Whether this worker is on its way out, and its next turn is worth something."""
        return self._emptying or self._wind_down is not None

    def _end_loop(self) -> None:
        # What is left of the deadline, and not `graceful_timeout`.
        left = clock.remaining(self.process.deadline_ns)
        compat.set_graceful_timeout(self.worker, NO_LIMIT if left is None else left)
        self._watch_deadline()
        self.adapter.end_loop()

    def _watch_deadline(self) -> None:
        deadline = self.process.deadline_ns
        left = clock.remaining(deadline)
        # A stop brings an earlier one than a retirement had.
        if left is not None and (not self._watched_deadline or deadline < self._watched_deadline):
            self._watched_deadline = deadline
            self.adapter.later(left + 0.02, self._at_the_deadline)

    def accepts_no_more(self) -> None:
        """Say so, and close this worker's listeners: a queue that somebody still holds is not refused but waits."""
        self.note_leaving()
        for listener in self.worker.sockets:
            listener.close()

    def note_leaving(self) -> None:
        """Say on the board that this worker accepts nothing more: the master may replace it, an upgrade may be done."""
        if self.slot.state != WorkerState.LEAVING:
            self.process.set_state(WorkerState.LEAVING)

    def run(self) -> None:
        """The worker's loop, then the wait for background work.

        Not in `worker_exit`: the heartbeat's file is closed by then (arbiter.py:772), and gunicorn would kill us.
        """
        self.adapter.run(self._run)
        if os.getpid() != self.pid:
            return  # the app forked, and the child has come back from the view
        self.loop_is_over = True
        # gthread's loop ends at the deadline, whatever its threads do.
        self.adapter.has_cut = self.adapter.has_cut or bool(self.slot.in_flight)
        if self._status_now is not None:
            sys.exit(self._status_now)
        self._left = self.process.going = True
        self.accepts_no_more()
        # The roster repeats it each second.
        app_forks.ignore(signal.SIGTERM)
        watch.end()
        # Where the loop has ended by itself, because the master is gone.
        waitgroup.run_stop_hooks()
        self._finish_background()
        self._finish_threads()

    def _finish_background(self) -> None:
        # The second time for what slipped in before the groups were closed.
        for close in (waitgroup.close_all, lambda: None):
            while not self.background_is_over():
                self._beat()
                left = clock.remaining(self._background_deadline(self._background_own))
                for entry in waitgroup.all_entries()[:1]:
                    entry.group.wait(timeout=0.1 if left is None else min(0.1, left))
            close()
        self.give_up_background()
        self._run_drained_hooks()

    def give_up_background(self) -> None:
        """Name what is left of the background work, once: in an event loop before its end, which cancels tasks."""
        if not self._give_up_once.acquire(blocking=False):
            return
        waitgroup.close_all()
        # Threads that compute would each keep the interpreter for 5 ms whenever this one has written a line.
        sys.setswitchinterval(LAST_SWITCH_INTERVAL)
        timeout = GIVE_UP_SHARE * self.settings.stop_budget().abandon_window
        waitgroup.abandon(waitgroup.all_entries(), timeout, self._beat, self._count_abandoned)

    def _at_the_deadline(self) -> None:
        # In a thread of its own: the loop is still in a request, and what runs beside it shall not be killed without
        # a word.
        if self.loop_is_over or os.getpid() != self.pid:
            return
        if not clock.passed(self._background_deadline(clock.now_ns())):
            self._watched_deadline = clock.NEVER
            self._watch_deadline()
            return
        self.adapter.cut()
        self.give_up_background()

    def stop_counting(self) -> None:
        """Leave what is in hand in the count: it is cut off, and not finished."""
        self._count_out = lambda: 0

    def _count_abandoned(self, tasks: int) -> None:
        # Before anything of the app's is called, which may end the process.
        self.slot.abandoned += tasks

    def _run_drained_hooks(self) -> None:
        deadline, abandon_window = self.process.deadline_ns, self.settings.stop_budget().abandon_window
        until = None if deadline == clock.NEVER else deadline / 1e9 + 0.8 * abandon_window
        waitgroup.run_drained_hooks(until, self._beat)

    def background_is_over(self) -> bool:
        """Tell whether no background work is left, or what is left is given up; say once what is waited for."""
        entries = waitgroup.all_entries()
        if not entries or self._give_up_once.locked():
            return True
        if not self._background_own:
            self._background_own = clock.after_ns(self.settings.recycle_timeout)
            log.emit("background.waiting", pid=os.getpid(), tasks=len(entries))
        return clock.passed(self._background_deadline(self._background_own))

    def _background_deadline(self, own: int) -> int:
        """When background work is given up: the stop's deadline, or this worker's own while the service goes on.

        A retiring generation has RETIRE_TIMEOUT until a stop brings a deadline; one whose master is gone has less.
        """
        if os.getppid() != self.worker.ppid:
            return own
        if self.board.header.phase in (Phase.RETIRING, Phase.DRAINING):
            return self.board.header.deadline or self.slot.retire_deadline
        return self.slot.retire_deadline or own

    def _finish_threads(self) -> None:
        threads = process_exit.wait(self.threads_left, self.threads_deadline, self._beat)
        self._threads_cut = bool(threads)
        process_exit.name(threads, self.adapter.frames)
        self._last_beat = compat.lasting_heartbeat(self.worker)

    def threads_left(self, *, pools_only: bool = False) -> list[threading.Thread]:
        """Return the app's threads that Python would wait for, those aside that work on what is counted elsewhere."""
        tracked = {entry.thread_id for entry in waitgroup.all_entries()}
        threads = process_exit.waited_for(self.adapter.own_threads(), self.adapter.frames, pools_only=pools_only)
        return [thread for thread in threads if thread.ident not in tracked]

    def threads_deadline(self) -> int:
        """When threads are left behind: at the stop's deadline, and after RECYCLE_TIMEOUT while the service goes on.

        Not when background work is: most of these threads have no end of their own, and a generation that retires would
        stay, with its consumers at work, for as long as it may.
        """
        if not self._threads_own:
            self._threads_own = clock.after_ns(self.settings.recycle_timeout)
        if os.getppid() != self.worker.ppid:
            return self._threads_own
        header = self.board.header
        if header.phase == Phase.DRAINING:
            return header.deadline or self._threads_own
        return process_exit.earlier(header.deadline, self.slot.retire_deadline, self._threads_own)

    def exit(self) -> None:
        """The last word of the process, after everybody's `worker_exit`."""
        if self._status_now is not None:
            process_exit.end(self._status_now)
        if self.slot.abandoned or self.adapter.has_cut:
            # Python would wait for the threads of the abandoned work.
            process_exit.end(1)
        status = process_exit.status_under_way()
        if self._threads_cut or (not self.loop_is_over and process_exit.waited_for(frames=self.adapter.frames)):
            # Before its loop it has promised nothing; after it, threads have had their time.
            process_exit.end(status)
        process_exit.bound(self.threads_deadline(), self._last_beat, status, self.adapter.interval)

    # -- requests

    def request_started(self, worker: Any, request: Any) -> None:
        """Count a request in."""
        self._count_in()
        waitgroup.current_request.set(request)
        # Probes are sent to the end, by those that act on them.
        if self._words[_PHASE] in STOPPING and not self._is_probe(request):
            by = clock.now_ns() - self.board.header.stop_since
            self._late.count(request, by, is_new=self.adapter.is_on_new_connection(request))

    def _is_probe(self, request: Any) -> bool:
        # At the end: an app may be mounted somewhere.
        path: str = request.path
        return path.endswith(tuple(table(self.settings, checks.kinds())))

    def count_server_error(self, request: Any) -> None:
        """Count a reply with a status of 500 or more; that of a probe is its proper answer."""
        if not self._is_probe(request):
            with self._seldom_lock:
                self.slot.server_errors += 1

    def request_finished(self, worker: Any, request: Any, environ: Any, response: Any) -> None:
        """Count a request out, and ask to be replaced at `max_requests`."""
        if self._count_out() >= self._limit and not self.slot.recycle_requested:
            self.slot.recycle_requested = 1
            log.emit("worker.recycled", pid=os.getpid(), requests=self.slot.requests)
        # Where the app has raised before it had a status there is none, or no such attribute, and gunicorn answers 500.
        if response is not None and (getattr(response, "status_code", None) or 500) >= 500:
            self.count_server_error(request)


def _is_emptied(fd: int, listener: ListenerRecord) -> bool:
    """Tell whether nobody waits in a listener's queue, and nobody is on the way into it."""
    door, since = listener.door, clock.since(listener.blocked_since)
    if door not in SHUT or (door == Admission.LIMITED and since >= NARROW_AT_MOST):
        return True
    # With the door closed, those whose handshake was under way are still to come.
    if since < SETTLE or (door == Admission.STEERED and not listener.settled):
        return False
    return accept_queue.is_empty([fd])


_PHASE = Header.phase.index
