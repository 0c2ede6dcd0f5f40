"""Who may not be replaced, from whose child it is: judged as data, and seen of real parents."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zdd_web.gunicorn.handoff.parentage import KEEP, POD, WAITERS, WATCHERS, Parentage

ROOT = Path(__file__).parents[2]

#: Says whose child it is.
SAY = """
import json
from zdd_web.gunicorn.handoff.parentage import Parentage
print(json.dumps(Parentage.of_this_process()._asdict()))
"""

#: The parent needs a moment from the fork to its wait.
SAY_ONCE_WAITED_FOR = f"""
import os, time
from zdd_web.gunicorn.handoff.process_tree import waits_for
give_up = time.monotonic() + 20
while not waits_for(os.getppid(), os.getpid()) and time.monotonic() < give_up:
    time.sleep(0.01)
{SAY}"""


def say(*argv: str, **environ: str) -> dict[str, Any]:
    """Start a process that says whose child it is; `SAY` in `argv` stands for it."""
    done = subprocess.run(
        argv, env={**os.environ, "PYTHONPATH": str(ROOT), "SAY": SAY, "PYTHON": sys.executable, **environ},
        stdout=subprocess.PIPE, check=True, timeout=60,
    )  # fmt: skip
    said: dict[str, Any] = json.loads(done.stdout)
    return said


# -- the judgement


@pytest.mark.parametrize("parent", ["systemd", "gunicorn", "python", "process_api", "bash", "sshd", ""])
def test_anybody_elses_child_may_be_replaced(parent: str) -> None:
    assert Parentage(pid=4711, parent=99, name=parent).obstacle() is None


def test_pid_1_may_not_be_replaced() -> None:
    assert Parentage(pid=1, parent=0, name="").obstacle() == (
        f"this master is PID 1, whose exit ends the container: {KEEP}, or {POD}"
    )


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("known_by", ["name", "words"])
def test_watched_child_may_not_be_replaced(watcher: str, known_by: str) -> None:
    seen: dict[str, Any] = {"name": watcher} if known_by == "name" else {"name": "python", "words": ("python", watcher)}
    assert Parentage(pid=7, parent=3, **seen).obstacle() == (
        f"the parent {watcher} (pid 3) watches this pid and acts when it ends: {KEEP}, or restart by {watcher}"
    )


def test_shell_in_between_is_named_and_so_is_who_watches_it() -> None:
    assert Parentage(pid=7, parent=3, name="tini", through=("sh",)).obstacle() == (
        f"the parent sh ends with this master: tini (pid 3) watches it and acts when it ends: "
        f"{KEEP}, or restart by tini"
    )


def test_program_whose_name_only_begins_like_a_watcher_is_none() -> None:
    assert Parentage(pid=7, parent=3, name="tiniest", words=("godot", "runsvdir")).obstacle() is None


@pytest.mark.parametrize("shell", ["sh", "bash", *WAITERS])
def test_child_of_what_waits_at_pid_1_may_not_be_replaced(shell: str) -> None:
    obstacle = Parentage(pid=7, parent=1, name=shell).obstacle()
    assert obstacle is not None
    assert shell in obstacle
    assert obstacle.endswith(f"{KEEP}, or {POD}")


def test_child_of_nobody_in_sight_may_not_be_replaced() -> None:
    obstacle = Parentage(pid=7, parent=0, name="").obstacle()
    assert obstacle is not None
    assert "outside its pid namespace" in obstacle


@pytest.mark.parametrize(("notify", "refused"), [(True, False), (False, True)])
def test_units_main_process_may_be_replaced_where_systemd_hears_of_it(notify: bool, refused: bool) -> None:
    obstacle = Parentage(pid=7, parent=1, name="systemd", unit=True, notify=notify).obstacle()
    assert (obstacle is not None) is refused
    if obstacle:
        assert "Type=notify" in obstacle


def test_process_that_a_unit_merely_holds_may_be_replaced() -> None:
    assert Parentage(pid=7, parent=1, name="systemd", unit=False, notify=False).obstacle() is None


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"parent": 1, "name": "python"}, "the parent is python at PID 1, with which the container ends"),
        ({"parent": 1, "name": "agent", "through": ("python",)}, "the parent is python, the child of agent at PID 1"),
        ({"parent": 1, "name": ""}, "the parent is a process at PID 1"),
    ],
)
def test_child_of_an_unknown_pid_1_may_be_replaced_on_a_machine_and_not_in_a_container(
    seen: dict[str, Any], words: str
) -> None:
    assert Parentage(pid=7, **seen).obstacle() is None
    inside = Parentage(pid=7, container=True, **seen)
    obstacle = inside.obstacle()
    assert obstacle is not None
    assert obstacle.startswith(words)
    assert obstacle.endswith(f"may end with this master: {KEEP}, or PARENT_STAYS = True if it stays, or {POD}")
    assert inside.obstacle(parent_stays=True) is None


@pytest.mark.parametrize("name", ["python", "sh", "su", "nginx"])
def test_process_that_pid_1_has_adopted_may_be_replaced(name: str) -> None:
    assert Parentage(pid=7, parent=1, name=name, container=True, adopted=True).obstacle() is None


@pytest.mark.parametrize("parent", ["pytest", "sshd", "bash", "cron", "tmux: server"])
def test_child_of_one_that_does_not_wait_may_be_replaced_in_a_container(parent: str) -> None:
    assert Parentage(pid=7, parent=99, name=parent, container=True).obstacle() is None


@pytest.mark.parametrize(
    "seen", [{"parent": 3, "name": "tini"}, {"parent": 0, "name": ""}, {"parent": 1, "name": "sh"}]
)
def test_parent_that_stays_by_its_owners_word_is_no_obstacle(seen: dict[str, Any]) -> None:
    assert Parentage(pid=7, **seen).obstacle() is not None
    assert Parentage(pid=7, **seen).obstacle(parent_stays=True) is None


def test_owners_word_on_the_parent_changes_nothing_for_pid_1_and_a_units_main_process() -> None:
    assert Parentage(pid=1, parent=0, name="").obstacle(parent_stays=True) is not None
    assert Parentage(pid=7, parent=1, name="systemd", unit=True).obstacle(parent_stays=True) is not None


# -- what is seen


def test_parent_is_seen_with_its_name_and_words() -> None:
    said = say(sys.executable, "-c", SAY)
    assert said["parent"] == os.getpid()
    assert said["through"] == []
    assert said["name"] == Path("/proc/self/comm").read_text().strip()


def test_shell_that_runs_a_script_is_looked_through() -> None:
    said = say("/bin/sh", "-c", '"$PYTHON" -c "$SAY"; exit $?')
    assert said["parent"] == os.getpid()
    assert said["through"] == ["sh"]


def test_shells_that_run_scripts_are_looked_through_one_by_one() -> None:
    said = say("/bin/sh", "-c", """sh -c '"$PYTHON" -c "$SAY"; exit $?'; exit $?""")
    assert said["parent"] == os.getpid()
    assert said["through"] == ["sh", "sh"]


def test_shell_that_gives_its_commands_their_own_group_goes_on_without_them() -> None:
    # As at a terminal: job control, which dash has only there.
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    said = say("bash", "-c", 'set -m; "$PYTHON" -c "$SAY" & wait')
    assert said["through"] == []
    assert said["name"] == "bash"


def test_process_that_waits_for_its_child_is_looked_through() -> None:
    if not Path("/proc/self/wchan").read_text():
        pytest.skip("the kernel does not tell what a process waits for")
    wait = "import subprocess, sys; subprocess.call([sys.executable, '-c', sys.argv[1]])"
    said = say(sys.executable, "-c", wait, SAY_ONCE_WAITED_FOR)
    assert (said["parent"], len(said["through"])) == (os.getpid(), 1)


def test_process_that_has_other_things_to_do_than_to_wait_is_not_looked_through() -> None:
    read = "import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', sys.argv[1]], text=True))"
    said = say(sys.executable, "-c", read, SAY)
    assert (said["parent"] != os.getpid(), said["through"]) == (True, [])


def test_main_process_of_a_unit_is_recognised_also_behind_a_shell() -> None:
    notify = {"NOTIFY_SOCKET": "/run/nowhere"}
    itself = say("/bin/sh", "-c", 'SYSTEMD_EXEC_PID=$$ exec "$PYTHON" -c "$SAY"', **notify)
    assert (itself["unit"], itself["notify"]) == (True, True)
    behind = say("/bin/sh", "-c", 'SYSTEMD_EXEC_PID=$$ "$PYTHON" -c "$SAY"; exit $?', **notify)
    # systemd would not hear MAINPID from anybody but the shell.
    assert (behind["unit"], behind["notify"]) == (True, False)
    other = say("/bin/sh", "-c", 'SYSTEMD_EXEC_PID=1 exec "$PYTHON" -c "$SAY"', **notify)
    assert (other["unit"], other["notify"]) == (False, True)
