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
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zdd_web.cli.rehearse.report import Sample

#: Fewer replies show nothing about whether a body is stable.
STABLE_FROM = 10

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


@dataclass(frozen=True)
class _Before:
    """What a path answered before the first upgrade. None: that was not stable, or too little is known."""

    classes: frozenset[int]
    never_empty: bool
    length: int | None
    digest: str | None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> _Before:
        lengths, digests = {s.length for s in samples}, {s.digest for s in samples}
        enough = len(samples) >= STABLE_FROM
        return cls(
            classes=frozenset(_class(s) for s in samples),
            never_empty=enough and all(lengths),
            length=next(iter(lengths)) if enough and len(lengths) == 1 else None,
            digest=next(iter(digests)) if enough and len(digests) == 1 else None,
        )

    def differs(self, sample: Sample) -> str:
        """Return in what a reply differs; "" for nothing."""
        if _class(sample) not in self.classes:
            return f"status {sample.status}, before {' or '.join(f'{each}xx' for each in sorted(self.classes))}"
        if self.never_empty and not sample.length:
            return "an empty body, before none"
        if self.length is not None and sample.length != self.length:
            return f"a body of {sample.length} bytes, before {self.length} (digits left out)"
        if self.digest is not None and sample.digest != self.digest:
            return "another body of the same length as before"
        return ""


def compare(samples: Iterable[Sample], until: float) -> tuple[Difference, ...]:
    """Compare complete replies below 500 with those of the same path that had arrived by `until`, monotonic seconds."""
    before: dict[str, list[Sample]] = defaultdict(list)
    after: list[Sample] = []
    for sample in samples:
        if sample.outcome.answered and not sample.outcome.lost:
            if sample.ended < until:
                before[sample.path].append(sample)
            else:
                after.append(sample)
    known = {path: _Before.of(found) for path, found in before.items()}
    counts: Counter[tuple[str, int | None, str]] = Counter()
    for sample in after:
        what = known[sample.path].differs(sample) if sample.path in known else ""
        if what:
            counts[sample.path, sample.generation, what] += 1
    return tuple(Difference(*key, count) for key, count in counts.most_common())


def _class(sample: Sample) -> int:
    return (sample.status or 0) // 100
