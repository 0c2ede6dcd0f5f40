"""What a load sends: requests by weight, as the command line has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: The body of an upload, bytes.
UPLOAD = 65_536

#: Weights are small, since `in_turn()` lists each request as often.
MOST_WEIGHT = 1000

_WEIGHTED = re.compile(r"(?P<weight>\d{1,9}):(?P<path>/.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Request:
    """One request; of a `stream` the reply may take any time, as long as it is not silent for the timeout."""

    path: str
    weight: int = 1
    method: str = "GET"
    body: bytes = b""
    stream: bool = False


def parse(text: str, *, upload: int | None = None, stream: bool = False) -> Request:
    """Return the request that `[WEIGHT:]PATH` means; with `upload`, a POST with a body of so many bytes.

    Raises ValueError.

    >>> parse("/search?q=a:b"), parse("9:/")
    (Request(path='/search?q=a:b', weight=1, method='GET', body=b'', stream=False), Request(path='/', weight=9, \
method='GET', body=b'', stream=False))
    """
    found = _WEIGHTED.fullmatch(text)
    weight, path = (int(found["weight"]), found["path"]) if found else (1, text)
    if not 1 <= weight <= MOST_WEIGHT:
        raise ValueError(f"weight {weight} in {text!r} must be from 1 to {MOST_WEIGHT}")
    if upload is None:
        return Request(path, weight, stream=stream)
    return Request(path, weight, "POST", bytes(n % 251 for n in range(upload)))


def in_turn(requests: Sequence[Request]) -> list[Request]:
    """Return a round in which each request comes as often as its weight says, spread evenly.

    >>> [each.path for each in in_turn([Request("/a", 2), Request("/b"), Request("/c")])]
    ['/a', '/b', '/c', '/a']
    """
    # As nginx spreads requests over weighted upstreams: the one that is most behind is next, and pays for it.
    total = sum(each.weight for each in requests)
    behind = [0] * len(requests)
    found = []
    for _ in range(total):
        for index, each in enumerate(requests):
            behind[index] += each.weight
        chosen = max(range(len(requests)), key=lambda index: (behind[index], -index))
        behind[chosen] -= total
        found.append(requests[chosen])
    return found
