"""What this master knows of its deploys: which release it runs, those before it, and what was done when.

The history stands in a sealed memfd of each generation (shared_text.py), which the next one inherits to read. Until the
handover the old generation writes how the upgrade ends; then the new one reads the history once more, and goes on with
it in a memfd of its own. So at each time one process writes, the active master, and a worker never can.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from zdd_web import history, release
from zdd_web.board import LAYOUT, Board, Header
from zdd_web.deploy_request import DeployRequest, RequestBox
from zdd_web.errors import UpgradeError
from zdd_web.gunicorn.handoff import releases
from zdd_web.gunicorn.handoff.inheritance import Inheritance
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.gunicorn.handoff.releases import Lineage
from zdd_web.history import Entry
from zdd_web.settings import ENV_PREFIX, Settings
from zdd_web.system import clock, shared_text
from zdd_web.system.shared_text import Document

_LINEAGE_NAME = "zdd_web-lineage"


@dataclass(eq=False, repr=False)
class _Attempt:
    """An upgrade that was asked for."""

    kind: str
    request: DeployRequest | None = None
    at: float = field(default_factory=time.time)
    began: int = field(default_factory=clock.now_ns)
    directory: str = ""
    commit: str = ""
    label: str = ""
    note: str = ""
    canary: str = ""
    #: What the next generation is to know of the releases before it.
    lineage: Lineage = field(default_factory=Lineage)


class Deploys:
    """This master's release, its lineage, and the history."""

    def __init__(self, header: Header, launch: Launch, chdir: str, setting: str, inherited: Inheritance | None) -> None:
        """Raises OSError when there is no memory for the history."""
        self._header, self._setting = header, setting
        self.own = releases.find(launch, chdir)
        self._code = os.path.realpath(chdir)
        self.lineage = Lineage()
        #: What was asked for last, and what is under way: what is refused meanwhile must not take its place.
        self._asked = self._attempt = _Attempt("deploy")
        self._lineage: Document | None = None
        self._inherited = -1
        self._kind = "start" if inherited is None else "takeover" if inherited.taken else "deploy"
        #: Whether how this generation came into service stands in its history.
        self._is_noted = False
        self._entries: tuple[Entry, ...] = ()
        if inherited is not None:
            self._inherit(inherited)
        self.identify(setting)
        self._document = Document(history.MEMFD_NAME, history.SIZE)
        self._box = RequestBox()
        header.history_fd = max(self._document.fd, 0)
        header.request_fd = max(self._box.fd, 0)
        self._write()

    def _inherit(self, inherited: Inheritance) -> None:
        if inherited.lineage >= 0:
            if _is_ours(inherited.lineage):
                with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OSError):
                    self.lineage = Lineage.decode(shared_text.read(inherited.lineage))
            # Nothing else of this process may have the environments that are in it.
            os.close(inherited.lineage)
        if inherited.history >= 0:
            self._inherited = inherited.history
            self._read_inherited()

    def _read_inherited(self) -> None:
        # One that has taken over as root from another user's master must not show as its own what that can write.
        if self._inherited < 0 or not _is_ours(self._inherited):
            return
        with contextlib.suppress(ValueError, OSError):
            self._entries = history.decode(shared_text.read(self._inherited))

    def identify(self, setting: str) -> None:
        """Find out which release this is, at the start and after a reload; `setting` is RELEASE."""
        self._setting, self._commit = setting, release.commit_of(self._code)
        self._header.release = release.label(setting, self._code, self._commit)

    @property
    def label(self) -> str:
        """What this generation's release is called."""
        return self._header.release

    # -- an upgrade of this generation

    def begin(self, kind: str = "deploy") -> None:
        """An upgrade was asked for; take what was asked of it. Raises `UpgradeError`, OSError."""
        self._asked = _Attempt(kind)
        if kind == "deploy":
            request = self._asked.request = self._box.take()
            if request is not None and request.back:
                self._asked.kind = "rollback"

    def forget_dead_requests(self, *, signal_waits: bool) -> None:
        """Remove what a command has asked for that ended before it sent SIGUSR2; the tick's call. Raises OSError.

        `signal_waits` when one was caught and not handled yet.
        """
        self._box.sweep(signal_waits=signal_waits)

    def started(self) -> None:
        """What was asked for is possible, and under way from now on."""
        self._attempt = self._asked

    def note_env_file(self, variables: Iterable[str]) -> None:
        """Note which variables ENV_FILE has given to this generation."""
        self.own = self.own._replace(from_env_file=tuple(variables))

    def refreshed(self, launch: Launch, variables: dict[str, str]) -> Launch:
        """Return the next generation's launch with what ENV_FILE says now; as it was, if that goes back."""
        if self._asked.kind == "rollback":
            return launch
        request = self._asked.request
        base = self.own if request is not None and request.to else self.lineage.configured or self.own
        return launch.refreshed(dict.fromkeys(base.from_env_file, ""), variables)

    def watch(self, settings: Settings) -> tuple[float, float]:
        """Return for how long the next generation is watched, seconds, and how many more errors it may have."""
        request = self._attempt.request or DeployRequest()
        if request.back:
            # The one that serves is what it is taken back from: nothing to be measured by.
            return 0.0, 1.0
        seconds = settings.watch if request.watch is None else request.watch
        return seconds, settings.max_errors if request.max_errors is None else request.max_errors

    def canary(self, settings: Settings) -> str:
        """Return with how many workers the next generation serves while it is watched; "" for all.

        Raises `UpgradeError` when that was asked for, and nothing is to be watched.
        """
        request = self._asked.request or DeployRequest()
        if request.back:
            return ""
        if not (settings.watch if request.watch is None else request.watch):
            if request.canary is not None:
                raise UpgradeError(
                    f"--canary {request.canary}: nothing is watched: give --watch SECONDS too, or set WATCH"
                )
            return ""
        return settings.canary if request.canary is None else request.canary

    def note_canary(self, workers: int, full: int) -> None:
        """Note with how many workers the new generation is watched."""
        self._attempt.canary = f"{workers} of {full} workers"

    @property
    def next_label(self) -> str:
        """What the release is called that the upgrade under way starts, as far as this process can tell."""
        return self._attempt.label

    def next_launch(self, release_dir: str) -> Launch:
        """Return the launch of the next generation; `release_dir` is RELEASE_DIR. Raises `UpgradeError`."""
        attempt, request = self._asked, self._asked.request
        usual = self.lineage.configured or self.own
        symlink = release_dir or usual.named
        if request is None or not (request.to or request.back):
            launch = usual.launch.following(release_dir)
            attempt.directory = os.path.realpath(symlink)
            attempt.lineage = self.lineage.after_deploy(self.own, attempt.directory, follows=True)
        elif not request.back:
            self._refuse_one_for_all()
            if not os.path.isdir(request.to):
                raise UpgradeError(
                    f"--to {request.to}: the master cannot see this directory: name one that it can read"
                )
            attempt.directory = os.path.realpath(request.to)
            launch = self.own.started_from(attempt.directory)
            attempt.lineage = self.lineage.after_deploy(self.own, attempt.directory, follows=False)
            attempt.note = _still(symlink, attempt.directory)
        else:
            self._refuse_one_for_all()
            back = self.lineage.previous(self.own)
            launch = back.as_it_was()
            attempt.directory = back.real
            attempt.lineage = self.lineage.after_rollback(self.own, back)
            attempt.note = _still(symlink, back.real)
        attempt.commit = release.commit_of(attempt.directory)
        setting = launch.environ.get(f"{ENV_PREFIX}RELEASE", "")
        attempt.label = release.label(setting, attempt.directory, attempt.commit)
        return launch

    def _refuse_one_for_all(self) -> None:
        if self.own.real.count("/") < 2:
            raise UpgradeError(
                f"this generation was started in {self.own.real}, which is not a release of its own: start the service "
                f"in its release's directory (WorkingDirectory=, --chdir)"
            )

    def hand_on(self, *, forks: bool) -> dict[str, Any]:
        """Return the descriptors that a successor inherits, as fields of `Inheritance`. Raises OSError."""
        self.close_lineage()
        if not forks or not hasattr(os, "memfd_create"):
            # Another unit has started it, with a command line and an environment that it will be started by again.
            return {"history": self._document.fd}
        text = self._asked.lineage.encode()
        self._lineage = Document(_LINEAGE_NAME, len(text))
        self._lineage.write(text)
        return {"history": self._document.fd, "lineage": self._lineage.fd}

    def close_lineage(self) -> None:
        """Give up the memory with the lineage, once the successor was forked, or could not be."""
        if self._lineage is not None:
            self._lineage.close()
            self._lineage = None

    def label_of(self, successor: Board | None) -> str:
        """Return what the successor calls its release, or what it is taken for if it has not come so far."""
        told = successor.header.release if successor is not None and successor.header.layout == LAYOUT else ""
        return told or self._attempt.label

    def ended(self, outcome: str, reason: str = "", label: str = "") -> None:
        """Note how the upgrade ended; `label` is what the successor calls its release."""
        attempt = self._asked if outcome == "refused" else self._attempt
        self._append(
            Entry(
                # What was lost was done before, at the time that an earlier entry has.
                at=time.time() if outcome == "lost" else attempt.at,
                kind=attempt.kind,
                outcome=outcome,
                generation=self._header.generation + 1,
                release=label or attempt.label,
                directory=attempt.directory,
                commit=attempt.commit,
                seconds=round(clock.since(attempt.began), 3),
                reason=reason,
                note=attempt.note if outcome == "done" else "",
                canary=attempt.canary,
            )
        )

    # -- this generation itself

    def follow(self, *, is_active: bool) -> None:
        """Take the history over once this generation serves and is the active one; the tick's call."""
        if self._is_noted or not is_active or not self._header.ready_at:
            return
        self._is_noted = True
        self._read_inherited()
        self._close_inherited()
        last = self._entries[-1] if self._entries else None
        number = self._header.generation
        if last is None or (last.generation, last.outcome) != (number, "done") or last.kind == "reload":
            took = (self._header.ready_at - self._header.started_at) / 1e9
            # Its predecessor was killed before it could note it, or is of a version without a history.
            self._append(self._of_this_generation(self._kind, "done", took, at=time.time() - took))
        else:
            self._write()

    def reloaded(self, outcome: str, seconds: float, reason: str = "") -> None:
        """Note how a reload (SIGHUP) ended."""
        self._append(self._of_this_generation("reload", outcome, seconds, at=time.time() - seconds, reason=reason))

    def _of_this_generation(self, kind: str, outcome: str, seconds: float, *, at: float, reason: str = "") -> Entry:
        return Entry(
            at=at, kind=kind, outcome=outcome, generation=self._header.generation, release=self.label,
            directory=self._code, commit=self._commit, seconds=round(seconds, 3), reason=reason,
        )  # fmt: skip

    def _append(self, entry: Entry) -> None:
        self._entries = history.appended(self._entries, entry)
        self._write()

    def _write(self) -> None:
        self._document.write(history.encode(self._entries))

    def _close_inherited(self) -> None:
        if self._inherited >= 0:
            os.close(self._inherited)
            self._inherited = -1

    def after_fork(self) -> None:
        """Close, in a worker, what is the master's alone: what it could write, or ask for, by it."""
        self._document.close()
        self._box.close()
        self.close_lineage()
        self._close_inherited()


def _is_ours(fd: int) -> bool:
    return os.fstat(fd).st_uid == os.geteuid()


def _still(symlink: str, to: str) -> str:
    """Return what a restart would start, where that is another release than the one that was named."""
    leads = os.path.realpath(symlink)
    if leads == to:
        return ""
    if leads == symlink:
        return f"a restart starts the release in {symlink}, and so does an upgrade without --to"
    return f"{symlink} still leads to {leads}, which a restart or the next upgrade starts: point it to {to}"
