"""What a command asks of a master: only while it runs, and only what a master's own user can ask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import pytest

from zdd_web.deploy_request import LONGEST_PATH, MEMFD_NAME, SIZE, DeployRequest, RequestBox, standing
from zdd_web.errors import UpgradeError

TO = DeployRequest(to="/srv/shop/releases/7")


@pytest.fixture
def box() -> Iterator[RequestBox]:
    made = RequestBox()
    yield made
    made.close()


def put(box: RequestBox, request: DeployRequest):
    return standing(os.getpid(), box.fd, os.geteuid(), request)


@pytest.mark.parametrize(
    "request_",
    [
        TO,
        DeployRequest(back=True),
        DeployRequest(),
        DeployRequest(watch=9, canary="1"),
        DeployRequest(to="/" + "\udcff\u00fc" * 1000),
    ],
)
def test_request_is_taken_once_while_its_command_runs(box, request_):
    assert box.take() is None
    with put(box, request_):
        assert box.take() == request_
        assert box.take() is None


DEAD = "was asked for by a command that has ended before this master took it up"


def text(box: RequestBox) -> bytes:
    return os.pread(box.fd, SIZE, 0).rstrip(b"\0")


@pytest.mark.parametrize(
    ("request_", "command"),
    [
        (TO, "upgrade --to /srv/shop/releases/7"),
        (DeployRequest(back=True), "rollback"),
        (DeployRequest(watch=60, max_errors=0.05, canary="25%"), "upgrade --watch 60 --max-errors 0.05 --canary 25%"),
    ],
)
def test_request_of_a_command_that_has_ended_is_refused_once(box, request_, command):
    with put(box, request_):
        pass
    with pytest.raises(UpgradeError, match=DEAD) as caught:
        box.take()
    assert str(caught.value).startswith(f"`zdd-web {command}`")
    assert text(box) == b""
    assert box.take() is None


def test_plain_request_needs_no_command_that_lives(box):
    with put(box, DeployRequest()):
        pass
    assert box.take() == DeployRequest()


def test_plain_request_replaces_what_a_dead_command_has_left(box):
    with put(box, TO):
        pass
    with put(box, DeployRequest()) as standing_:
        assert box.take() == DeployRequest()
        standing_.taken()
        with put(box, TO):
            assert box.take() == TO


def test_plain_request_does_not_join_one_that_still_stands(box):
    with put(box, TO):
        with pytest.raises(UpgradeError, match="another command has"), put(box, DeployRequest()):
            pass
        assert box.take() == TO
        # Whatever becomes of it, that command does not ask for anything more.
        with put(box, DeployRequest()):
            assert box.take() is None


@pytest.mark.parametrize(
    ("waits", "left"),
    [
        ([False], True),
        ([False, False], False),
        # One that was sent before the command had ended is there by the second look.
        ([False, True], True),
        ([True, True], True),
        ([False, True, False], True),
        ([False, True, False, False], False),
    ],
)
def test_request_whose_signal_never_came_is_removed(box, waits, left):
    with put(box, TO):
        for _ in range(3):
            box.sweep(signal_waits=False)
        assert text(box)
    for each in waits:
        box.sweep(signal_waits=each)
    assert bool(text(box)) == left


def test_request_that_replaces_a_dead_one_is_not_removed_in_its_place(box):
    with put(box, TO):
        pass
    box.sweep(signal_waits=False)
    with put(box, DeployRequest(back=True)):
        box.sweep(signal_waits=False)
        assert box.take() == DeployRequest(back=True)


def test_request_ends_with_a_command_that_is_killed(box):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with put(box, TO):
            os.write(writer, b".")
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert os.read(reader, 1) == b"."
    os.close(reader)
    os.close(writer)
    with pytest.raises(UpgradeError, match=DEAD):
        box.take()


def test_second_command_is_refused_and_changes_nothing(box):
    with put(box, TO):
        with pytest.raises(UpgradeError, match="another command has"), put(box, DeployRequest(back=True)):
            pass
        assert box.take() == TO


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not a request"),
        (b"[1]", "is not a request"),
        (b'{"kind": "reboot"}', "knows no request 'reboot'"),
        (b'{"kind": "upgrade", "canary": 1}', "--canary 1: must be a number of workers or a percentage"),
        (b'{"kind": "upgrade", "canary": "0"}', "--canary '0': must be a number of workers from 1"),
        (b'{"kind": "upgrade", "canary": "101%"}', "--canary '101%': must be"),
        (b'{"kind": "to"}', "must be an absolute path"),
        (b'{"kind": "to", "directory": "releases/7"}', "must be an absolute path"),
        (b'{"kind": "to", "directory": ["/srv"]}', "must be an absolute path"),
        (b'{"kind": "to", "directory": "/srv\\u0000/7"}', "must be an absolute path"),
        (b'{"kind": "to", "directory": "/' + b"a" * LONGEST_PATH + b'"}', "more than 4095 bytes"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: bytes, message: str):
    with pytest.raises(UpgradeError, match=message):
        DeployRequest.decode(text)


def test_longest_path_fits():
    assert len(DeployRequest(to="/" + "\u00fc" * (LONGEST_PATH - 1)).encode()) <= SIZE


def test_box_can_be_opened_by_its_user_alone_and_keeps_its_size(box):
    assert stat.S_IMODE(os.fstat(box.fd).st_mode) == 0o600
    for size in (0, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(box.fd, size)


def test_nothing_else_is_written_to():
    fd = os.memfd_create("zdd_web:board")
    no_box = pytest.raises(OSError, match=f"not a memfd named '{MEMFD_NAME}'")
    with no_box, standing(os.getpid(), fd, os.geteuid(), TO):
        pass
    assert os.fstat(fd).st_size == 0
    os.close(fd)


def test_box_of_another_user_is_not_written_to(box):
    refused = pytest.raises(UpgradeError, match="made by another user")
    with refused, standing(os.getpid(), box.fd, os.geteuid() + 1, TO):
        pass
    assert box.take() is None
