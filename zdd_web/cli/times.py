"""When something happened, as people and programs read it: boards hold monotonic nanoseconds of this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime, timezone

#: Up to this age the time of day says enough, seconds.
A_DAY = 86_400.0


def duration(seconds: float) -> str:
    """Return how long something took or takes, in the largest two units.

    >>> duration(12.34), duration(754), duration(7_512), duration(190_000)
    ('12 s', '12 min 34 s', '2 h 5 min', '2 d 4 h')
    """
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < A_DAY:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


@dataclass(frozen=True)
class Now:
    """One instant, by both clocks: monotonic nanoseconds, and seconds since 1970.

    >>> now = Now(monotonic=10_000_000_000, wall=1_000_000_000.0)
    >>> now.age(4_000_000_000), now.iso(4_000_000_000), now.iso(0)
    ('6 s', '2001-09-09T01:46:34.000Z', None)
    """

    monotonic: int = field(default_factory=time.monotonic_ns)
    wall: float = field(default_factory=time.time)

    def seconds_since(self, at: int) -> float:
        """Return how long ago that was, seconds."""
        return max(0.0, (self.monotonic - at) / 1e9)

    def age(self, at: int) -> str:
        """Return how long ago that was, in words."""
        return duration(self.seconds_since(at))

    def clock(self, at: int) -> str:
        """Return the local time of day, with the date where it was more than a day ago."""
        then = datetime.fromtimestamp(self._wall(at)).astimezone()
        return then.strftime("%H:%M:%S" if self.seconds_since(at) < A_DAY else "%d %b %H:%M")

    def iso(self, at: int) -> str | None:
        """Return the time in UTC as ISO 8601 has it; None for 0, which is never."""
        if not at:
            return None
        then = datetime.fromtimestamp(self._wall(at), timezone.utc)
        return then.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _wall(self, at: int) -> float:
        return self.wall - (self.monotonic - at) / 1e9
