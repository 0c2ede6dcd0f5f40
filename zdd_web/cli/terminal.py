"""What a terminal shows: tables and paragraphs that fit its width and break no word, in colour where it has colour.

The texts are laid out here and not by rich, whose tables fold a long word and cut a long cell: a reason that is cut has
lost its cause. rich knows the terminal: its width, its colours, and how to redraw a part of it.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text

from zdd_web.system.stdio import TolerantStream

#: Where there is no terminal whose width could be asked for.
WIDTH = 80

#: Before each line of a log.
BAR = "  | "

#: What is healthy, what goes on, and what is not well. Of the 256 colours those that can be read on black and on white:
#: green and yellow of the first sixteen cannot be on white, and which they are is each terminal's own. Where a terminal
#: has no more than sixteen, rich takes green, cyan and red.
GOOD, BUSY, BAD, FAINT, HEAD = "color(28)", "color(31)", "bold color(196)", "dim", "bold"


class Stream(TolerantStream):
    """A stream that a console may write to, whose writes never raise OSError."""

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        try:
            return bool(self._stream is not None and self._stream.isatty())
        except (OSError, ValueError):
            return False

    @property
    def encoding(self) -> str:
        """The encoding of the stream: the console draws with ASCII where it is not UTF-8."""
        return getattr(self._stream, "encoding", None) or "utf-8"


def console(stream: Any, **options: Any) -> Console:
    """Return a console for stdout or stderr, without colour in a pipe, with NO_COLOR and on a dumb terminal.

    Its `file` has the first error in `lost`. `NO_COLOR` also turns off bold and dim: it is set for plain text.
    """
    if os.environ.get("NO_COLOR"):
        options["color_system"] = None
    return Console(file=cast("IO[str]", Stream(stream)), highlight=False, markup=False, emoji=False, **options)


def width_of(screen: Console) -> int | None:
    """Return how many columns paragraphs may take; None where lines are for programs, and stay whole."""
    return screen.width if screen.is_terminal else None


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Text | str]], *, left: Sequence[int], indent: int
) -> list[Text]:
    """Return the lines of a table; columns in `left` are aligned to the left, the others to the right.

    A head of two words may stand on two lines; where the last column is aligned to the left, it is as long as its
    cells are.

    >>> for line in table(("worker", "in flight"), [("4711", "3"), ("9", "12")], left=[], indent=2):
    ...     print(line.plain[2:])
                in
    worker  flight
      4711       3
         9      12
    """
    split = [head.split(" ") for head in heads]
    height = max(map(len, split))
    cells = [[_text(cell) for cell in row] for row in rows]
    # At the bottom of the head's lines.
    words = [[""] * (height - len(head)) + head for head in split]
    cells = [[Text(column[line], style=HEAD) for column in words] for line in range(height)] + cells
    widths = [max(row[column].cell_len for row in cells) for column in range(len(heads))]
    return [_line(row, widths, left, indent) for row in cells]


def _text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _line(row: Sequence[Text], widths: Sequence[int], left: Sequence[int], indent: int) -> Text:
    line = Text(" " * indent)
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        if column:
            line.append("  ")
        padding = " " * (width - cell.cell_len)
        line.append_text(Text.assemble(cell, padding) if column in left else Text.assemble(padding, cell))
    line.rstrip()
    return line


def paragraph(text: str, width: int | None, *, indent: int = 2, style: str = "") -> list[Text]:
    """Return a text on lines of at most `width` columns, each indented; a longer word has a line of its own.

    >>> [line.plain for line in paragraph("worker 7 ended before it served", 20)]
    ['  worker 7 ended', '  before it served']
    """
    if width is None:
        return [Text(" " * indent + text, style=style)]
    lines = textwrap.wrap(text, max(width - indent, 20), break_long_words=False, break_on_hyphens=False)
    return [Text(" " * indent + line, style=style) for line in lines]


def wrapped(text: str, stream: Any) -> str:
    """Return a text whose words are not broken, where the stream is a terminal; as it is in a pipe.

    Those of a log, which begin with "  | ", go on behind such a bar, too.
    """
    screen = console(stream)
    if not screen.is_terminal:
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= screen.width:
            lines.append(line)
            continue
        if line.startswith(BAR):
            lines += _log_line(line[len(BAR) :], screen.width)
            continue
        indent = len(line) - len(line.lstrip())
        lines += [each.plain for each in paragraph(line.strip(), screen.width, indent=indent)]
    return "\n".join(lines)


def fail(text: str) -> None:
    """Print on stderr why it failed. It is to be the last line: that is where an operator looks."""
    console = stderr()
    show(console, paragraph(text, width_of(console), indent=0, style=BAD))


def _log_line(line: str, width: int) -> list[str]:
    indent = len(line) - len(line.lstrip())
    # One word with what is before it: a bar with nothing behind it would stand where the first word is a long path.
    glued = (BAR + line[:indent]).replace(" ", "\0") + line[indent:]
    behind = BAR + " " * (indent + 4)
    found = textwrap.wrap(glued, width, subsequent_indent=behind, break_long_words=False, break_on_hyphens=False)
    return [each.replace("\0", " ") for each in found]


def show(screen: Console, lines: Sequence[Text]) -> OSError | None:
    """Print lines as they are; return the error when that is impossible."""
    for line in lines:
        screen.print(line, soft_wrap=True)
    stream = cast("Stream", screen.file)
    stream.flush()
    return stream.lost


def stdout() -> Console:
    """Return the console of standard output."""
    return console(sys.stdout)


def stderr() -> Console:
    """Return the console of standard error."""
    return console(sys.stderr)
