"""An upgrade as the new generation sees it: adopt the listeners, get ready, ask, and take office."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from gunicorn.errors import HaltServer

from zdd_web import log, metrics
from zdd_web.board import LAYOUT, Board
from zdd_web.errors import BoardError
from zdd_web.gunicorn.adapter import compat, logger_class
from zdd_web.gunicorn.handoff.handover import Inheritance
from zdd_web.gunicorn.pid_file import PidFile
from zdd_web.gunicorn.sockets.manager import ListenerManager
from zdd_web.system import boot_log, clock, pauses, proc

#: Seconds in which a master that was killed is gone for good, also on a machine that is short of everything.
GIVEN_UP_AFTER = 5.0


class PredecessorLink:
    """What a new master inherited, and how far it has come towards office."""

    def __init__(self, inherited: Inheritance, server: Any, board: Board) -> None:
        self.inherited, self._server, self._board = inherited, server, board
        self._channel = inherited.open_channel()
        #: Copies what this generation says to the boot log, until it is in office.
        self.handler: boot_log.Handler | None = boot_log.Handler(inherited.boot_log)
        self.alone = False
        self.is_active = False
        self._asked = False
        self._told = False
        self._ended_at = clock.NEVER
        #: Why the predecessor has given up one that is not its child; None while it has not.
        self._given_up: str | None = None
        self.reopen_number = 0
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
    def predecessors(self) -> Board | None:
        """The predecessor's board; None when another version wrote it."""
        board = self._predecessors
        return board if board is not None and board.header.layout == LAYOUT else None

    def hide_pid_file(self) -> None:
        """Keep gunicorn from creating the pid file: it names the old master until this one is in office."""
        self._pid_file = self._server.cfg.pidfile or ""
        self._server.cfg.set("pidfile", None)

    def speak(self) -> None:
        """Give this master its own stderr back, now that what it says goes to the boot log by the handler as well."""
        assert self.handler is not None
        if logger_class.is_standard(self._server.log):
            logging.getLogger("gunicorn.error").addHandler(self.handler)
        else:
            self._server.log = logger_class.Copying(self._server.log, self.handler)
            log.use_gunicorn(self._server.log)
        if not self.inherited.taken:
            boot_log.give_back_stderr(self.inherited.stderr, self.inherited.boot_log)
        self._channel.send("speaks")

    def adopt(self, listening: ListenerManager) -> None:
        """Make the inherited listeners this master's, and introduce it to its predecessor.

        Raises `UpgradeError` or `ListenerError` when the configuration wants what cannot be had.
        """
        os.environ.pop("GUNICORN_FD", None)
        self._server.cfg.set("pidfile", self._pid_file or None)
        dropped = listening.take()
        # gunicorn's stop() unlinks Unix sockets while this is 0 (arbiter.py:449): not before they are ours alone.
        self._server.master_pid = self.inherited.predecessor
        compat.hold_control_server(self._server)
        path = os.path.abspath(self._pid_file) if self._pid_file else ""
        self._channel.send("hello", fd=self._board.fd, pid=os.getpid(), pid_file=path, dropped=dropped,
                            added_paths=listening.added_paths)  # fmt: skip

    def may_serve(self, ready: int) -> bool:
        """Ask the predecessor for the gate, once; tell whether it has answered or is gone."""
        if not self._asked:
            self._asked = True
            # Before anybody can have an answer of this generation.
            log.emit("upgrade.ready", pid=os.getpid(), workers=ready,
                     seconds=clock.since(self._board.header.started_at),
                     release=self._board.header.release)  # fmt: skip
            self._channel.send("ready", workers=ready)
        return self._told or self.alone

    def follow(self) -> bool:
        """Hear the predecessor; tell whether it is gone, and this object with it."""
        if self._predecessors is not None:
            metrics.carry(self._board, self._predecessors)
        while message := self._channel.receive():
            if message.kind == "go":
                self._told = True
            elif message.kind == "office":
                self._take_office()
            elif message.kind == "reopen":
                self.reopen_number = max(self.reopen_number, message.number("number"))
            elif message.kind == "given_up" and self._given_up is None:
                self._given_up = str(message.fields.get("reason", ""))
                self._end()
        if self._given_up is not None or not self._channel.ended:
            return False
        if not self.is_active and self._predecessor_lives():
            # A process's descriptors close a moment before it is gone. One that stays has given this master up.
            self._ended_at = self._ended_at or clock.now_ns()
            if pauses.since(self._ended_at) > GIVEN_UP_AFTER:
                raise HaltServer("the predecessor has given this generation up", 1)
            return False
        if not self.is_active and not self.alone:
            self.alone = True
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

    def _end(self) -> None:
        """End because the predecessor, which is not this one's parent and cannot simply kill it, has given it up."""
        log.emit("upgrade.given_up", logging.ERROR, predecessor=self.inherited.predecessor, reason=self._given_up)
        # Whatever it was told before: the listeners and their paths are the other's.
        self.is_active = False
        if self._board.header.ready_at:
            # Its gate is open: what it has in hand it finishes.
            self._server.handle_term()
            return
        # Nobody has been served, and one that hangs in an import does not hear SIGTERM.
        self._server.kill_workers(signal.SIGKILL)
        raise HaltServer(log.one_line(f"the running master has given this one up: {self._given_up}"), 1)

    def about_to_serve(self) -> None:
        """Take office where there is nobody who could hand it over: before anybody is served, if that is possible."""
        if self.alone and not self.is_active:
            self._take_office()

    def release(self) -> None:
        """Tell a predecessor that still retires not to come back: this generation ends because it was asked to."""
        self._channel.send("release")

    def reopen(self, number: int) -> None:
        """Have the predecessor open its log files again; see rotation.py."""
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
        """Remove a pid file that names this master before it has heard that it is in office, because it ends."""
        if self._pid_file:
            PidFile(self._pid_file, os.getpid()).unlink()

    def _take_office(self) -> None:
        # The channel stays open while the predecessor lives: its end would mean that this master has died.
        self.is_active = True
        self._server.master_pid = 0
        if self.handler is not None:
            self.handler.end()
            self.handler = None
        if self._pid_file:
            pid_file = self._server.pidfile = PidFile(self._pid_file, os.getpid())
            try:
                # `create` also uses up what a predecessor had prepared that was killed before it could commit it.
                if self.alone or pid_file.read() != os.getpid():
                    pid_file.create(os.getpid())
            except OSError as error:
                log.emit("internal.error", logging.ERROR, where="pid file", error=str(error))
        compat.resume_control_server(self._server)
