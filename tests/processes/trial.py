"""An upgrade that goes wrong under load, and the promises that hold all the same.

The old generation serves, no answer of the new one was seen before it was ready, one log line and the command say why,
no process is left, the pid file is true, and the next upgrade with good code works:

    with on_trial(service) as trial:
        trial.fails("the reason")
        trial.cost_nothing()
        trial.recovers()
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from tests.processes.harness import Service, answered_from, generations_of, successor, until, zombies
from zdd_web.board import WorkerState
from zdd_web.cli.rehearse.load import LoadThread
from zdd_web.lifecycle import Phase

#: Long enough to inject something in the commit window on a machine that is busy with other tests.
WIDE_COMMIT_WINDOW = "import os\nos.environ['ZDD_WEB_COMMIT_WINDOW'] = '3'\n"

#: A statement for `deploy` that has all workers but one hang.
HANG_SECOND = "try:\n    os.mkdir('first')\nexcept FileExistsError:\n    time.sleep(600)"


def configure(service: Service, before: str = "", **settings: object) -> Service:
    """Write the configuration, with the generation in every answer, and `before` install()."""
    return service.configure(before, **{"generation_header": "X-Zdd-Generation", **settings})


@contextlib.contextmanager
def on_trial(service: Service, clients: int = 6, *, status: int | None = 0, may_lose: bool = False) -> Iterator[Trial]:
    """Load on a started service, of which nothing is lost; then it is stopped, and nothing is left of it.

    In an upgrade that fails the old generation is not touched: what matters is that a request comes in each moment of
    it.
    """
    with service.under_load(clients, may_lose=may_lose) as load:
        yield Trial(service, load)
    ends_without_a_trace(service, status)


class Trial:
    """A service under load, an upgrade that goes wrong, and the promises that hold all the same."""

    def __init__(self, service: Service, load: LoadThread) -> None:
        self.service, self.load = service, load
        self.master = service.pid
        self.generation = service.snapshot().generation
        self._pool = ThreadPoolExecutor(1)
        self._command: Future[subprocess.CompletedProcess[str]] | None = None
        #: How often an upgrade has failed, by the event that says so.
        self._failures: Counter[str] = Counter()

    def begin(self) -> int:
        """Run `zdd-web upgrade` beside the test; return the new master's pid once it is forked."""
        self._run()
        return successor(self.service)

    def _run(self) -> Future[subprocess.CompletedProcess[str]]:
        if self._command is None:
            self._command = self._pool.submit(self.service.run, "upgrade", "--name", self.service.name)
        return self._command

    def fails(self, *reasons: str, event: str = r"event=upgrade\.failed", shows: tuple[str, ...] = ()) -> None:
        """Let the command end; it must have failed with all `reasons`, in one log line and on stderr."""
        done = self._run().result()
        self._command = None
        assert done.returncode == 1, (done.stdout, done.stderr, self.service.log())
        lines = self.service.matches(event)
        self._failures[event] += 1
        assert len(lines) == self._failures[event], self.service.log()
        for reason in reasons:
            assert re.search(reason, lines[-1]), lines[-1]
            assert re.search(reason, done.stderr), done.stderr
        for text in shows:
            assert text in done.stderr, done.stderr

    def answers(self, count: int = 50) -> None:
        """Wait for that many more answers."""
        answered_from(self.load, count)

    def is_back(self) -> None:
        """The old master is in office with its workers, and they are all that runs."""
        self.service.until_alone()
        assert self.service.pid == self.master, self.service.log()
        assert self.service.snapshot().phase is Phase.SERVING

    def is_unharmed(self) -> None:
        """The old generation is in office, whole, alone, and the pid file says so."""
        service = self.service
        self.is_back()
        until("no zombie", lambda: not zombies(self.master), service)
        assert [worker.state for worker in service.snapshot().workers] == [WorkerState.SERVING] * service.workers
        assert service.pid_file.read_text() == f"{self.master}\n"
        assert sorted(service.pid_file.parent.glob(".*.zdd_web")) == []

    def cost_nothing(self) -> None:
        """The old generation has answered everything and goes on to, unharmed."""
        self.answers()
        self.is_unharmed()
        assert generations_of(self.load) == {self.generation}

    def recovers(self) -> None:
        """Good code is taken over by the very next upgrade."""
        self.service.deploy("good")
        takes_over(self.service, self.generation + 1)


def takes_over(service: Service, generation: int, version: str = "good") -> None:
    done = service.run("upgrade", "--name", service.name)
    assert done.returncode == 0, (done.stdout, done.stderr, service.log())
    reply = service.get()
    assert (reply.version, reply.generation) == (version, generation)
    assert service.snapshot().phase is Phase.SERVING
    until("the pid file", lambda: service.pid_file.read_text() == f"{service.pid}\n", service)


def ends_without_a_trace(service: Service, status: int | None = 0) -> None:
    service.stop(status=status)
    service.leaves_no_trace()


class HeldBy:
    """A request that one certain generation has in hand until the test lets it go."""

    def __init__(self, service: Service, generation: int) -> None:
        self._service, self._pool = service, ThreadPoolExecutor(1)
        # Where two generations accept, chance decides which takes it: let the wrong one answer, and try again.
        for _ in range(200):
            self._key = service.directory / f"hold-{uuid.uuid4().hex[:12]}"
            self._reply = self._pool.submit(service.get, f"/hold?{self._key.name}")
            taker = until("a taker", self._taker, service)
            if taker == generation:
                return
            self.release()
        raise AssertionError(f"generation {generation} takes no request\n{service.log()}")

    def _taker(self) -> int | None:
        taken = list(self._key.parent.glob(f"{self._key.name}.held-by-*"))
        return int(taken[0].name.rpartition("-")[2]) if taken else None

    def release(self) -> int:
        """Let it go, and return the generation that has answered."""
        self._key.touch()
        reply = self._reply.result()
        assert reply.status == 200
        return reply.generation


def at_gate(service: Service, master: int) -> int | None:
    """Return a worker of that master that is ready and waits for the others."""
    workers = [w for each in service.generations() if each.pid == master for w in each.snapshot().workers]
    return next((w.pid for w in workers if w.state is WorkerState.READY), None)
