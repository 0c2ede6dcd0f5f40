"""The adapter of a worker class; this one is that of sync and gthread."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from zdd_web import waitgroup
from zdd_web.board import Heartbeat, Slot
from zdd_web.gunicorn.adapter import kept_gthread
from zdd_web.gunicorn.adapter.gthread import WindDown, stop_accepting
from zdd_web.gunicorn.workers.adapted_worker import AdaptedWorker
from zdd_web.gunicorn.workers.leaving import Leaving
from zdd_web.gunicorn.workers.warmup import warm_up
from zdd_web.settings import REQUEST_HEADER
from zdd_web.system import clock

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zdd_web.gunicorn.adapter.protocols import App, Handler, Method
    from zdd_web.gunicorn.workers.kept_connections import ConnectionStore

#: How long a kept connection may be idle in a worker that leaves, as in gunicorn's own gthread, seconds.
LINGER = WindDown.LINGER


def on_board(beat: Callable[[], None], slot: Slot) -> Callable[[], None]:
    """Return a heartbeat that probes see too. A closure, since a sync worker beats before each request."""
    words, at = slot.words, slot.base + Slot.beat_at.index

    def beat_on_board() -> None:
        beat()
        words[at] = clock.now_ns()

    return beat_on_board


#: More than any rehearsal counts to.
MOST_DIGITS = 20


class WorkerAdapter:
    """The adapter of one worker; made right after the fork, before `init_process()`."""

    #: Whether gunicorn's `pre_request` and `post_request` see every request.
    counts_by_hook = True

    #: Whether requests in hand were given up at the deadline.
    has_cut = False

    def __init__(self, runtime: AdaptedWorker) -> None:
        self.runtime, self.worker = runtime, runtime.worker
        #: The heartbeat, and nothing else: gunicorn's, and the board's.
        self.beat = on_board(runtime.worker.notify, runtime.slot)
        self._obey: Handler = runtime.worker.handle_exit

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats of a worker that waits."""
        return min(1.0, self.worker.timeout) if self.worker.timeout else 1.0

    def enter(self) -> None:
        """Replace what this class needs replaced on gunicorn's worker, after what all workers have."""
        slot, words = self.runtime.slot, self.runtime.slot.words
        slot.heartbeat = Heartbeat.ALWAYS if self.worker.beats_always else Heartbeat.BETWEEN_REQUESTS
        at, values = slot.base + Slot.heartbeat.index, (Heartbeat.BETWEEN_REQUESTS, Heartbeat.AFTER_CONNECTION)

        def connected(is_connected: bool) -> None:
            words[at] = values[is_connected]

        self.worker.beat_often(self.interval, connected)

    def before_load(self) -> None:
        """Called before the app is imported."""

    def stand_at_gate(self) -> None:
        """Warm up and wait for the gate; called when the app has been loaded."""
        runtime = self.runtime
        with runtime.boot_step() as step:
            header, generation = runtime.settings.generation_header, runtime.board.header.generation
            if header:
                self.worker.set_wsgi(_name_generation(self.worker.wsgi, header, generation))
            warm_up(self.worker.wsgi, runtime.settings.warmup, self.beat, step)
            runtime.pass_checks(self.beat)
        runtime.wait_at_gate(self.interval)

    def run(self, run: Callable[[], None]) -> None:
        """Run the worker's loop."""
        run()

    def wake(self) -> None:
        """Make the loop take a turn now; called from a signal handler, or by `later()`."""
        self.worker.wake()

    def later(self, seconds: float, function: Callable[..., object], *arguments: object) -> None:
        """Call a function from a signal handler, in a while."""
        timer = threading.Timer(seconds, function, arguments)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no thread to be had: the next turn of the loop sees to it
            timer.start()

    def call_stop_hooks(self) -> None:
        """Call what the app has given to `on_stop`: in a signal handler, or between two turns of the loop."""
        waitgroup.run_stop_hooks()

    def leaving(self) -> Leaving | None:
        """Return what is to be done before the loop is ended; None where gunicorn ends a loop as it should."""
        stop = functools.partial(stop_accepting, self.worker.raw)
        return self.runtime.kept.leaving(stop, self.worker.wind_down())

    def connection_store(self) -> ConnectionStore[Any] | None:
        """Return what knows this worker's kept connections; None where it keeps none, or they cannot travel."""
        return kept_gthread.store_for(self.worker.raw, self.runtime.kept)

    def end_loop(self) -> None:
        """Have the loop end, and `accepts_no_more()` called when nothing more is accepted."""
        self._obey(signal.SIGTERM, None)
        if not self.worker.tell_when_not_accepting(self.runtime.accepts_no_more) and self.runtime.slot.in_flight:
            # A sync worker looks at `alive` before it accepts again: one that has a request in hand has its last.
            self.worker.accept_nothing()
            self.runtime.accepts_no_more()
        self.wake()

    def is_on_new_connection(self, request: Any) -> bool:
        """Tell whether a request that came after a stop had begun is on a connection that did so too."""
        # A reply in a lame duck is a connection's last one: a later request is on one from before.
        first: bool = request.req_number == 1
        return first

    def in_a_child_of_the_app(self) -> None:
        """Called in a process that the app has forked, which has what this worker had in memory."""
        # A child that comes back from the view is in gunicorn's loop, and is to leave it.
        self.worker.end_loop()

    def cut(self) -> None:
        """Called at the deadline, if the loop is not over."""

    def own_threads(self) -> set[threading.Thread]:
        """Return the worker's threads, which are not the app's."""
        return self.worker.pool_threads()

    def frames(self) -> Mapping[int, FrameType]:
        """Return where each thread stands, by its `ident`."""
        return sys._current_frames()

    def end_now(self, status: int) -> NoReturn:
        """End the process from a signal handler, with what is in hand; `worker_exit` still runs."""
        sys.exit(status)


def request_number(value: str) -> str:
    """Return the number that a rehearsal has given a request, which its reply repeats; "" for anything else.

    >>> request_number("3000000017"), request_number("<script>")
    ('3000000017', '')
    """
    return value if value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS else ""


def _name_generation(app: App, header: str, generation: int) -> App:
    named = (header, str(generation))
    key = f"HTTP_{REQUEST_HEADER.upper().replace('-', '_')}"

    def with_generation(environ: Mapping[str, str], start_response: Method) -> Iterable[bytes]:
        number = request_number(environ.get(key, ""))
        ours = (named, (REQUEST_HEADER, number)) if number else (named,)

        def start(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> object:
            return start_response(status, [*headers, *ours], exc_info)

        body: Iterable[bytes] = app(environ, start)
        return body

    return with_generation
