"""What `status` and its live board show fits a terminal of 80 columns, breaks no word, and cuts no reason."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.style import Style

from tests.helpers.masters import Masters
from zdd_web.board import Board, ListenerView, UpgradeState, WorkerState, WorkerView
from zdd_web.cli import frameworks, history, main, status_live, terminal
from zdd_web.cli.status_text import Shown, lines_of
from zdd_web.cli.times import Now
from zdd_web.history import Entry
from zdd_web.lifecycle import Phase
from zdd_web.service import Generation

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SECOND = 1_000_000_000
NOW = Now(monotonic=400_000 * SECOND, wall=1_900_000_000.0)
CAUSE = "cannot import name 'basket' from 'shop.models' (/srv/shop/releases/2026-11-28/shop/models.py)"
REASON = f"worker 4194300 ended before it served: exit status 3; ImportError: {CAUSE}, the migration is missing"


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.private("shop")
    yield board
    board.close()


def worker(
    pid: int, state: WorkerState = WorkerState.SERVING, *, retiring: bool = False, error: str = ""
) -> WorkerView:
    return WorkerView(
        pid=pid, start=1, age=1, state=state, retiring=retiring, in_flight=9_999, requests=99_999_999, tasks=999,
        error=error,
    )  # fmt: skip


def shown(board: Board, *, since: int = 0, ticked: int = 0, **changes: object) -> Shown:
    """A generation with the longest of everything; `since` and `ticked` are seconds ago."""
    plain = board.snapshot()._replace(
        name="shop",
        generation=3,
        master_pid=4194301,
        workers_wanted=512,
        phase_since=NOW.monotonic - since * SECOND,
        tick_at=NOW.monotonic - ticked * SECOND,
        workers=(
            worker(4194302, retiring=True, state=WorkerState.LEAVING),
            worker(4194303, WorkerState.BOOTING, error="waiting for the first result of check 'database-replica-2'"),
        ),
        listeners=(ListenerView("http://127.0.0.1:8000", 2048, 2048, 99_999_999),),
    )
    return Shown(Generation(4194301, board), plain._replace(**changes))


def text(lines: object) -> list[str]:
    return [line.plain for line in lines]  # type: ignore[attr-defined]


FAILED = {"upgrade_state": UpgradeState.FAILED, "upgrade_reason": REASON, "upgrade_since": NOW.monotonic - 90 * SECOND}


@pytest.mark.parametrize("since", [3, 3_599, 86_399, 300_000])
@pytest.mark.parametrize("ticked", [0, 1_000])
def test_status_fits_80_columns_and_breaks_no_word(board: Board, since: int, ticked: int) -> None:
    line = [
        shown(board, since=since, ticked=ticked, generation=2, phase=Phase.RETIRING, **FAILED),
        shown(board, since=since, ticked=ticked, phase=Phase.SERVING),
    ]
    lines = text(lines_of(line, NOW, 80))
    assert [each for each in lines if len(each) > 80] == []
    words = " ".join(lines).split()
    for word in REASON.split():
        assert word in words
    # The reason is whole, in its order.
    assert REASON in " ".join(" ".join(lines).split())


def test_status_names_the_release_of_each_generation(board: Board) -> None:
    line = [
        shown(board, generation=2, phase=Phase.RETIRING, release="/srv/shop/releases/7@3f2a1b9c4d5e"),
        shown(board, generation=3, phase=Phase.SERVING, release="2026.11.3"),
        shown(board, generation=4, phase=Phase.SERVING),
    ]
    lines = text(lines_of(line, NOW, 80))
    assert [each for each in lines if "release" in each] == [
        "  release of generation 2: 7@3f2a1b9",
        "  release of generation 3: 2026.11.3",
    ]
    longest = text(lines_of([shown(board, phase=Phase.SERVING, release="r" * 70)], NOW, 80))
    assert [each for each in longest if len(each) > 80] == []


def test_status_says_that_a_generation_is_a_canary_and_how_many_workers_it_is_to_have(board: Board) -> None:
    canary = shown(board, phase=Phase.SERVING, workers_wanted=1, workers_full=512)
    lines = text(lines_of([shown(board, generation=2, phase=Phase.SERVING), canary], NOW, 80))
    assert [each for each in lines if "canary" in each] == [
        "  generation 3 is a canary: 1 of 512 workers until its watch is passed"
    ]
    assert "\n".join(lines).count(" 2 of 512 ") == 2
    # Once it has grown, and where its version does not tell.
    for full in (1, 0):
        grown = canary.snapshot._replace(workers_full=full)
        assert "canary" not in "\n".join(text(lines_of([Shown(canary.generation, grown)], NOW, 80)))


def test_status_says_since_when_and_that_a_master_hangs(board: Board) -> None:
    lines = text(lines_of([shown(board, since=3_725, ticked=60, phase=Phase.SERVING)], NOW, 80))
    row = next(line for line in lines if "serving, hangs" in line)
    assert "1 h 2 min" in row
    assert NOW.clock(NOW.monotonic - 3_725 * SECOND) in row
    assert "hangs" not in "\n".join(text(lines_of([shown(board, phase=Phase.SERVING)], NOW, 80)))


def test_status_says_since_when_an_upgrade_is_under_way(board: Board) -> None:
    began = NOW.monotonic - 75 * SECOND
    under_way = {"upgrade_state": UpgradeState.COMMITTING, "upgrade_since": began}
    lines = text(lines_of([shown(board, phase=Phase.SERVING, **under_way)], NOW, 80))
    assert f"  upgrade of generation 3: committing since {NOW.clock(began)}, for 1 min 15 s" in lines


def test_lines_for_programs_are_not_wrapped(board: Board) -> None:
    lines = text(lines_of([shown(board, phase=Phase.SERVING, **FAILED)], NOW, None))
    assert [line for line in lines if REASON in line] != []


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("generations", [1, 2, 3])
def test_live_board_shows_generations_side_by_side(board: Board, width: int, generations: int) -> None:
    line = [shown(board, generation=number, phase=Phase.SERVING, **FAILED) for number in range(1, generations + 1)]
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None)
    console.print(status_live.board([line], NOW, console))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    beside = next(each for each in lines if "generation 1: serving" in each)
    assert beside.count("generation") == min(generations, width // status_live.LEAST_WIDTH)
    assert REASON in " ".join(" ".join(lines).split())
    # What a worker that boots waits for is whole, too.
    assert "database-replica-2" in file.getvalue()


def test_live_board_shows_what_was_done_last_and_no_reason_twice(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    done = [Entry(at=1.9e9 + number, kind="deploy", outcome="done", generation=number) for number in range(1, 9)]
    failed = Entry(at=1.9e9, kind="deploy", outcome="failed", generation=9, reason=REASON)
    monkeypatch.setattr(status_live, "entries_of", lambda generation: (*done, failed))
    board.header.history_fd = 7
    file = io.StringIO()
    console = Console(file=file, width=80, color_system=None)
    console.print(status_live.board([[shown(board, phase=Phase.SERVING, **FAILED)]], NOW, console))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[3] for line in lines if " deploy " in line] == ["7", "8", "9"]
    assert " ".join(file.getvalue().split()).count("the migration is missing") == 1


def test_history_fits_80_columns_and_cuts_no_reason_and_no_release() -> None:
    longest = "2026-11-28-hotfix-of-the-checkout@3f2a1b9"
    entries = [
        Entry(at=1.9e9, kind="start", outcome="done", generation=1, release="7@3f2a1b9", seconds=1.9),
        Entry(at=1.9e9, kind="rollback", outcome="refused", generation=999, release="/srv/2026.11.28-rc1", times=12,
              seconds=999.9, reason=REASON, note=f"note: {CAUSE}", canary="1 of 4 workers"),
        Entry(at=1.9e9, kind="deploy", outcome="failed", generation=2, release=longest, seconds=99.9),
    ]  # fmt: skip
    lines = text(history.lines_of(entries, 80))
    assert [line for line in lines if len(line) > 80] == []
    whole = " ".join(" ".join(lines).split())
    for each in (REASON, CAUSE, f"release: {longest}", "2026.11.28-rc1", "refused, 12 times"):
        assert each in whole
    # In a pipe a reason is one line.
    assert f"    {REASON}" in text(history.lines_of(entries, None))


def test_live_board_names_the_oldest_tasks(board: Board) -> None:
    slot = board.slot(0)
    slot.order.taken, slot.tasks, board.header.phase = 1, 3, Phase.SERVING
    for index, (name, seconds) in enumerate([("report \x1b[2J", 75), ("mail", 3)]):
        slot.task(index).name, slot.task(index).started = name, NOW.monotonic - seconds * SECOND
    file = io.StringIO()
    console = Console(file=file, width=80, color_system=None)
    console.print(status_live.board([[Shown(Generation(4194301, board), board.snapshot())]], NOW, console))
    assert "task for 1 min 15 s: report \\x1b[2J" in file.getvalue()
    assert "task for 3 s: mail" in file.getvalue()
    assert "1 more task " in file.getvalue()


def test_live_board_shows_checks_and_the_oldest_task_of_an_earlier_version(board: Board) -> None:
    slot = board.slot(0)
    slot.order.taken, slot.tasks, slot.oldest_task, slot.checks = 1, 1, NOW.monotonic - 75 * SECOND, 2
    for index, (name, result, message) in enumerate([("db", 1, ""), ("cache", 2, "no \x1b[31mroute")]):
        record = slot.check(index)
        record.name, record.result, record.message = name, result, message
    file = io.StringIO()
    console = Console(file=file, width=80, color_system=None)
    console.print(status_live.board([[shown(board, phase=Phase.SERVING)]], NOW, console))
    assert "1998 background tasks, the oldest: 1 min 15 s" in file.getvalue()
    assert "check db: passed" in file.getvalue()
    assert "check cache: failed: no \\x1b[31mroute" in file.getvalue()


# -- the terminal


@pytest.mark.parametrize("style", [terminal.GOOD, terminal.BUSY, terminal.BAD])
@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255)])
def test_colours_can_be_read_on_black_and_on_white(style: str, background: tuple[int, int, int]) -> None:
    colour = Style.parse(style).color
    assert colour is not None
    lighter, darker = sorted((luminance(*colour.get_truecolor()), luminance(*background)), reverse=True)
    # WCAG asks for 3 to 1 in large letters and 4.5 in small ones; on both backgrounds at most 4.58 can be had.
    assert (lighter + 0.05) / (darker + 0.05) >= 3.9


def luminance(*colour: int) -> float:
    """Return the relative luminance of a colour, as WCAG has it."""
    parts = [each / 255 / 12.92 if each / 255 <= 0.04045 else ((each / 255 + 0.055) / 1.055) ** 2.4 for each in colour]
    return sum(part * weight for part, weight in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))


def on_a_terminal(*arguments: str, **environ: str) -> str:
    """Run `zdd-web` on a terminal of 80 columns."""
    here, there = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-m", "zdd_web", *arguments], stdin=there, stdout=there, stderr=there, timeout=60,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environ}, check=False,
        )  # fmt: skip
    finally:
        os.close(there)
    found = b""
    with os.fdopen(here, "rb", buffering=0) as reader:
        # At its end a terminal is an error to read (EIO), and no end of file.
        while True:
            try:
                found += reader.read(65_536)
            except OSError:
                return found.decode()


def test_colour_is_for_terminals_that_have_it(masters: Masters) -> None:
    name = f"unit-{os.getpid()}-colour"
    masters.start(name)
    assert "\x1b[" in on_a_terminal("status", "--name", name)
    assert "\x1b" not in on_a_terminal("status", "--name", name, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal("status", "--name", name, TERM="dumb")
    assert "\x1b" not in CliRunner().invoke(main, ["status", "--name", name]).output


def test_an_error_on_a_terminal_breaks_no_word() -> None:
    name = "no-such-service-" + "x" * 40
    lines = on_a_terminal("upgrade", "--name", name).split("\r\n")
    assert max(map(len, lines)) <= 80
    assert f"'{name}':" in " ".join(lines).split()


def test_a_log_on_a_terminal_breaks_between_words_and_goes_on_behind_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "console", lambda stream: Console(width=40, force_terminal=True))
    line = f"{terminal.BAR}    raise RuntimeError('the migration is missing')"
    assert terminal.wrapped(line, None).split("\n") == [
        "  |     raise RuntimeError('the",
        "  |         migration is missing')",
    ]
    assert terminal.wrapped(f"{terminal.BAR}{'x' * 60}", None) == f"{terminal.BAR}{'x' * 60}"


def test_accepted_is_a_column_where_it_is_counted(board: Board) -> None:
    counted = shown(board, phase=Phase.SERVING)
    plain = ListenerView("http://127.0.0.1:8000", 0, 2048, 0)
    assert "accepted" in "\n".join(text(lines_of([counted], NOW, 80)))
    not_counted = shown(board, phase=Phase.SERVING, listeners=(plain,))
    assert "accepted" not in "\n".join(text(lines_of([not_counted], NOW, 80)))
    # One that has ended accepts nothing.
    ended = shown(board, phase=Phase.STOPPED, generation=2, listeners=(plain,))
    lines = text(lines_of([ended, not_counted], NOW, 80))
    assert [line for line in lines if "http:" in line] == ["    3        0   2048  http://127.0.0.1:8000"]


def test_live_board_needs_a_terminal() -> None:
    result = CliRunner().invoke(main, ["status", "--watch"])
    assert (result.exit_code, "--watch needs a terminal" in result.output) == (2, True)
    assert CliRunner().invoke(main, ["status", "--watch", "--json"]).exit_code == 2


# -- for programs


def schema() -> dict[str, object]:
    found: dict[str, object] = json.loads((resources.files("zdd_web.cli") / "schema" / "status.json").read_text())
    return found


def test_json_is_what_its_schema_says_and_no_key_is_left_out(masters: Masters) -> None:
    name = f"unit-{os.getpid()}-schema"
    masters.chain(name, Phase.RETIRING, Phase.SERVING)
    found = json.loads(CliRunner().invoke(main, ["status", "--name", name, "--json"]).output)
    jsonschema.validate(found, schema(), format_checker=jsonschema.FormatChecker())
    described = schema()["$defs"]["generation"]["properties"]  # type: ignore[index]
    assert set(found["generations"][0]) == set(described)
    assert set(found["generations"][0]["workers"][0]) == set(schema()["$defs"]["worker"]["properties"])  # type: ignore[index]


def test_schema_refuses_what_is_not_one() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    said = [error.message for error in validator.iter_errors({"format": 1, "generations": [{"phase": "asleep"}]})]
    assert any("'asleep' is not one of" in each for each in said)
    assert "'uid' is a required property" in said
    with pytest.raises(jsonschema.ValidationError, match="1 was expected"):
        jsonschema.validate({"format": 2, "generations": []}, schema())


def test_schema_knows_every_phase_and_state() -> None:
    described = schema()["$defs"]["generation"]["properties"]  # type: ignore[index]
    assert described["phase"]["enum"] == [phase.label for phase in Phase]
    assert described["upgrade_state"]["enum"] == [state.name.lower() for state in UpgradeState]
    states = schema()["$defs"]["worker"]["properties"]["state"]["enum"]  # type: ignore[index]
    assert states == [state.label for state in WorkerState]


def test_wall_clock_times_are_beside_the_others(masters: Masters) -> None:
    name = f"unit-{os.getpid()}-times"
    masters.start(name)
    (generation,) = json.loads(CliRunner().invoke(main, ["status", "--name", name, "--json"]).output)["generations"]
    assert generation["times"]["ready_at"] is None
    assert generation["times"]["tick_at"].endswith("Z")
    assert set(generation["times"]) == {key for key in generation if key.endswith(("_at", "_since", "deadline"))}


# -- what is found without a service


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help_is_whole_in_80_columns(command: str | None) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    done = CliRunner().invoke(main, arguments, terminal_width=80)
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    # click ends what is too long for its place so.
    assert [line for line in lines if line.endswith("...") and not line.startswith("Usage: ")] == []


def test_help_of_a_framework_s_command_is_whole() -> None:
    def check() -> None:
        """Look at the settings of the app and run, once, the checks that it has registered with zdd_web."""

    done = CliRunner().invoke(frameworks.group(check), ["--help"], terminal_width=80)
    assert max(map(len, done.output.splitlines())) <= 80
    assert "registered with zdd_web." in " ".join(done.output.split())


def test_man_page_is_that_of_the_commands() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "zdd-web.1"
    done = CliRunner().invoke(main, ["man"])
    assert done.exit_code == 0
    assert page.read_text() == done.output, f"renew it: zdd-web man > {page}"
    for name in main.commands:
        assert f".SS {name}\n" in done.output


@pytest.mark.parametrize(
    ("words", "position", "completed"), [("zdd-web up", 1, "upgrade"), ("zdd-web ca", 1, "cancel")]
)
def test_shell_completes_commands(words: str, position: int, completed: str) -> None:
    assert completion(words, position) == [f"plain,{completed}"]


def test_shell_completes_names_of_services(masters: Masters) -> None:
    name = f"unit-{os.getpid()}-complete"
    masters.start(name)
    assert completion(f"zdd-web status --name {name[:-3]}", 3) == [f"plain,{name}"]


def completion(words: str, position: int) -> list[str]:
    script = "from zdd_web.cli import main; main(prog_name='zdd-web')"
    environ = {**os.environ, "_ZDD_WEB_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "zdd_web", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("zdd-web, version ")


def test_words_longer_than_the_screen_are_not_broken() -> None:
    lines = terminal.paragraph(f"short {'x' * 100} short", 80)
    assert [line.plain for line in lines] == ["  short", f"  {'x' * 100}", "  short"]
