r"""Text from outside, made safe for a line of a log and for a terminal.

An exception's message may hold whatever a client has sent. Written as it is, a line break in it begins a line that
looks like one of the server's own, and an escape sequence clears the operator's screen. `str.splitlines()`, journald
and terminals break lines at more than `\n`: all of Unicode's line separators are escaped here, and all of C0 and C1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable

#: C0, DEL, C1 (with NEL and CSI), the line and paragraph separators, and what changes the direction of writing, by
#: which a line can be made to read as another.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

#: The lines of a traceback that Python writes at the margin, beside those that begin with an exception's name.
_HEADINGS = (
    "Traceback (most recent call last):",
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)

_INDENT = "    "


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Escape every control character that is not in `keep`. What has been escaped before stays as it is.

    >>> print(printable("\x1b[2Jcleared\x07", keep=""))
    \x1b[2Jcleared\x07
    """
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def quoted(text: str) -> str:
    r"""Return a text as a JSON string of one line, without any control character.

    >>> print(quoted('say "no"\n\x85'))
    "say \"no\"\n\u0085"
    """
    # json.dumps leaves DEL, C1 and the separators as they are.
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def indented(text: str) -> str:
    r"""Return the lines of a text, none of which begins at the margin, where a line of the log does.

    >>> print(indented("  File a.py\nnot a frame"))
      File a.py
        not a frame
    """
    return "\n".join(_away_from_margin(line) for line in text.rstrip("\n").split("\n"))


def traceback_lines(chunks: Iterable[str], names: Collection[str]) -> str:
    r"""Return a traceback, as `traceback.format_exception()` has it, of which no line can be taken for one of the log.

    Its own lines stay where they are. Of a message of several lines, and of notes, all but the line that begins with
    one of the `names` of the exceptions are indented.

    >>> print(traceback_lines(["ValueError: one\ntwo\n"], {"ValueError"}))
    ValueError: one
        two
    """
    lines: list[str] = []
    for chunk in chunks:
        first, *others = chunk.removesuffix("\n").split("\n")
        lines.append(printable(first, keep="\t") if _begins_with(first, names) else _away_from_margin(first))
        lines += map(_away_from_margin, others)
    return "\n".join(lines)


def _begins_with(line: str, names: Collection[str]) -> bool:
    return any(line == name or line.startswith(f"{name}:") for name in names)


def _away_from_margin(line: str) -> str:
    line = printable(line, keep="\t")
    return line if not line or line[0] in " \t" or line in _HEADINGS else f"{_INDENT}{line}"
