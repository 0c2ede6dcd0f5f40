"""The link to the predecessor: what each message means in each state, without gunicorn's loop."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.errors import HaltServer

from zdd_web.board import Board
from zdd_web.gunicorn.handoff.channel import Channel
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.upgrade import predecessor_link
from zdd_web.gunicorn.upgrade.predecessor_link import PredecessorLink
from zdd_web.gunicorn.upgrade.states import Link
from zdd_web.system import boot_log, clock


class Scene:
    """A new master, and the predecessor's end of the channel. The predecessor is this process's parent."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.predecessor = Channel(ours)
        self.log = boot_log.create()
        self.signals: list[str] = []
        server: Any = SimpleNamespace(
            predecessor_pid=1,
            set_predecessor=lambda pid: setattr(server, "predecessor_pid", pid),
            resume_control_server=lambda: None,
            kill_workers=lambda sig: self.signals.append("kill"),
            handle_term=lambda: self.signals.append("term"),
        )
        self.server = server
        inherited = Inheritance(
            generation=2,
            predecessor=os.getppid(),
            channel=theirs.detach(),
            boot_log=self.log,
            stderr=-1,
            listeners=(),
            binds=(),
        )
        self.board = Board.private()
        self.link = PredecessorLink(inherited, server, self.board)

    def send(self, *kinds: str) -> bool:
        for kind in kinds:
            self.predecessor.send(kind)
        return self.link.follow()

    def end(self) -> None:
        self.link.forget()
        self.predecessor.close()
        if self.link.handler is not None:  # an active master closes it
            os.close(self.log)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.end()


@pytest.fixture
def dead(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """The same, and the predecessor has been killed."""
    monkeypatch.setattr(os, "getppid", lambda: 1)
    scene.predecessor.close()
    return scene


def test_it_asks_once_and_serves_when_it_is_told_to(scene: Scene) -> None:
    assert not scene.link.may_serve(2)
    assert not scene.link.may_serve(2)
    asked = [message.kind for message in scene.predecessor.receive_some()]
    assert asked == ["ready"]
    assert not scene.send("go")
    assert scene.link.may_serve(2)
    assert (scene.link.state, scene.link.is_active, scene.link.alone) == (Link.SERVING, False, False)
    scene.send("office")
    assert (scene.link.state, scene.link.is_active) == (Link.ACTIVE, True)
    assert scene.server.predecessor_pid == 0


def test_both_messages_at_once_let_it_serve(scene: Scene) -> None:
    scene.link.may_serve(2)
    scene.send("go", "office")
    assert scene.link.is_active
    assert scene.link.may_serve(2)


def test_messages_that_its_state_does_not_know_are_ignored(scene: Scene) -> None:
    scene.send("go", "office", "nonsense")
    assert scene.link.state is Link.BOOTING
    assert scene.server.predecessor_pid == 1


def test_one_that_is_rejected_while_it_boots_ends_with_its_workers(scene: Scene) -> None:
    with pytest.raises(HaltServer) as halt:
        scene.send("given_up", "given_up")
    assert (halt.value.exit_status, scene.signals, scene.link.state) == (1, ["kill"], Link.REJECTED)
    assert not scene.link.follow()


@pytest.mark.parametrize("messages", [["go"], ["go", "office"]])
def test_one_that_is_rejected_when_it_serves_drains(scene: Scene, messages: list[str]) -> None:
    scene.link.may_serve(2)
    scene.send(*messages)
    scene.board.header.ready_at = clock.now_ns()
    assert not scene.send("given_up", "given_up")
    assert (scene.signals, scene.link.state, scene.link.is_active) == (["term"], Link.REJECTED, False)


def test_one_that_loses_its_predecessor_before_it_is_ready_serves_alone(dead: Scene) -> None:
    assert not dead.link.follow()
    assert (dead.link.state, dead.link.alone) == (Link.ALONE, True)
    assert dead.link.may_serve(2)
    dead.link.about_to_serve()
    assert (dead.link.is_active, dead.link.alone) == (True, False)
    assert dead.link.follow()


def test_one_that_loses_its_predecessor_after_it_has_asked_serves_alone(scene: Scene, dead: Scene) -> None:
    scene.link.may_serve(2)
    assert not scene.link.follow()
    assert scene.link.state is Link.ALONE_READY
    assert scene.link.may_serve(2)


def test_one_that_serves_already_is_active_as_soon_as_its_predecessor_is_lost(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.link.may_serve(2)
    scene.send("go")
    scene.board.header.ready_at = clock.now_ns()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    scene.predecessor.close()
    assert scene.link.follow()
    assert scene.link.is_active


def test_a_predecessor_that_closes_the_channel_and_stays_has_given_this_one_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.predecessor.close()
    assert not scene.link.follow()
    assert scene.link.state is Link.BOOTING
    monkeypatch.setattr(predecessor_link, "GIVEN_UP_AFTER", -1.0)
    with pytest.raises(HaltServer):
        scene.link.follow()
    assert scene.link.state is Link.REJECTED


def test_canary_may_grow_when_it_is_told_and_not_before(scene: Scene) -> None:
    scene.link.may_serve(ready=1)
    assert not scene.send("go")
    assert not scene.link.may_grow
    assert not scene.send("grow")
    assert scene.link.may_grow
    assert not scene.link.is_active
