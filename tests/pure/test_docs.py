"""The docs say what the code does: settings, event words, transitions, options, links."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import click
import pytest

from docs import make_diagram
from docs.make_diagram import diagram
from zdd_web.cli import main
from zdd_web.gunicorn.upgrade.states import Link, Successor
from zdd_web.health import Health, Probe, Question, answer
from zdd_web.lifecycle import Phase
from zdd_web.log import EVENTS
from zdd_web.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "benchmarks" / "README.md",
         *sorted(ROOT.glob("example_*/README.md")), *sorted(DOCS.rglob("*.md"))]  # fmt: skip
#: These name settings of the tests, too.
FOR_CONTRIBUTORS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
REFERENCE = DOCS / "reference"


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def table_rows(page: Path, header: str) -> list[list[str]]:
    """Return the cells of the table under a header row."""
    lines = page.read_text().split(f"{header}\n", 1)[1].splitlines()[1:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def text_of(page: Path) -> list[str]:
    """Return a page's lines without those of its code blocks."""
    lines, code = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            code = not code
        elif not code:
            lines.append(line)
    return lines


def test_every_setting_is_documented_with_its_default_and_no_other() -> None:
    expected = {f"`{f.name.upper()}`": _spelled(getattr(Settings(), f.name)) for f in dataclasses.fields(Settings)}
    rows = table_rows(REFERENCE / "settings.md", "| setting | default | unit | meaning |")
    assert {row[0]: row[1] for row in rows} == expected
    assert len(rows) == len(expected)


def _spelled(value: object) -> str:
    return f'`"{value}"`' if isinstance(value, str) else f"`{value!r}`"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_pages_name_no_unknown_setting(page: Path) -> None:
    known = {field.name.upper() for field in dataclasses.fields(Settings)}
    assert set(re.findall(rf"\b{ENV_PREFIX}([A-Z_]+)", page.read_text())) <= known


def test_every_event_has_its_row_and_its_sample_and_there_is_no_other() -> None:
    page = REFERENCE / "log.md"
    rows = table_rows(page, "| event | level | who says it: what happened |")
    assert [row[0].strip("`") for row in rows] == list(EVENTS)
    assert set(re.findall(r"^(?:generation=\d+ )?event=([\w.]+)", page.read_text(), re.MULTILINE)) == set(EVENTS)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_pages_name_no_unknown_event(page: Path) -> None:
    assert set(re.findall(r"\bevent=([\w.]+)", page.read_text())) <= set(EVENTS)


def test_the_diagram_is_the_table_of_transitions() -> None:
    assert f"```mermaid\n{diagram()}\n```" in (REFERENCE / "phases.md").read_text()


def test_the_diagrams_of_an_upgrade_are_its_tables() -> None:
    page = (REFERENCE.parent / "explanation" / "how-an-upgrade-works.md").read_text()
    for each in (make_diagram.successor(), make_diagram.link()):
        assert f"```mermaid\n{each}\n```" in page
    for states in (Successor, Link):
        for state in states:
            assert f"| `{state.name.lower()}` | {state.value} |" in page


@pytest.mark.parametrize("phase", [Phase.BOOTING, Phase.SERVING, Phase.LAME_DUCK, Phase.DRAINING, Phase.RETIRING])
def test_the_phase_tables_say_what_probes_answer(phase: Phase) -> None:
    text = (REFERENCE / "phases.md").read_text()
    for port, phases in (("app's", 4), ("probe", 5)):
        section = text.partition(f"## On the {port} port")[2].partition("\n## ")[0]
        rows = [
            [cell.strip() for cell in row.strip("|").split("|")] for row in section.splitlines() if row[:3] == "| `"
        ]
        assert len(rows) == phases
        for row in rows:
            if row[0] == f"`{phase.label}`":
                asked = [Probe.LIVENESS, Probe.READINESS, Probe.STARTUP]
                assert row[1:] == [_answered(probe, phase) for probe in asked]


def _answered(probe: Probe, phase: Phase) -> str:
    reply = answer(probe, Question(), Health(phase, successor=Phase.SERVING if phase is Phase.RETIRING else None))
    retry = [f"`{name}: {value}`" for name, value in reply.headers if name == "Retry-After"]
    return ", ".join([str(reply.status), *retry])


def test_every_phase_has_its_row() -> None:
    rows = table_rows(REFERENCE / "phases.md", "| phase | new connections | replies |")
    assert [row[0] for row in rows] == [f"`{phase.label}`" for phase in Phase]


def test_every_command_and_option_is_documented() -> None:
    page = (REFERENCE / "commands.md").read_text()
    for name, command in main.commands.items():
        assert f"## `zdd-web {name}`" in page
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[0] in page, f"{name}: {parameter.opts[0]}"


@pytest.mark.parametrize("page", PAGES + FOR_CONTRIBUTORS, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    links += re.findall(r'src(?:set)?="([^"]+)"', page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES + FOR_CONTRIBUTORS, ids=ids)
def test_lines_are_at_most_120_characters(page: Path) -> None:
    assert [line for line in text_of(page) if len(line) > 120] == []
