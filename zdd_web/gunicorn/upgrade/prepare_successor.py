"""What has to be there before a successor starts: the permission, its launch, its boot log and its inheritance."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from zdd_web import log
from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.context import Generation
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.handoff.launch import Launch, read_env_file
from zdd_web.gunicorn.handoff.parentage import Parentage
from zdd_web.gunicorn.sockets.listener_manager import ListenerManager
from zdd_web.gunicorn.upgrade.ancestors import Ancestors
from zdd_web.gunicorn.upgrade.deploy_history import Deploys
from zdd_web.gunicorn.upgrade.failed_successors import FailedSuccessors
from zdd_web.lifecycle import Phase
from zdd_web.settings import Settings
from zdd_web.system.boot_log import BootLog


class Preparation:
    """Of the upgrades of one master."""

    def __init__(
        self,
        server: ArbiterFacade,
        generation: Generation,
        deploys: Deploys,
        listening: ListenerManager,
        ancestors: Ancestors,
        failed: FailedSuccessors,
        *,
        was_started: bool,
        given: Callable[[], dict[str, Any]],
        reloads: Callable[[], bool],
    ) -> None:
        """`was_started` when this process was not forked by its predecessor.

        `given` returns the fields of `Inheritance` that other roles know, `reloads` whether a reload is under way.
        """
        self._server, self._generation, self._header = server, generation, generation.header
        self._deploys, self._listening = deploys, listening
        self.ancestors, self._failed = ancestors, failed
        self._was_started, self._given, self._reloads = was_started, given, reloads
        #: Of the last upgrade.
        self.boot_log: BootLog | None = None
        self._canary = ""
        env_file = generation.settings.env_file
        deploys.note_env_file(read_env_file(env_file) if env_file else ())

    @property
    def _settings(self) -> Settings:
        return self._generation.settings

    def inheritance(self, boot_log: BootLog, *, forks: bool = True) -> Inheritance:
        """Return what a successor is given, all but its end of the channel; `forks` as below. Raises OSError."""
        given = self._given()
        pipes: tuple[int, ...] = given.pop("stderr_pipes")
        return Inheritance(
            generation=self._header.generation + 1,
            predecessor=os.getpid(),
            channel=-1,
            boot_log=boot_log.fd,
            stderr=-1,
            stderr_pipes=(boot_log.output.reader, *pipes),
            ancestors=(*self.ancestors.alive(), (os.getpid(), self._header.master_start)),
            **self._listening.inheritance(),
            **given,
            board=self._generation.board.fd,
            **self._deploys.hand_on(forks=forks),
            canary=self._canary if forks else "",
        )

    def new_boot_log(self) -> BootLog:
        """Return an empty one in place of the last, and publish it. Raises OSError."""
        if self.boot_log is not None:
            self.boot_log.close()
            self.boot_log = None
        self.boot_log = BootLog()
        self._header.boot_log_fd = self.boot_log.fd
        return self.boot_log

    def close_unused_pipe(self) -> None:
        """Close the pipe of a boot log that no successor writes to."""
        if self.boot_log is not None:
            self.boot_log.output.close()

    def refuse_unless_possible(self, *, forks: bool = True) -> None:
        """Raise `UpgradeError` when no successor may be started now; `forks` when this process is to be its parent."""
        if self._generation.phase is not Phase.SERVING:
            raise UpgradeError(f"the generation is {self._generation.phase.label}: only a serving one can be upgraded")
        if self._reloads():
            raise UpgradeError("a reload (SIGHUP) is under way: wait for its end")
        # What rejected successors have left count too: they hold the listeners, and memory.
        alive = len(self.ancestors.alive()) + 1 + len(self._failed)
        if alive >= self._settings.max_generations:
            raise UpgradeError(
                f"{alive} generations are alive, and MAX_GENERATIONS = {self._settings.max_generations}: wait until an "
                f"older one has finished its requests (`zdd-web status` shows them), or raise the limit"
            )
        if self._server.has_dirty_apps:
            raise UpgradeError(
                "dirty_apps are set: their processes cannot be handed over, and a second master would end those of the "
                "first; restart the service, or move them into a service of their own"
            )
        if forks and not self._settings.keep_pid:
            parentage = Parentage.of_this_process(adopted=not self._was_started)
            obstacle = parentage.obstacle(parent_stays=self._settings.parent_stays)
            if obstacle:
                raise UpgradeError(obstacle)

    def next_launch(self) -> Launch:
        """Return how the successor is started. Raises `UpgradeError`, or `SettingsError` for ENV_FILE."""
        self._canary = self._deploys.canary(self._settings)
        launch = self._deploys.next_launch(self._settings.release_dir)
        if self._settings.env_file:
            launch = self._deploys.refreshed(launch, read_env_file(self._settings.env_file))
        obstacle = launch.obstacle()
        if obstacle:
            raise UpgradeError(f"{obstacle}: restore it, set RELEASE_DIR, or restart the service from where it is now")
        if launch.left:
            log.emit("upgrade.left_behind", logging.WARNING, variables=",".join(launch.left),
                     remedy="they name paths of the old release that the new one lacks, such as those of an agent: set "
                     "them in ENV_FILE, or restart the service")  # fmt: skip
        return launch

    def pre_exec(self, launch: Launch) -> Launch:
        """Return the launch as the user's `pre_exec` hook leaves it; called in the forked child."""
        given, removed = self._server.call_pre_exec()
        environ = {key: value for key, value in launch.environ.items() if key not in removed}
        return launch._replace(environ={**environ, **given})

    def after_fork(self) -> None:
        """Close, in a worker, what is the master's alone."""
        if self.boot_log is not None:
            self.boot_log.close()
            self.boot_log = None
