"""The state diagram of docs/reference/phases.md, drawn from the table that the code itself goes by.

`python docs/make_diagram.py` prints it; tests/pure/test_docs.py holds the page to it.
"""

from __future__ import annotations

import sys

from zdd_web.lifecycle import TRANSITIONS, Phase


def diagram() -> str:
    """Return the transitions as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.BOOTING.label}"]
    for phase, events in TRANSITIONS.items():
        lines += [f"    {phase.label} --> {after.label}: {event.name.lower()}" for event, after in events.items()]
    lines += [f"    {phase.label} --> [*]" for phase, events in TRANSITIONS.items() if not events]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(diagram() + "\n")
