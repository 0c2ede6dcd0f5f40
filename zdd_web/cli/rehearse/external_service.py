"""A service that the rehearsal did not start: load on a URL while any command deploys it."""

from __future__ import annotations

import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from urllib.parse import urlsplit

from zdd_web.cli.rehearse import report
from zdd_web.cli.rehearse.rehearsal import Plan
from zdd_web.cli.rehearse.report import Report
from zdd_web.cli.rehearse.samples import ScenarioResult
from zdd_web.cli.rehearse.tally import Tally
from zdd_web.system import escaping, masking

#: How long an interrupted command may take to end, seconds.
ENDS_WITHIN = 10.0

#: How often it is looked whether a signal has come while a command runs, seconds.
LOOK = 0.5

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """Where the load goes; `path` is what the URL names, and with `tls` it is https."""

    host: str
    port: int
    path: str
    tls: bool = False


def address_of(url: str) -> Address:
    """Return what a URL names. Raises ValueError.

    >>> address_of("http://127.0.0.1:8080/items?page=2")
    Address(host='127.0.0.1', port=8080, path='/items?page=2', tls=False)
    >>> address_of("https://shop.example")
    Address(host='shop.example', port=443, path='/', tls=True)
    """
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError(f"--url {url}: not a URL such as http://127.0.0.1:8000/ or https://shop.example/")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.hostname, parts.port or _PORTS[parts.scheme], path, parts.scheme == "https")


def measure(address: Address, command: str | None, plan: Plan, tls: ssl.SSLContext | None = None) -> Report:
    """Send load, run the command amid it, and report; after a KeyboardInterrupt, on what was measured until then.

    Raises OSError when the address cannot be resolved.
    """
    tally = Tally()
    load = plan.load(address.host, address.port, tally, tls)
    found: list[ScenarioResult] = []
    interrupted = ""
    half = plan.settle if command is None else max(plan.settle, plan.duration / 2)
    try:
        with load:
            try:
                time.sleep(half)
                if command is not None:
                    found.append(_run(command, tally, half))
            except KeyboardInterrupt:
                load.stop(at_once=True)
                raise
    except KeyboardInterrupt as error:
        interrupted = f"by {error or 'Ctrl-C'}"
    return report.of(tally, stop=None, scenarios=found, generator=load.health(), interrupted=interrupted)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Have SIGINT and SIGTERM wait: an exception inside of Popen would leave a process that nothing can end."""
    came: list[tuple[int, FrameType | None]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *signalled: came.append(signalled)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for signalled in came:
        handler = before[signal.Signals(signalled[0])]
        if callable(handler):
            handler(*signalled)


def _status_of(process: subprocess.Popen[bytes]) -> int:
    while True:
        # With a limit: a signal that comes after Python's look for signals and before waitpid() interrupts neither.
        with suppress(subprocess.TimeoutExpired):
            return process.wait(LOOK)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run(command: str, tally: Tally, settle: float) -> ScenarioResult:
    requests, lost = tally.totals()
    begun_at = time.monotonic()
    tally.changes_at(begun_at)
    process: subprocess.Popen[bytes] | None = None
    try:
        with _interrupts_deferred():
            # What it prints is not the report: that may be JSON, for a program.
            process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=2)
        status = _status_of(process)
    except KeyboardInterrupt:
        if process is not None:
            _end(process)
        raise
    ended_at = time.monotonic()
    time.sleep(settle)
    requests_after, lost_after = tally.totals()
    return ScenarioResult(
        name="command",
        begun_at=begun_at,
        ended_at=ended_at,
        ok=status == 0,
        detail=escaping.printable(masking.urls(command), keep=""),
        reason="" if status == 0 else f"it ended with status {status}",
        requests=requests_after - requests,
        lost=lost_after - lost,
    )
