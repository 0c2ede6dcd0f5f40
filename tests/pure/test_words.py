"""Words that do not come back: coined ones, people for processes, and what is not English.

docs/glossary.md has the words to use.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: What is searched. Add `"zdd_web/**/*.py"` when nothing is left there.
SEARCHED = ["*.md", "docs/**/*.md", "docs/**/*.py", "benchmarks/**/*.md", "example_*/**/*.md"]

#: The word -> what to write.
BANNED = {
    r"mend(?:s|ed|ing)?": "fix",
    r"heirs?": "successor; what it inherits is the handoff",
    r"elders?": "predecessor, or an earlier generation",
    r"newcomers?": "external successor, new master",
    r"weary": "recycle requested",
    r"farewells?": "drain",
    r"whoever": "the process that ..., the client that ...",
    r"in\s+office": "active",
    r"nobody": "no process, no client",
    r"is\s+no(?=\s)(?!\s+(?:longer|more\b))": "is not a",
}

FILES = sorted({path for pattern in SEARCHED for path in ROOT.glob(pattern)})


def found(text: str) -> list[str]:
    """Return each banned word of a text with its line and what to write instead."""
    return [
        f"line {text[: match.start()].count(chr(10)) + 1}: {match[0]!r}: write {instead!r}"
        for word, instead in BANNED.items()
        for match in re.finditer(rf"\b{word}\b" if word[-1] != ")" else rf"\b{word}", text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_banned_words_stay_out(path: Path) -> None:
    assert found(path.read_text()) == []


def test_what_is_banned_is_found_over_the_end_of_a_line_and_no_more() -> None:
    assert found("The master is in\noffice, and Nobody else; it is no\nsocket.") == [
        "line 1: 'in\\noffice': write 'active'",
        "line 2: 'Nobody': write 'no process, no client'",
        "line 2: 'is no': write 'is not a'",
    ]
    assert found("We recommend this; the mend is no longer needed, is no more, is not.") == [
        "line 1: 'mend': write 'fix'"
    ]
    assert found("An amendment in an officer's list of nobodies is noted.") == []
