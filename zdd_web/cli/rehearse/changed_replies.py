"""Replies that are not what the first generation answered before the first upgrade.

A new generation that answers 404 to everything, or an empty page, loses no request: each has a complete reply. So each
reply is compared with those that the same path had before: always its class of status (2xx, 3xx, 4xx), and its body as
far as that was stable: to the byte, or in length. Digits are left out of both, since a reply may name the process, the
generation or the time. What varies otherwise, such as a token, makes a body unstable: of such a body it is known only
that it was never empty.

Pure, as report.py.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from zdd_web.cli.rehearse.samples import Sample

#: Fewer replies show nothing about whether a body is stable.
STABLE_FROM = 10

#: Ways to differ that are counted apart.
MOST_WAYS = 1000

_DIGITS = b"0123456789"


class Body:
    """What is kept of a body: its length and a digest, both without digits."""

    def __init__(self) -> None:
        self.length = 0
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, data: bytes | bytearray) -> None:
        """Take the next bytes of the body."""
        data = data.translate(None, _DIGITS)
        self.length += len(data)
        self._hash.update(data)

    @property
    def digest(self) -> str:
        """The digest of what was taken so far."""
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Difference:
    """Replies that differ in one way from those before the first upgrade; `generation` is None where unknown."""

    path: str
    generation: int | None
    what: str
    count: int


class _Before:
    """What a path answered before the first upgrade, as far as it was stable over `STABLE_FROM` replies or more."""

    def __init__(self) -> None:
        self.count = 0
        self.classes: set[int] = set()
        self._never_empty = True
        self._length, self._digest = 0, ""
        self._one_length = self._one_digest = True

    def add(self, sample: Sample) -> None:
        if not self.count:
            self._length, self._digest = sample.length, sample.digest
        self.count += 1
        self.classes.add(_class(sample))
        self._never_empty = self._never_empty and bool(sample.length)
        self._one_length = self._one_length and sample.length == self._length
        self._one_digest = self._one_digest and sample.digest == self._digest

    def differs(self, sample: Sample) -> str:
        """Return in what a reply differs; "" for nothing."""
        if _class(sample) not in self.classes:
            return f"status {sample.status}, before {' or '.join(f'{each}xx' for each in sorted(self.classes))}"
        if self.count < STABLE_FROM:
            return ""
        if self._never_empty and not sample.length:
            return "an empty body, before none"
        if self._one_length and sample.length != self._length:
            return f"a body of {sample.length} bytes, before {self._length} (digits left out)"
        if self._one_digest and sample.digest != self._digest:
            return "another body of the same length as before"
        return ""


class Comparison:
    """Compares replies as they come, in bounded memory: what came before `until` is the measure of what came after.

    `until` is in monotonic seconds, and infinite as long as nothing was upgraded; replies come in the order in which
    they ended.
    """

    def __init__(self, until: float = math.inf) -> None:
        self.until = until
        self._before: dict[tuple[str, str], _Before] = {}
        self._counts: Counter[tuple[str, int | None, str]] = Counter()

    def add(self, sample: Sample) -> None:
        """Take a complete reply below 500."""
        key = sample.method, sample.path
        before = self._before.get(key)
        if sample.ended < self.until:
            if before is None:
                before = self._before[key] = _Before()
            before.add(sample)
        elif before is not None and (what := before.differs(sample)):
            name = _named(sample), sample.generation, what
            if name not in self._counts and len(self._counts) >= MOST_WAYS:
                # A body that grows with each reply would be a way of its own each time.
                name = _named(sample), sample.generation, "in another way, one of too many to list"
            self._counts[name] += 1

    def differences(self) -> tuple[Difference, ...]:
        """Return what differed so far, the most frequent first."""
        return tuple(Difference(*key, count) for key, count in self._counts.most_common())


def compare(samples: Iterable[Sample], until: float) -> tuple[Difference, ...]:
    """Compare complete replies below 500 with those of the same path that had arrived by `until`, monotonic seconds."""
    comparison = Comparison(until)
    for sample in sorted(samples, key=lambda sample: sample.ended):
        if sample.outcome.answered and not sample.outcome.lost:
            comparison.add(sample)
    return comparison.differences()


def _named(sample: Sample) -> str:
    return sample.path if sample.method == "GET" else f"{sample.path} ({sample.method})"


def _class(sample: Sample) -> int:
    return (sample.status or 0) // 100
