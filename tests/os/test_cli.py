"""The commands find the service that was named, or say what there is instead; masters here are real processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import zdd_web
from tests.helpers.commands import zdd
from tests.helpers.forks import in_child, spawn, status_of
from tests.helpers.masters import Masters
from zdd_web import lookup, service
from zdd_web.board import Board, UpgradeState
from zdd_web.cli import main
from zdd_web.cli.upgrade import LOG_LINES
from zdd_web.errors import ServiceNotFound
from zdd_web.lifecycle import Phase
from zdd_web.system import boot_log

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

#: No Linux hands out a pid above 2**22.
NOBODY = 1 << 23


# -- which service


@pytest.mark.parametrize("command", ["status", "upgrade"])
def test_name_of_no_service_is_refused_with_what_there_is(command: str, name: str) -> None:
    result = zdd(command, "--name", name)
    assert result.exit_code == 2
    assert f"Error: no service named '{name}': " in result.output
    assert "running here: " in result.output or "this user sees no service of zdd_web here" in result.output


def test_name_of_no_service_is_refused_with_the_names_of_others(masters: Masters, name: str) -> None:
    masters.start(name)
    result = zdd("upgrade", "--name", "no-such-service")
    assert result.exit_code == 2
    assert name in result.output.partition("running here: ")[2]


@pytest.mark.parametrize("command", ["status", "upgrade"])
@pytest.mark.parametrize(
    "options",
    [
        ("--name", "shop", "--pid", "1"),
        ("--name", "shop", "--pid-file", "x"),
        ("--pid", "1", "--pid-file", "x"),
        ("--name", "shop", "--pid", "1", "--pid-file", "x"),
    ],
    ids=" ".join,
)
def test_two_ways_to_name_a_service_are_bad_usage(command: str, options: tuple[str, ...]) -> None:
    result = zdd(command, *options)
    assert result.exit_code == 2
    assert result.output.startswith(f"Usage: main {command} ")
    assert "give one of --name, --pid and --pid-file" in result.output


@pytest.mark.parametrize("command", ["status", "upgrade"])
def test_pid_of_a_process_that_is_no_master_is_refused(command: str) -> None:
    def hang() -> None:
        while True:
            signal.pause()

    pid = spawn(hang)
    try:
        result = zdd(command, "--pid", pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        assert status_of(pid) == -signal.SIGKILL
    assert result.exit_code == 2
    assert (
        f"process {pid} is not a gunicorn master with zdd_web: does its configuration call install()?" in result.output
    )


@pytest.mark.parametrize("pid", [NOBODY, -1])
def test_pid_of_nobody_is_refused(pid: int) -> None:
    result = zdd("status", "--pid", pid)
    assert result.exit_code == 2
    assert f"no process {pid}: is the service running?" in result.output


def test_worker_is_no_master_though_it_has_the_board_too(masters: Masters, name: str) -> None:
    worker_pid: list[int] = []
    board = Board.create(name, slots=1)
    board.header.master_pid = os.getpid()

    def worker() -> None:
        while True:
            signal.pause()

    worker_pid.append(spawn(worker))
    try:
        assert service.generation_of(worker_pid[0]) is None
        mine = service.generation_of(os.getpid())
        assert mine is not None
        assert mine.board.header.name == name
    finally:
        os.kill(worker_pid[0], signal.SIGKILL)
        status_of(worker_pid[0])
        board.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_master_of_another_user_is_refused_with_whom_to_be(masters: Masters, name: str) -> None:
    pid = masters.start(name)

    def look() -> object:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        found = []
        for question in ({"pid": pid}, {"name": name}):
            try:
                service.find(**question)  # type: ignore[arg-type]
            except ServiceNotFound as error:
                found.append(str(error))
        return found

    by_pid, by_name = in_child(look)
    assert by_pid == f"process {pid} belongs to another user: run this as that user or as root"
    assert by_name.startswith(f"no service named '{name}': ")


@pytest.mark.parametrize("content", [None, "", "no pid", "12 34"])
def test_pid_file_that_names_nobody_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "shop.pid"
    if content is not None:
        path.write_text(content)
    result = zdd("status", "--pid-file", path)
    assert result.exit_code == 2
    assert f"--pid-file {path}: " in result.output
    assert result.output.endswith("is the service running?\n")


def test_several_services_are_refused_with_their_names(masters: Masters, name: str) -> None:
    masters.start(name)
    masters.start(f"{name}-2")
    result = zdd("upgrade")
    assert result.exit_code == 2
    assert "several services run here: " in result.output
    assert f"{name}, {name}-2" in result.output
    assert result.output.endswith(": name one with --name\n")


@pytest.mark.parametrize(
    ("phases", "is_active"),
    [
        ([Phase.SERVING], 1),
        ([Phase.SERVING, Phase.BOOTING], 1),
        ([Phase.SERVING, Phase.SERVING], 1),
        ([Phase.RETIRING, Phase.SERVING], 2),
        ([Phase.RETIRING, Phase.RETIRING, Phase.SERVING], 3),
        ([Phase.STOPPED, Phase.LAME_DUCK], 2),
        ([Phase.RETIRING], 1),
    ],
)
def test_generation_in_office_is_the_one_that_is_asked(
    masters: Masters, name: str, phases: list[Phase], is_active: int
) -> None:
    masters.chain(name, *phases)
    found = service.find(name=name)
    assert found.board.header.generation == is_active
    assert [each.board.header.generation for each in service.line_of(found)] == list(range(1, len(phases) + 1))


@pytest.mark.parametrize("command", ["upgrade", "drain"])
@pytest.mark.parametrize("named", [True, False])
def test_two_services_of_one_name_are_refused_with_their_masters(
    masters: Masters, name: str, command: str, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second has upgraded once; its new generation is not in office yet.
    _, first = masters.chain(name, Phase.RETIRING, Phase.SERVING)
    second, _ = masters.chain(name, Phase.SERVING, Phase.BOOTING)
    if not named:
        everything = lookup.survey

        def ours(*arguments: Any) -> lookup.Survey:
            found = everything(*arguments)
            found[:] = [each for each in found if each.header.name == name]
            return found

        monkeypatch.setattr(lookup, "survey", ours)
    result = zdd(command, *(["--name", name] if named else []))
    assert result.exit_code == 2, result.output
    there = f"2 services named '{name}' run here, of the masters {first}, {second}"
    assert result.output == f"Error: {there}: name one with --pid or --pid-file\n"


def test_pid_tells_two_services_of_one_name_apart(masters: Masters, name: str) -> None:
    first = masters.chain(name, Phase.SERVING, Phase.BOOTING)
    second = masters.chain(name, Phase.RETIRING, Phase.SERVING)
    assert service.find(pid=first[0]).pid == first[0]
    assert service.find(pid=second[1]).pid == second[1]
    for pids in (first, second):
        shown = json.loads(zdd("status", "--pid", pids[1 if pids is second else 0], "--json").output)
        assert [each["master_pid"] for each in shown["generations"]] == pids
    shown = json.loads(zdd("status", "--name", name, "--json").output)
    assert [each["master_pid"] for each in shown["generations"]] == [*first, *second]


def test_generations_of_a_service_are_one_though_the_one_between_them_has_ended(masters: Masters, name: str) -> None:
    old = masters.start(name, 1, Phase.RETIRING, successor=NOBODY)
    new = masters.start(name, 3, predecessor=NOBODY)
    assert service.find(name=name).pid == new
    assert [each.pid for each in service.line_of(service.find(pid=new))] == [old, new]


def test_signals_are_the_successors_before_the_phase_of_the_old_one_says_so(masters: Masters, name: str) -> None:
    masters.start(name, 1, Phase.SERVING, successor=NOBODY)
    new = masters.start(name, 3, predecessor=NOBODY)
    assert service.find(name=name).pid == new


def test_generation_that_retires_with_nothing_to_join_it_to_who_serves_is_no_second_service(
    masters: Masters, name: str
) -> None:
    masters.start(name, 1, Phase.RETIRING, successor=NOBODY)
    new = masters.start(name, 4, predecessor=NOBODY + 1)
    assert service.find(name=name).pid == new


def test_generation_whose_predecessor_has_ended_is_a_service_by_itself(masters: Masters, name: str) -> None:
    alone = masters.start(name, 2, predecessor=NOBODY)
    assert service.find(name=name).pid == alone
    masters.start(name, 2, predecessor=NOBODY + 1)
    with pytest.raises(ServiceNotFound, match=f"2 services named '{name}' run here"):
        service.find(name=name)


@pytest.mark.parametrize("older", [{"generation": 2}, {"younger_by": 1000}], ids=["by number", "by start"])
def test_master_that_has_its_pid_from_a_predecessor_that_ended_is_none(
    masters: Masters, name: str, older: dict[str, int]
) -> None:
    # Its pid is that of the other's predecessor; but it is no older than its successor.
    other = masters.start(name, **older)
    masters.start(name, 2, predecessor=other)
    with pytest.raises(ServiceNotFound, match="of the masters "):
        service.find(name=name)


def test_service_that_changes_its_name_is_found_by_either(masters: Masters, name: str) -> None:
    old = masters.start(name, 1, Phase.RETIRING)
    new = masters.start(f"{name}-2", 2, predecessor=old)
    assert service.find(name=name).pid == service.find(name=f"{name}-2").pid == new


def test_generation_outlived_by_its_board_is_not_alive(masters: Masters, name: str) -> None:
    pid = masters.start(name)
    generation = service.find(pid=pid)
    assert generation.alive
    os.kill(pid, signal.SIGKILL)
    status_of(pid)
    assert not generation.alive
    assert generation.snapshot().name == name


# -- status


def test_status_shows_generations_and_workers(masters: Masters, name: str) -> None:
    old, new = masters.chain(name, Phase.RETIRING, Phase.SERVING)
    result = zdd("status", "--name", name)
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    assert rows[0] == [name]
    generations = rows[3:5]
    assert [(row[0], row[1]) for row in generations] == [("1", "retiring"), ("2", "serving")]
    assert str(old) in generations[0]
    assert str(new) in generations[1]
    workers = [row for row in rows if "4711" in row or "4712" in row]
    assert [row[:3] for row in workers] == [
        ["1", "4711", "serving"],
        ["1", "4712", "leaving,"],
        ["2", "4711", "serving"],
        ["2", "4712", "leaving,"],
    ]
    assert "leaving, retiring" in result.output
    assert "  worker 4712: it broke\n" in result.output


def test_status_of_one_generation_does_not_repeat_its_master_in_each_row(masters: Masters, name: str) -> None:
    pid = masters.start(name)
    output = zdd("status", "--name", name).output
    assert output.count(str(pid)) == 1
    assert output.count("master") == 1


def test_status_says_which_master_each_listener_is_of(masters: Masters, name: str) -> None:
    pids = [masters.start(name, listener=f"127.0.0.1:{port}") for port in (8001, 8002)]
    services = zdd("status", "--name", name).output.split(f"{name}\n")[1:]
    assert len(services) == 2
    for pid, port, text in zip(pids, (8001, 8002), services, strict=True):
        assert str(pid) in text
        assert text.strip().endswith(f"127.0.0.1:{port}")


@pytest.mark.parametrize("by", ["name", "pid", "pid-file"])
def test_status_for_programs_is_json_whoever_is_named_how(masters: Masters, name: str, by: str, tmp_path: Path) -> None:
    pid = masters.start(name, 3)
    path = tmp_path / "shop.pid"
    path.write_text(f"{pid}\n")
    result = zdd("status", f"--{by}", {"name": name, "pid": pid, "pid-file": path}[by], "--json")
    assert result.exit_code == 0
    said = json.loads(result.output)
    assert said["format"] == 1
    (generation,) = said["generations"]
    assert {key: generation[key] for key in ("name", "generation", "phase", "master_pid", "in_flight", "tasks")} == {
        "name": name,
        "generation": 3,
        "phase": "serving",
        "master_pid": pid,
        "in_flight": 3,
        "tasks": 1,
    }
    assert [worker["state"] for worker in generation["workers"]] == ["serving", "leaving"]
    assert (generation["successor_phase"], generation["upgrade_state"]) == (None, "none")


@pytest.mark.parametrize(
    ("phase", "silent", "stalled"),
    [
        (Phase.SERVING, 60.0, True),
        (Phase.DRAINING, 60.0, True),
        (Phase.SERVING, 0.0, False),
        (Phase.BOOTING, 60.0, False),
    ],
)
def test_status_of_a_master_whose_main_loop_has_stopped_is_status_1(
    masters: Masters, name: str, phase: Phase, silent: float, stalled: bool
) -> None:
    masters.start(name, phase=phase, ticked_before=silent)
    result, programs = zdd("status", "--name", name), zdd("status", "--name", name, "--json")
    assert (result.exit_code, programs.exit_code) == (stalled, stalled)
    assert (f"{phase.label}, hangs" in result.output, "its main loop has not run for 1 min" in result.stderr) == (
        stalled,
        stalled,
    )
    (generation,) = json.loads(programs.stdout)["generations"]
    assert (generation["phase"], generation["stalled_for"] >= silent) == (phase.label, stalled or not silent)


def test_status_of_everything_shows_every_service(masters: Masters, name: str) -> None:
    masters.start(name)
    masters.start(f"{name}-2")
    result = zdd("status")
    assert result.exit_code == 0
    assert {name, f"{name}-2"} <= {line.split()[0] for line in result.output.splitlines() if line.strip()}


# -- upgrade


def test_upgrade_that_is_refused_says_why_and_is_status_1(masters: Masters, name: str) -> None:
    def refuse(board: Board) -> None:
        board.header.upgrade_reason = "an upgrade is under way: wait for its end"
        board.header.upgrade_state = UpgradeState.REFUSED

    masters.start(name, 4, on_usr2=refuse)
    result = zdd("upgrade", "--name", name)
    assert result.exit_code == 1
    # The reason stands last on the screen.
    assert result.output.endswith(
        "generation 4 serves on\nupgrade refused: an upgrade is under way: wait for its end\n"
    )


def test_upgrade_that_is_refused_because_another_is_under_way_does_not_report_that_one(
    masters: Masters, name: str
) -> None:
    def refuse(board: Board) -> None:
        board.header.upgrade_state = UpgradeState.BOOTING
        board.header.refused_reason = "an upgrade is under way: wait for its end"
        board.header.refused_number = board.header.upgrade_number + 1

    masters.start(name, 4, on_usr2=refuse)
    result = zdd("upgrade", "--name", name)
    assert result.exit_code == 1
    assert "upgrade refused: an upgrade is under way: wait for its end\n" in result.output


def test_upgrade_is_followed_to_its_end_although_another_request_is_refused(masters: Masters, name: str) -> None:
    def succeed(board: Board) -> None:
        board.header.refused_reason, board.header.refused_number = "an upgrade is under way", 2
        board.header.upgrade_state = UpgradeState.DONE

    masters.start(name, 4, on_usr2=succeed)
    assert zdd("upgrade", "--name", name).exit_code == 0


def test_upgrade_that_fails_shows_the_end_of_what_the_new_generation_said(masters: Masters, name: str) -> None:
    def fail(board: Board) -> None:
        board.header.boot_log_fd = fd = boot_log.create()
        os.write(fd, b"".join(b"line %d\n" % number for number in range(LOG_LINES + 10)) + b"ImportError: shop\n")
        board.header.upgrade_reason = "worker 7 ended before it served"
        board.header.upgrade_state = UpgradeState.FAILED

    masters.start(name, on_usr2=fail)
    result = zdd("upgrade", "--name", name)
    assert result.exit_code == 1
    assert "upgrade failed: worker 7 ended before it served\n" in result.output
    assert f"the new generation's last {LOG_LINES} log lines:\n  | line 11\n" in result.output
    assert "  | ImportError: shop\ngeneration 1 serves on\n" in result.output


def test_upgrade_that_is_done_is_status_0(masters: Masters, name: str) -> None:
    def succeed(board: Board) -> None:
        board.header.upgrade_state = UpgradeState.DONE

    masters.start(name, 7, on_usr2=succeed)
    result = zdd("upgrade", "--name", name)
    assert result.exit_code == 0
    assert result.output.splitlines()[0].startswith(f"{name}: generation 7 (pid ")
    assert result.output.splitlines()[-1].startswith("generation 8 serves, after ")


def test_upgrade_whose_master_ends_is_status_1(masters: Masters, name: str) -> None:
    pid = masters.start(name, on_usr2=lambda board: os._exit(1))
    result = zdd("upgrade", "--pid", pid)
    assert result.exit_code == 1
    assert f"upgrade the master {pid} ended during the upgrade\n" in result.output


def test_master_that_ends_once_its_successor_serves_has_upgraded(masters: Masters, name: str) -> None:
    def succeed_and_leave(board: Board) -> None:
        board.header.upgrade_state = UpgradeState.DONE
        board.header.upgrade_number += 1
        os._exit(0)

    pid = masters.start(name, on_usr2=succeed_and_leave)
    assert zdd("upgrade", "--pid", pid).exit_code == 0


# -- the rest


def test_version_is_the_packages() -> None:
    assert zdd("--version").output == f"zdd-web, version {zdd_web.__version__}\n"


def test_help_names_every_command() -> None:
    result = zdd("--help")
    assert result.exit_code == 0
    for command in ("status", "upgrade", "rehearse"):
        assert command in main.commands
        assert f"  {command} " in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--canary", "0"), "must be a number of workers from 1, or '1%' to '100%' of them"),
        (("--canary", "1.5"), "must be a number of workers from 1, or '1%' to '100%' of them"),
        (("--canary", ""), "must be a number of workers, or a percentage of them such as 25%"),
        (("--watch", "0", "--canary", "1"), "--canary 1 needs a watch, and --watch 0 is none: give --watch SECONDS"),
    ],
)
def test_canary_that_cannot_be_is_bad_usage(options: tuple[str, ...], message: str) -> None:
    result = zdd("upgrade", "--name", "no-such-service", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_canary_of_a_master_that_has_none_is_not_asked_for(masters: Masters, name: str) -> None:
    masters.start(name)
    result = zdd("upgrade", "--name", name, "--watch", "60", "--canary", "1")
    assert result.exit_code == 2
    assert "the running version of zdd_web starts all workers at once, without a canary" in result.output
