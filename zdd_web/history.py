"""What was done to a service: its starts, deploys, reloads and rollbacks, the last `MOST` of them.

The master keeps them in a memfd that only it can write, and each generation hands them to the next. Where that has
another version of zdd_web, without a history, they end there. `zdd-web history` finds the memfd by the number that
stands on the master's board, and believes it as it believes the board (lookup.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple, get_type_hints

#: Commands open nothing else as a history.
MEMFD_NAME = "zdd_web-history"

MOST = 50

#: How much of one text is kept: a reason may quote an exception, which may quote anything.
TEXT_CHARACTERS = 500

#: Room for all of them, each character of each text escaped by JSON.
SIZE = 1 << 21

KINDS = ("start", "deploy", "rollback", "takeover", "reload")
OUTCOMES = ("done", "failed", "refused", "cancelled", "lost")


class Entry(NamedTuple):
    """One thing that was done, or tried. `at` is seconds since the epoch, `seconds` how long it took."""

    at: float
    kind: str
    outcome: str
    #: Which generation there was to be, or, of a reload, which one it was.
    generation: int = 0
    #: What `status` calls the release; the directory of its code, without symlinks; and the commit, if there is one.
    release: str = ""
    directory: str = ""
    commit: str = ""
    seconds: float = 0.0
    reason: str = ""
    #: What the operator is to know of it beside its outcome.
    note: str = ""
    #: With how many workers a new generation was watched (`upgrade --canary`), such as "1 of 4 workers".
    canary: str = ""
    #: How often it came one after the other, with the same outcome for the same reason.
    times: int = 1


def appended(entries: tuple[Entry, ...], entry: Entry) -> tuple[Entry, ...]:
    """Return the last `MOST` entries, this one at the end.

    One that was refused again for the same reason is counted, and does not push out the others: a script may try each
    second.

    >>> refused = Entry(at=1.0, kind="deploy", outcome="refused", reason="no")
    >>> [(each.at, each.times) for each in appended(appended((), refused), refused._replace(at=2.0))]
    [(2.0, 2)]
    """
    entry = _clipped(entry)
    last = entries[-1] if entries else None
    if last is not None and last.outcome == "refused" and _same(last, entry):
        return (*entries[:-1], entry._replace(times=last.times + 1))
    return (*entries, entry)[-MOST:]


def _same(one: Entry, other: Entry) -> bool:
    return one._replace(at=0.0, seconds=0.0, times=1) == other._replace(at=0.0, seconds=0.0, times=1)


def _clipped(entry: Entry) -> Entry:
    texts: dict[str, Any] = {
        name: value[:TEXT_CHARACTERS] for name, value in entry._asdict().items() if isinstance(value, str)
    }
    return entry._replace(**texts)


def encode(entries: Iterable[Entry]) -> bytes:
    """Return entries as they stand in the memfd."""
    return json.dumps({"entries": [entry._asdict() for entry in entries]}).encode()


def decode(text: bytes) -> tuple[Entry, ...]:
    """Return the entries in a memfd, `MOST` at most; none for one that was never written.

    A later version may have more fields, and what is not an entry is left out. Raises ValueError for other garbage.
    """
    if not text:
        return ()
    found = json.loads(text)
    entries = found.get("entries") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise ValueError("no list of entries")
    read = (_entry(each) for each in entries[-MOST:])
    return tuple(_clipped(entry) for entry in read if entry is not None)


#: What JSON may have for each field.
_TYPES = {name: (int, float) if kind is float else (kind,) for name, kind in get_type_hints(Entry).items()}


def _entry(fields: Any) -> Entry | None:
    if not isinstance(fields, dict):
        return None
    values = {name: fields[name] for name in Entry._fields if name in fields}
    wrong = [name for name, value in values.items() if not isinstance(value, _TYPES[name])]
    return None if wrong or not {"at", "kind", "outcome"} <= set(values) else Entry(**values)
