"""An upgrade as the new generation sees it: adopt the listeners, get ready, ask, and become active."""

from __future__ import annotations

import logging
import os
import signal

from zdd_web import log, metrics
from zdd_web.board import LAYOUT, Board
from zdd_web.errors import BoardError
from zdd_web.gunicorn.adapter.arbiter import ArbiterFacade
from zdd_web.gunicorn.adapter.exits import HaltServer
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.pid_file import PidFile
from zdd_web.gunicorn.sockets.listener_manager import ListenerManager
from zdd_web.gunicorn.upgrade.states import LINK, Link, LinkEvent, after, knows
from zdd_web.system import boot_log, clock, pauses, proc

#: Seconds in which a master that was killed is gone for good, also on a machine that is short of everything.
GIVEN_UP_AFTER = 5.0


#: What the messages of a predecessor mean.
EVENTS = {"go": LinkEvent.GO, "office": LinkEvent.PROMOTED, "given_up": LinkEvent.REJECTED}


class PredecessorLink:
    """What a new master inherited, and how far it has come towards being the service."""

    def __init__(self, inherited: Inheritance, server: ArbiterFacade, board: Board) -> None:
        self.inherited, self._server, self._board = inherited, server, board
        self._channel = inherited.open_channel()
        #: Copies what this generation logs to the boot log, until it is active.
        self.handler: boot_log.Handler | None = boot_log.Handler(inherited.boot_log)
        self.state = Link.BOOTING
        #: When the channel was found to have ended while the predecessor lives.
        self._ended_at = clock.NEVER
        self.reopen_number = 0
        #: The predecessor says that the watch over this one, a canary, is passed.
        self.may_grow = False
        self._pid_file = ""
        self._predecessors: Board | None = None
        if inherited.board >= 0:
            try:
                self._predecessors = Board.open(inherited.board)
            except (BoardError, OSError, ValueError):
                pass  # counters begin anew
            finally:
                os.close(inherited.board)

    @property
    def is_active(self) -> bool:
        """Whether this generation is the service."""
        return self.state is Link.ACTIVE

    @property
    def alone(self) -> bool:
        """Whether the predecessor is gone, and has not handed over."""
        return self.state in (Link.ALONE, Link.ALONE_READY)

    def _move(self, event: LinkEvent) -> None:
        self.state = after(LINK, self.state, event)

    @property
    def predecessors(self) -> Board | None:
        """The predecessor's board; None when another version wrote it."""
        board = self._predecessors
        return board if board is not None and board.header.layout == LAYOUT else None

    def hide_pid_file(self) -> None:
        """Keep gunicorn from creating the pid file: it names the old master until this one is active."""
        self._pid_file = self._server.cfg.pidfile or ""
        self._server.cfg.set("pidfile", None)

    def speak(self) -> None:
        """Give this master its own stderr back, now that what it says goes to the boot log by the handler as well."""
        assert self.handler is not None
        self._server.copy_log_to(self.handler)
        log.use_gunicorn(self._server.log)
        if not self.inherited.taken:
            boot_log.give_back_stderr(self.inherited.stderr, self.inherited.boot_log)
        self._channel.send("speaks")

    def adopt(self, listening: ListenerManager, *, takes_connections: bool = False, canary: int = 0) -> None:
        """Make the inherited listeners this master's, and introduce it to its predecessor.

        `canary` is with how many workers this generation serves until its watch is passed; 0 for all.

        Raises `UpgradeError` or `ListenerError` when the configuration wants what cannot be had.
        """
        os.environ.pop("GUNICORN_FD", None)
        self._server.cfg.set("pidfile", self._pid_file or None)
        dropped = listening.take()
        # gunicorn's stop() unlinks Unix sockets while this is 0: not before they are ours alone.
        self._server.set_predecessor(self.inherited.predecessor)
        self._server.hold_control_server()
        path = os.path.abspath(self._pid_file) if self._pid_file else ""
        self._channel.send("hello", fd=self._board.fd, pid=os.getpid(), pid_file=path, dropped=dropped,
                            added_paths=listening.added_paths, exchange=takes_connections,
                           canary=canary)  # fmt: skip

    def may_serve(self, ready: int) -> bool:
        """Ask the predecessor for the gate, once; tell whether it has answered or is gone."""
        if knows(LINK, self.state, LinkEvent.READY):
            self._move(LinkEvent.READY)
            # Before any client can have an answer of this generation.
            log.emit("upgrade.ready", pid=os.getpid(), workers=ready,
                     seconds=clock.since(self._board.header.started_at),
                     release=self._board.header.release)  # fmt: skip
            self._channel.send("ready", workers=ready)
        return self.state in (Link.SERVING, Link.ALONE_READY, Link.ACTIVE)

    def follow(self) -> bool:
        """Read the predecessor's messages; return whether it is gone, and this object of no more use."""
        if self._predecessors is not None:
            metrics.carry(self._board, self._predecessors)
        while message := self._channel.receive():
            if message.kind == "reopen":
                self.reopen_number = max(self.reopen_number, message.number("number"))
                continue
            if message.kind == "grow":
                self.may_grow = True
                continue
            event = EVENTS.get(message.kind)
            if event is None or not knows(LINK, self.state, event):
                continue
            self._move(event)
            if event is LinkEvent.PROMOTED:
                self._become_active()
            elif event is LinkEvent.REJECTED:
                self._end(str(message.fields.get("reason", "")))
        if self.state is Link.REJECTED or not self._channel.ended:
            return False
        if not self.is_active and self._predecessor_lives():
            # A process's descriptors close a moment before it is gone. One that stays has given this master up.
            self._ended_at = self._ended_at or clock.now_ns()
            if pauses.since(self._ended_at) > GIVEN_UP_AFTER:
                self._move(LinkEvent.REJECTED)
                raise HaltServer("the predecessor has given this generation up", 1)
            return False
        if knows(LINK, self.state, LinkEvent.LOST):
            self._move(LinkEvent.LOST)
            log.emit(
                "predecessor.lost",
                logging.WARNING,
                predecessor=self.inherited.predecessor,
            )
        if self._board.header.ready_at:
            self.about_to_serve()
        if self._predecessors is not None:
            # Once more: what it wrote last.
            metrics.carry(self._board, self._predecessors)
        return self.is_active

    def _predecessor_lives(self) -> bool:
        if not self.inherited.taken:
            return os.getppid() == self.inherited.predecessor
        # One in another pid namespace cannot be looked at; it would have said that it gives this one up.
        return proc.alive(self.inherited.predecessor, self.inherited.predecessor_start)

    def _end(self, reason: str) -> None:
        """End because the predecessor, which is not this one's parent and cannot simply kill it, has given it up."""
        log.emit("upgrade.given_up", logging.ERROR, predecessor=self.inherited.predecessor, reason=reason)
        if self._board.header.ready_at:
            # Its gate is open: what it has in hand it finishes.
            self._server.handle_term()
            return
        # No request was accepted, and a worker that hangs in an import does not handle SIGTERM.
        self._server.kill_workers(signal.SIGKILL)
        raise HaltServer(log.one_line(f"the running master has given this one up: {reason}"), 1)

    def about_to_serve(self) -> None:
        """Become the service where no predecessor can hand it over: before the first request, if that is possible."""
        if knows(LINK, self.state, LinkEvent.SERVES):
            self._move(LinkEvent.SERVES)
            self._become_active(was_alone=True)

    def release(self) -> None:
        """Tell a predecessor that still retires not to come back: this generation ends because it was asked to."""
        self._channel.send("release")

    def reopen(self, number: int) -> None:
        """Have the predecessor open its log files again; see log_rotation.py."""
        self._channel.send("reopen", number=number)

    def fail(self, reason: str) -> None:
        """Tell the predecessor why there will be no handover."""
        self._channel.send("failed", reason=reason)

    def forget(self) -> None:
        """Close, in a worker, what is the master's alone: the channel, whose end shows the master's, and the board."""
        self._channel.close()
        if self._predecessors is not None:
            # One of zdd_web 0.1.0 is not sealed.
            self._predecessors.close()
            self._predecessors = None

    def unlink_pid_file(self) -> None:
        """Remove a pid file that names this master although it is not active, because it ends."""
        if self._pid_file:
            PidFile(self._pid_file, os.getpid()).unlink()

    def _become_active(self, *, was_alone: bool = False) -> None:
        # The channel stays open while the predecessor lives: its end would mean that this master has died.
        self._server.set_predecessor(0)
        if self.handler is not None:
            self.handler.end()
            self.handler = None
        if self._pid_file:
            pid_file = PidFile(self._pid_file, os.getpid())
            self._server.set_pid_file(pid_file)
            try:
                # `create` also uses up what a predecessor had prepared that was killed before it could commit it.
                if was_alone or pid_file.read() != os.getpid():
                    pid_file.create(os.getpid())
            except OSError as error:
                log.emit("internal.error", logging.ERROR, where="pid file", error=str(error))
        self._server.resume_control_server()
