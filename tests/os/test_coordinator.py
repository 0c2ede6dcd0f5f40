"""What the coordinator writes on the board, and what it leaves behind, without gunicorn."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.forks import spawn
from tests.helpers.generations import a_generation
from zdd_web import history
from zdd_web.board import Board, UpgradeState, cancel_request
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.handoff.channel import Channel
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.gunicorn.upgrade.coordinator import UpgradeCoordinator
from zdd_web.gunicorn.upgrade.deploy_history import Deploys
from zdd_web.gunicorn.upgrade.states import Successor
from zdd_web.gunicorn.upgrade.successor_process import Upgrade
from zdd_web.lifecycle import Phase
from zdd_web.system import shared_text
from zdd_web.system.boot_log import BootLog

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Scene:
    """A master whose successor is a process that waits."""

    def __init__(self) -> None:
        self.generation: Generation = a_generation(Board.private())
        self.header = self.generation.header
        server: Any = SimpleNamespace(
            pid_file=None,
            has_dirty_apps=False,
            set_successor=lambda pid: None,
            resume_control_server=lambda: None,
            has_queued=lambda sig: False,
        )
        anything: Any = Anything()
        self.listening, self.notifier = anything, anything
        self.deploys = Deploys(self.header, Launch("/", ("true",), {}, ()), "/", "", None)
        self.coordinator = UpgradeCoordinator(
            server,
            self.generation,
            self.deploys,
            None,
            self.listening,
            self.notifier,
            given=dict,
            reloads=lambda: False,
            all_leave=lambda: True,
            close_takeover=lambda: None,
        )
        # First: it must not have a copy of the channel.
        pid = spawn(signal.pause)
        ours, self.theirs = Channel.pair()
        self.boot_log = BootLog()
        self.upgrade = Upgrade(pid, ours, self.boot_log, 60, 0.0)
        self.coordinator.upgrade = self.upgrade

    def end(self) -> None:
        self.upgrade.end(now=True)
        self.coordinator.upgrade = None
        self.coordinator.after_fork()
        self.deploys.after_fork()
        self.theirs.close()
        self.boot_log.close()

    def ask_to_cancel(self) -> None:
        """Ask as `zdd-web cancel` does."""
        cancellation = self.coordinator._cancellation
        cancel_request.write(cancellation.request.fd, cancellation.number, os.getpid())

    @property
    def noted(self) -> list[tuple[str, str, str]]:
        """What the history has, by kind, outcome and reason."""
        entries = history.decode(shared_text.read(self.deploys._document.fd))
        return [(each.kind, each.outcome, each.reason) for each in entries]


class Anything:
    """Has every method; each does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **fields: None


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.end()


def test_request_while_an_upgrade_is_under_way_leaves_its_outcome_alone(scene: Scene) -> None:
    scene.header.upgrade_number, scene.header.upgrade_state = 1, UpgradeState.BOOTING
    scene.coordinator.request()
    assert (scene.header.upgrade_number, scene.header.upgrades_refused) == (2, 1)
    # The command that began it reads these.
    assert (scene.header.upgrade_state, scene.header.upgrade_reason) == (UpgradeState.BOOTING, "")
    # The command that sent the second signal reads these.
    assert scene.header.refused_number == 2
    assert scene.header.refused_reason == f"an upgrade is under way (successor {scene.upgrade.pid}): wait for its end"


def test_refused_request_while_nothing_is_under_way_is_the_outcome(scene: Scene) -> None:
    scene.coordinator.upgrade = None
    scene.header.phase = Phase.LAME_DUCK
    scene.coordinator.request()
    assert scene.header.upgrade_state == UpgradeState.REFUSED
    assert (scene.header.refused_number, scene.header.upgrade_number) == (1, 1)
    assert scene.header.refused_reason == scene.header.upgrade_reason
    assert scene.header.upgrade_reason.startswith("the generation is lame_duck")


@pytest.mark.parametrize(
    ("state", "before", "after"),
    [
        (Successor.PROMOTED, UpgradeState.COMMITTING, UpgradeState.FAILED),
        (Successor.ACTIVE, UpgradeState.DONE, UpgradeState.DONE),
    ],
)
def test_pipe_of_a_successor_that_is_lost_is_closed(
    scene: Scene, state: Successor, before: UpgradeState, after: UpgradeState
) -> None:
    scene.upgrade.state, scene.header.upgrade_state = state, before
    scene.generation.header.phase = Phase.RETIRING
    scene.theirs.close()
    scene.coordinator.follow()
    assert (scene.generation.phase, scene.header.upgrade_state) == (Phase.SERVING, after)
    assert scene.coordinator.upgrade is None
    # What the successor has started, and has the pipe as its stderr, gets EPIPE; nothing would drain it.
    assert scene.boot_log.output.reader < 0


def test_retiring_generation_counts_an_upgrade_as_done_once(scene: Scene) -> None:
    scene.upgrade.state, scene.header.upgrade_state = Successor.PROMOTED, UpgradeState.COMMITTING
    scene.generation.header.phase = Phase.RETIRING
    for _ in range(2):
        scene.coordinator.follow_last_accepts()
    assert (scene.header.upgrades_done, scene.header.upgrade_state) == (1, UpgradeState.DONE)
    assert scene.upgrade.state is Successor.ACTIVE


def test_stop_in_the_commit_window_keeps_the_successor_until_it_has_ended(scene: Scene) -> None:
    scene.upgrade.state, scene.header.upgrade_state = Successor.COMMITTING, UpgradeState.COMMITTING
    scene.coordinator.cancel(signal.SIGTERM)
    assert (scene.upgrade.state, scene.header.upgrade_state) == (Successor.STOPPING, UpgradeState.FAILED)
    assert not scene.coordinator.under_way
    assert list(scene.coordinator.failed) == [scene.upgrade]
    assert scene.noted == [("deploy", "cancelled", "the service was stopped")]


@pytest.mark.parametrize("kind", ["deploy", "takeover"])
def test_cancelled_upgrade_is_an_entry_of_the_history(scene: Scene, kind: str) -> None:
    scene.deploys.begin(kind)
    scene.deploys.started()
    scene.upgrade.state = Successor.BOOTING
    scene.ask_to_cancel()
    scene.coordinator.follow()
    assert not scene.coordinator.under_way
    assert scene.noted == [(kind, "cancelled", f"cancelled by process {os.getpid()} before it was ready")]


def test_refused_request_leaves_the_history_of_the_upgrade_under_way_alone(scene: Scene) -> None:
    scene.deploys.begin("takeover")
    scene.deploys.started()
    scene.coordinator.request()
    scene.theirs.close()
    scene.coordinator.follow()
    assert [entry[:2] for entry in scene.noted] == [("deploy", "refused"), ("takeover", "failed")]
