"""Plain tables of a report: a line of heads, a rule, and rows; the same in a terminal, a pipe and a file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len

#: Between two columns.
GAP = "  "


def grid(
    rows: Sequence[Sequence[object]],
    headers: Sequence[str],
    *,
    colalign: Sequence[str],
    floatfmt: str = "g",
    missingval: str = "",
    maxcolwidths: Sequence[int | None] = (),
    disable_numparse: object = None,
) -> str:
    """Return a table; `colalign` has "left" or "right" for each column.

    Floats are printed as `floatfmt` has it, and None as `missingval`. A cell wider than its column's `maxcolwidths`
    goes on in the next line. `disable_numparse` is not looked at: a text is never taken for a number here.

    >>> print(grid([("steady", 1.25), ("around", None)], ("latency", "p50 ms"), colalign=("left", "right"),
    ...            floatfmt=".1f", missingval="-"))
    latency  p50 ms
    -------  ------
    steady      1.2
    around        -
    """
    limits = [*maxcolwidths, *[None] * (len(headers) - len(maxcolwidths))]
    texts = [[_text(value, floatfmt, missingval) for value in row] for row in rows]
    lines = [line for row in texts for line in _lines(row, limits)]
    widths = [max(map(cell_len, column)) for column in zip(headers, *lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(_line(line, widths, colalign) for line in [headers, rule, *lines])


def _text(value: object, floatfmt: str, missingval: str) -> str:
    if value is None:
        return missingval
    return format(value, floatfmt) if isinstance(value, float) else str(value)


def _lines(row: Sequence[str], limits: Sequence[int | None]) -> list[list[str]]:
    cells = [
        textwrap.wrap(text, limit, break_long_words=False) or [""] if limit else [text]
        for text, limit in zip(row, limits, strict=True)
    ]
    height = max(map(len, cells))
    return [[cell[at] if at < len(cell) else "" for cell in cells] for at in range(height)]


def _line(cells: Sequence[str], widths: Sequence[int], colalign: Sequence[str]) -> str:
    padded = []
    for text, width, align in zip(cells, widths, colalign, strict=True):
        space = " " * (width - cell_len(text))
        padded.append(text + space if align == "left" else space + text)
    return GAP.join(padded).rstrip()
