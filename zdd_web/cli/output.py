"""What may be printed to a terminal."""

from __future__ import annotations

import re

#: C0 and C1 controls, DEL, and the two separators that some programs take for the end of a line.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def printable(text: str) -> str:
    r"""Return a text from a board or a log with its control characters spelled out: a terminal would obey them.

    >>> printable("shop\x1b[2J\nroot: ok")
    'shop\\x1b[2J\\nroot: ok'
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
