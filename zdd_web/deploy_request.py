"""What a command asks of a master beyond the signal itself: `upgrade --to DIR`, `upgrade --watch`, `rollback`.

A signal carries nothing. So each master has a memfd of a page, the request box, whose descriptor stands on its board.
A command writes what it wants into it, sends SIGUSR2, and follows the upgrade as always; a SIGUSR2 without a request is
an upgrade as it has always been. A plain `zdd-web upgrade` writes a request too, which asks for just that.

A master that is root runs what the request names, so only the master's own user and root may be able to make one. The
kernel sees to that: the box is reached through /proc/<master>/fd, which is these users' alone, and its mode is 0600, so
that a process that has got hold of a descriptor of it cannot open it again as another user. Workers close theirs when
they are forked. Where workers run as the master's user there is no boundary (SECURITY.md).

A command may die before the master takes its request. It holds a lock (flock) on the box for as long as it follows the
upgrade, which the kernel releases with the process, so the master knows. Pids would not do: the command may be in
another pid namespace. Two commands at a time exclude each other by the same lock. What is found of a dead command is
never obeyed, since the operator may have given it up, and a SIGUSR2 that is handled while it stands is refused: it may
be the dead command's, and a plain upgrade would be something that was not asked for. If no SIGUSR2 comes, none was
sent, and the request is removed: a later `kill -USR2` is a plain upgrade.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from zdd_web.errors import UpgradeError
from zdd_web.settings.values import NORMALISE
from zdd_web.system import memfd

MEMFD_NAME = "zdd_web-request"
#: The longest path that the kernel takes, each byte escaped by JSON, and what stands around it.
SIZE = 8 * mmap.PAGESIZE
LONGEST_PATH = 4095

#: How often a command tries to get the lock of a box, every ten milliseconds.
LOCK_ATTEMPTS = 20

#: A day, as for any setting in seconds.
LONGEST_WATCH = 86_400.0

F_ADD_SEALS, _SEAL, _SHRINK, _GROW = 1033, 0x1, 0x2, 0x4


class DeployRequest(NamedTuple):
    """`to` is the directory to start from, "" for the usual one; with `back`, that of the release that served before.

    `watch` is for how long both generations are to serve, in seconds, and `max_errors` by how much the share of errors
    of the new one may exceed that of the old one, from 0 to 1. `canary` is how many workers of the new one serve
    meanwhile, a number or a percentage, as the setting CANARY has it. None for what the settings say.
    """

    to: str = ""
    back: bool = False
    watch: float | None = None
    max_errors: float | None = None
    canary: str | None = None

    def __str__(self) -> str:
        """Return the command that asks for it.

        >>> str(DeployRequest(to="/srv/shop/releases/7", watch=60, canary="25%"))
        'upgrade --to /srv/shop/releases/7 --watch 60 --canary 25%'
        """
        if self.back:
            return "rollback"
        options = {
            "to": self.to or None,
            "watch": self.watch if self.watch is None else f"{self.watch:g}",
            "max-errors": self.max_errors if self.max_errors is None else f"{self.max_errors:g}",
            "canary": self.canary,
        }
        return " ".join(["upgrade", *(f"--{name} {value}" for name, value in options.items() if value is not None)])

    def encode(self) -> bytes:
        """Return it as it stands in the box."""
        if self.back:
            return json.dumps({"kind": "rollback"}).encode()
        kind = {"kind": "to", "directory": self.to} if self.to else {"kind": "upgrade"}
        options = {"watch": self.watch, "max_errors": self.max_errors, "canary": self.canary}
        return json.dumps(kind | {name: value for name, value in options.items() if value is not None}).encode()

    @classmethod
    def decode(cls, text: bytes) -> DeployRequest:
        """Read it. Raises `UpgradeError` for what is not a request, or asks for what cannot be.

        >>> DeployRequest.decode(b'{"kind": "to", "directory": "/srv/shop/releases/7"}')
        DeployRequest(to='/srv/shop/releases/7', back=False, watch=None, max_errors=None, canary=None)
        """
        try:
            fields = json.loads(text)
            kind, directory = fields.get("kind"), fields.get("directory", "")
        except (ValueError, AttributeError, RecursionError):
            raise UpgradeError("what was asked of this master is not a request: use `zdd-web` of its version") from None
        if kind == "rollback":
            return cls(back=True)
        if kind not in ("to", "upgrade"):
            raise UpgradeError(f"this version knows no request {kind!r}: use `zdd-web` of the running version")
        watch = _number("--watch", fields.get("watch"), most=LONGEST_WATCH)
        max_errors = _number("--max-errors", fields.get("max_errors"), most=1.0)
        canary = _canary(fields.get("canary"))
        if kind == "upgrade":
            return cls(watch=watch, max_errors=max_errors, canary=canary)
        if not isinstance(directory, str) or not os.path.isabs(directory) or "\0" in directory:
            raise UpgradeError(f"--to {directory!r}: must be an absolute path")
        if len(os.fsencode(directory)) > LONGEST_PATH:
            raise UpgradeError(f"--to: a path of more than {LONGEST_PATH} bytes")
        return cls(to=os.path.normpath(directory), watch=watch, max_errors=max_errors, canary=canary)


def _number(option: str, value: object, *, most: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise UpgradeError(f"{option} {value!r}: must be from 0 to {most:g}")
    return float(value)


def _canary(value: object) -> str | None:
    if value is None:
        return None
    try:
        if not isinstance(value, str) or not value:
            raise ValueError("must be a number of workers or a percentage")
        found: str = NORMALISE["canary"](value)
    except ValueError as error:
        raise UpgradeError(f"--canary {value!r}: {error}") from None
    return found


class RequestBox:
    """The master's side."""

    def __init__(self) -> None:
        """Raises OSError; where there is no memfd, `fd` is -1 and there are no requests."""
        self.fd = -1
        #: What stood there at the last look, of a command that had ended.
        self._ended_before = b""
        if not hasattr(os, "memfd_create"):
            return
        import fcntl

        self.fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # It is made with mode 0777: any user with a descriptor of it could open it again, to write.
        os.fchmod(self.fd, 0o600)
        os.ftruncate(self.fd, SIZE)
        fcntl.fcntl(self.fd, F_ADD_SEALS, _SEAL | _SHRINK | _GROW)

    def take(self) -> DeployRequest | None:
        """Return the request that stands, and remove it; None when there is none.

        Raises `UpgradeError` for one that cannot be, and for one whose command has ended: the SIGUSR2 that is handled
        may be that command's, which is not to become a plain upgrade. Raises OSError.
        """
        if not _has_text(self.fd):
            return None
        with _locked(self.fd) as has_ended:
            text = _text(self.fd)
            os.pwrite(self.fd, bytes(SIZE), 0)
        if not text:
            return None
        request = DeployRequest.decode(text)
        if has_ended and request != DeployRequest():
            raise UpgradeError(
                f"`zdd-web {request}` was asked for by a command that has ended before this master took it up, and "
                f"this SIGUSR2 may be its: ask again for what is wanted"
            )
        return request

    def sweep(self, *, signal_waits: bool) -> None:
        """Remove a request whose command has ended before it could send its signal; the tick's call. Raises OSError.

        `signal_waits` when a SIGUSR2 is there and not handled yet. One that was sent is there by the tick after that in
        which the command is found to have ended: if none is, none was sent.
        """
        before, self._ended_before = self._ended_before, b""
        if signal_waits or not _has_text(self.fd):
            return
        with _locked(self.fd) as has_ended:
            text = _text(self.fd)
            if has_ended and text == before:
                os.pwrite(self.fd, bytes(SIZE), 0)
            elif has_ended:
                self._ended_before = text

    def close(self) -> None:
        """Close it: in a worker, which must not be able to ask, and at the end."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _has_text(fd: int) -> bool:
    # Looked at in each turn of the master's loop: a byte, and not the whole.
    return fd >= 0 and os.pread(fd, 1, 0) not in (b"", b"\0")


def _text(fd: int) -> bytes:
    return os.pread(fd, SIZE, 0).rstrip(b"\0")


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[bool]:
    """Hold the box's lock if no command does; the value says whether that is so."""
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _lock(fd: int) -> bool:
    """Take the lock for a command. The master holds it for a moment when it looks at what a dead one has left."""
    import fcntl

    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01 if attempt < LOCK_ATTEMPTS - 1 else 0)
        else:
            return True
    return False


class Standing:
    """A request that stands in a master's box."""

    def __init__(self, fd: int, request: DeployRequest) -> None:
        self._fd, self._request = fd, request

    def taken(self) -> None:
        """The master has taken it: a plain one keeps no other command from asking, and being refused, meanwhile."""
        import fcntl

        if self._request == DeployRequest():
            fcntl.flock(self._fd, fcntl.LOCK_UN)


@contextlib.contextmanager
def standing(pid: int, number: int, owner: int, request: DeployRequest) -> Iterator[Standing]:
    """Have a request stand in the box that the master `pid` of user `owner` has as descriptor `number`.

    To be sent SIGUSR2 within. Raises `UpgradeError` when that is not its request box, or another command uses it, and
    OSError when this user may not write there. A plain request stands too: it replaces what a dead command has left,
    and does not take what a live one has not sent its signal for. Where that one's was taken, it need not stand.
    """
    with memfd.process_directory(pid) as directory:
        fd = memfd.open_named(directory, number, MEMFD_NAME, os.O_RDWR)
    try:
        if os.fstat(fd).st_uid != owner:
            raise UpgradeError(f"the request box of process {pid} was made by another user")
        if _lock(fd):
            os.pwrite(fd, request.encode().ljust(SIZE, b"\0"), 0)
        elif request != DeployRequest() or _has_text(fd):
            raise UpgradeError(
                "another command has an upgrade or a rollback of this service under way: wait for its end"
            )
        yield Standing(fd, request)
    finally:
        os.close(fd)
