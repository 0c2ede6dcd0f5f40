"""Late arrivals: requests that come after a stop has begun, from a load balancer that does not know of it yet.

Only new connections show what a load balancer does. A connection that was open before the stop brings one more request,
whose reply closes it: how late in the lame duck that is means nothing. Workers count on their slots, and `remedy()`
decides what the stop's last line recommends.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from zdd_web.board import Slot

#: New connections in the last part of a lame duck mean that others came after it. Load balancers need at least five
#: seconds: a shorter lame duck cannot distinguish a slow one from one that ignores probes.
LATE_FRACTION, LEAST_DELAY = 0.8, 5

#: Fewer new connections do not show a rate.
RATE_FROM = 8

QUARTERS = 4


class LateCounter:
    """Counts the late arrivals of one worker on its slot, from any thread."""

    def __init__(self, slot: Slot, drain_delay: float, trusted: Sequence[str]) -> None:
        self._slot, self._drain_delay, self._trusted = slot, drain_delay, trusted
        self._lock = threading.Lock()

    def count(self, request: Any, by_ns: int, *, is_new: bool) -> None:
        """Count a request that came `by_ns` nanoseconds after the stop had begun."""
        slot = self._slot
        with self._lock:
            slot.late += 1
            slot.late_by = max(slot.late_by, by_ns)
            if is_new:
                slot.count_late_quarter(quarter(by_ns / 1e9, self._drain_delay))
                slot.late_new_by = max(slot.late_new_by, by_ns)
            # A new connection comes from the load balancer that must be changed. Others count only if there is none.
            if is_new or not slot.late_new_by:
                slot.late_peer = sender(request.peer_addr, _forwarded_for(request.headers), self._trusted)


def quarter(by: float, drain_delay: float) -> int:
    """Return which quarter of the lame duck, from 0, is `by` seconds after its begin; what comes later is in the last.

    >>> quarter(2.4, drain_delay=10), quarter(9.9, drain_delay=10), quarter(12, drain_delay=10), quarter(0.1, 0)
    (0, 3, 3, 3)
    """
    return min(QUARTERS - 1, int(by * QUARTERS / drain_delay)) if drain_delay else QUARTERS - 1


def sender(peer: object, forwarded_for: str, trusted: Sequence[str]) -> str:
    """Return the sender of a request: the peer or, where gunicorn trusts that, the last address that it was sent from.

    `trusted` is gunicorn's `forwarded_allow_ips`. "*" trusts every peer, but no address that a header names: a client
    can send such a header itself. Peers on Unix sockets are always trusted, as in gunicorn.

    >>> sender(("10.1.4.7", 41234), "192.0.2.1, 10.0.0.9", trusted=["127.0.0.1"])
    '10.1.4.7:41234'
    >>> sender(("127.0.0.1", 41234), "192.0.2.1, 10.0.0.9", trusted=["127.0.0.1"])
    '10.0.0.9'
    >>> sender(("127.0.0.1", 41234), "192.0.2.1, 10.0.0.9", trusted=["127.0.0.1", "10.0.0.0/8"])
    '192.0.2.1'
    """
    address = str(peer or "unix")
    if isinstance(peer, tuple):
        # uvicorn puts the forwarded address there itself, with port 0.
        address = ":".join(str(part) for part in peer[:2] if part != 0)
        if "*" not in trusted and not _is_trusted(str(peer[0]), trusted):
            return address
    hops = [hop.strip() for hop in forwarded_for.split(",") if hop.strip()]
    for hop in reversed(hops):
        if not _is_trusted(hop, trusted):
            return hop
    return hops[0] if hops else address


def _is_trusted(address: str, trusted: Sequence[str]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    for each in trusted:
        try:
            if parsed in ipaddress.ip_network(each, strict=False):
                return True
        except ValueError:  # "*"
            continue
    return False


def _forwarded_for(headers: Iterable[tuple[str | bytes, str | bytes]]) -> str:
    """Return the header of that name, of a WSGI request of gunicorn's or of an ASGI scope."""
    values = []
    for name, value in headers:
        text = name.decode("latin-1") if isinstance(name, bytes) else name
        if text.upper() == "X-FORWARDED-FOR":
            values.append(value.decode("latin-1") if isinstance(value, bytes) else value)
    return ",".join(values)


class LateCounts(Protocol):
    """What one worker has counted, as its slot shows it; times are seconds after the begin of the stop."""

    @property
    def late(self) -> int:
        """How many requests came late."""

    @property
    def late_by(self) -> float:
        """When the last of them came."""

    @property
    def late_peer(self) -> str:
        """Where the last one on a new connection came from; the last one at all where none was new."""

    @property
    def late_quarters(self) -> tuple[int, ...]:
        """How many came on new connections, by quarter of the lame duck."""

    @property
    def late_new_by(self) -> float:
        """When the last one on a new connection came; 0 where none was new."""


@dataclass
class LateArrivals:
    """The late arrivals of a generation: how many requests, and how many of them on new connections.

    `by` and `new_by` are seconds after the begin of the stop, of the last of them; `quarters` counts new connections
    by quarter of the lame duck.

    >>> late = LateArrivals(count=3, by=2.2, peer="10.0.0.7:51234", quarters=(0, 0, 0, 2), new_by=2.1)
    >>> late.fields(drain_delay=2, grace_period=30, cut=0)["remedy"]
    'DRAIN_DELAY = 5, GRACE_PERIOD = 33'
    >>> late.fields(drain_delay=10, grace_period=30, cut=0)
    {'late': 3, 'late_by': 2.2, 'late_peer': '10.0.0.7:51234', 'late_new': 2, 'late_new_by': 2.1}
    """

    count: int = 0
    by: float = 0.0
    peer: str = ""
    quarters: tuple[int, ...] = (0,) * QUARTERS
    new_by: float = 0.0

    @property
    def new(self) -> int:
        """How many came on new connections."""
        return sum(self.quarters)

    def add(self, gone: LateCounts) -> None:
        """Add those of a worker that has ended."""
        self.count += gone.late
        # Of the last new connection; of the last one at all where none was new.
        if (gone.late_new_by, gone.late_by) > (self.new_by, 0.0 if gone.late_new_by else self.by):
            self.peer = gone.late_peer
        self.by, self.new_by = max(self.by, gone.late_by), max(self.new_by, gone.late_new_by)
        self.quarters = tuple(map(sum, zip(self.quarters, gone.late_quarters, strict=True)))

    def fields(self, drain_delay: float, grace_period: float, cut: int) -> dict[str, Any]:
        """Return what the stop's last line says; `cut` is the number of requests that were cut off at its deadline."""
        if not self.count:
            return {}
        said: dict[str, Any] = {"late": self.count, "late_by": self.by, "late_peer": self.peer, "late_new": self.new}
        if self.new:
            said["late_new_by"] = self.new_by
        if advice := remedy(self, drain_delay, grace_period, cut):
            said["remedy"] = advice
        return said


def remedy(late: LateArrivals, drain_delay: float, grace_period: float, cut: int) -> str:
    """Return what to change; "" where arrivals had ended before the lame duck did and nothing was cut off.

    Connections that came after the door had closed are not seen: the last ones that are stand for them.
    """
    reaches_the_end = late.new > 0 and late.new_by > drain_delay * LATE_FRACTION
    if not reaches_the_end and not cut:
        return ""
    # The time that the requests in hand had was not enough.
    work = grace_period if cut else 0.0
    if reaches_the_end and is_even(late.quarters, drain_delay):
        said = (
            f"new connections came at an even rate to the end: the sender ignores /readyz, or takes longer than "
            f"DRAIN_DELAY = {drain_delay:g} to act on it. Have it check /readyz, or remove this instance from it "
            f"before the stop; if it ignores /readyz, a longer DRAIN_DELAY changes nothing"
        )
        return f"{said}. For what was cut off: GRACE_PERIOD = {math.ceil(grace_period + work)}" if cut else said
    delay = drain_delay
    if reaches_the_end:
        # More than was seen: twice as much is a guess with a margin.
        delay = max(LEAST_DELAY, math.ceil(2 * late.new_by))
    # The lame duck takes its time from GRACE_PERIOD.
    return f"DRAIN_DELAY = {delay:g}, GRACE_PERIOD = {math.ceil(grace_period + work + delay - drain_delay)}"


def is_even(quarters: Sequence[int], drain_delay: float) -> bool:
    """Tell whether new connections kept coming through the whole lame duck, in its last quarter as well.

    A load balancer that acts on `/readyz` stops; several of them, or one that is slow, thin out.

    >>> is_even((12, 9, 11, 10), drain_delay=10), is_even((12, 9, 11, 1), drain_delay=10)
    (True, False)
    """
    *before, last = quarters
    enough = drain_delay >= LEAST_DELAY and sum(quarters) >= RATE_FROM and all(quarters)
    return enough and last * 2 >= sum(before) / len(before)


def level(said: Mapping[str, object]) -> int:
    """Return the level of the line with these fields: a WARNING where something is to be changed."""
    return logging.WARNING if "remedy" in said else logging.INFO
