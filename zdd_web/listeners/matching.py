"""Which of the inherited listeners the new configuration means: by what they are bound to, never by their position."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

#: As gunicorn has parsed a bind: host and port, a path, or the number of a descriptor.
Address = tuple[str, int] | str | int


class Place(NamedTuple):
    """A listener as a configuration means it: a bind as written, its address, and which of several sockets on it."""

    bind: str
    address: Address
    slot: int = 0


class Match(NamedTuple):
    """Indices: (wanted, given) of those that stay, wanted ones to be made, and given ones that are not wanted."""

    kept: tuple[tuple[int, int], ...]
    added: tuple[int, ...]
    dropped: tuple[int, ...]


def match(wanted: Sequence[Place], given: Sequence[Place]) -> Match:
    """Match what is wanted with what there is: as it was written first, then by address.

    >>> old = [Place("127.0.0.1:8000", ("127.0.0.1", 8000)), Place("unix:/run/a", "/run/a")]
    >>> new = [Place("unix:/run/a", "/run/a"), Place(":9000", ("", 9000))]
    >>> match(new, old)
    Match(kept=((0, 1),), added=(1,), dropped=(0,))
    """
    kept: dict[int, int] = {}
    for same in (_same_words, _same_address):
        for at, place in enumerate(wanted):
            free = (index for index in range(len(given)) if index not in kept.values())
            found = next((index for index in free if at not in kept and same(place, given[index])), None)
            if found is not None:
                kept[at] = found
    return Match(
        kept=tuple(sorted(kept.items())),
        added=tuple(at for at in range(len(wanted)) if at not in kept),
        dropped=tuple(index for index in range(len(given)) if index not in kept.values()),
    )


def same_bind(one: Place, other: Place) -> bool:
    """Tell whether two mean one address, whichever socket on it they are."""
    return one.bind == other.bind or normal(one.address) == normal(other.address) != ""


def _same_words(one: Place, other: Place) -> bool:
    return one.slot == other.slot and one.bind == other.bind


def _same_address(one: Place, other: Place) -> bool:
    return one.slot == other.slot and normal(one.address) == normal(other.address) != ""


def normal(address: Address) -> Address:
    """Return an address in its one spelling; "" for one that names no listener by itself, such as port 0.

    >>> normal(("0:0:0:0:0:0:0:1", 80)), normal(("", 80)), normal("/run//a"), normal(("127.0.0.1", 0))
    (('::1', 80), ('0.0.0.0', 80), '/run/a', '')
    """
    if isinstance(address, int):
        return ""
    if isinstance(address, str):
        return address if address.startswith("\0") else os.path.abspath(address)
    host, port = address
    if not port:
        return ""
    try:
        return str(ipaddress.ip_address(host or "0.0.0.0")), port  # noqa: S104 - compared with, not bound
    except ValueError:
        pass
    try:
        # As bind() does it.
        return socket.gethostbyname(host), port
    except OSError:
        return host.lower(), port
