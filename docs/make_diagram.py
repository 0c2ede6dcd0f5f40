"""The state diagrams of the pages, drawn from the tables that the code itself goes by.

`python docs/make_diagram.py` prints them; tests/pure/test_docs.py holds the pages to them.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping

from zdd_web.gunicorn.upgrade.states import LINK, SUCCESSOR, Link, Successor
from zdd_web.lifecycle import TRANSITIONS, Phase


def diagram() -> str:
    """Return the transitions as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.BOOTING.label}"]
    for phase, events in TRANSITIONS.items():
        lines += [f"    {phase.label} --> {after.label}: {event.name.lower()}" for event, after in events.items()]
    lines += [f"    {phase.label} --> [*]" for phase, events in TRANSITIONS.items() if not events]
    return "\n".join(lines)


def machine(table: Mapping[enum.Enum, Mapping[enum.Enum, enum.Enum]], first: enum.Enum) -> str:
    """Return a table of upgrade/states.py as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {first.name.lower()}"]
    for state, follows in table.items():
        for event, after in follows.items():
            lines.append(f"    {state.name.lower()} --> {after.name.lower()}: {event.name.lower()}")
    lines += [f"    {state.name.lower()} --> [*]" for state, follows in table.items() if not follows]
    return "\n".join(lines)


def successor() -> str:
    """Return the states of a successor, as its predecessor sees it."""
    return machine(SUCCESSOR, Successor.STARTING)  # type: ignore[arg-type]


def link() -> str:
    """Return the states of the link to the predecessor, as a new master sees it."""
    return machine(LINK, Link.BOOTING)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.stdout.write("\n\n".join((diagram(), successor(), link())) + "\n")
