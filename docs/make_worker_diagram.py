"""The state diagram of a worker in docs/explanation/how-a-worker-ends.md, drawn from the table that the code goes by.

`python docs/make_worker_diagram.py` prints it; tests/pure/test_exit_states.py holds the page to it.
"""

from __future__ import annotations

import sys

from zdd_web.gunicorn.workers.exit_states import ENDS, TABLE, State


def worker_diagram() -> str:
    """Return the transitions as a Mermaid state diagram, but for those that leave the state as it is.

    QUIT, ABORT and EXIT lead from every state to the same one, so each of these has a single arrow.
    """
    lines = ["stateDiagram-v2", f"    [*] --> {State.BOOTING.label}"]
    for state, events in TABLE.items():
        labels: dict[State, list[str]] = {}
        for event, to in events.items():
            if to is not state and event not in ENDS:
                labels.setdefault(to, []).append(event.name.lower())
        lines += [f"    {state.label} --> {to.label}: {', '.join(names)}" for to, names in labels.items()]
    lines += [f"    any --> {to.label}: {event.name.lower()}" for event, to in ENDS.items()]
    lines.append(f"    {State.EXITED.label} --> [*]")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(worker_diagram() + "\n")
