"""What a command asks of a master beyond the signal itself: `upgrade --to DIR`, `upgrade --watch`, `rollback`.

A signal carries nothing. So each master has a memfd of a page, the request box, whose descriptor stands on its board.
A command writes what it wants into it, sends SIGUSR2, and follows the upgrade as always; a SIGUSR2 without a request is
an upgrade as it has always been.

A master that is root runs what the request names, so only the master's own user and root may be able to make one. The
kernel sees to that: the box is reached through /proc/<master>/fd, which is these users' alone, and its mode is 0600, so
that a process that has got hold of a descriptor of it cannot open it again as another user. Workers close theirs when
they are forked. Where workers run as the master's user there is no boundary (SECURITY.md).

A command that dies between its two steps must not leave a request for the next `kill -USR2` to find. It holds a lock
(flock) on the box for as long as it follows the upgrade, which the kernel releases with the process; a request whose
lock is not held is void. Pids would not do: the command may be in another pid namespace. Two commands at a time
exclude each other by the same lock.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

from zdd_web.errors import UpgradeError
from zdd_web.settings.values import NORMALISE
from zdd_web.system import memfd

MEMFD_NAME = "zdd_web-request"
#: The longest path that the kernel takes, each byte escaped by JSON, and what stands around it.
SIZE = 8 * mmap.PAGESIZE
LONGEST_PATH = 4095

#: A day, as for any setting in seconds.
LONGEST_WATCH = 86_400.0

F_ADD_SEALS, _SEAL, _SHRINK, _GROW = 1033, 0x1, 0x2, 0x4


@dataclass(frozen=True)
class DeployRequest:
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
        if not hasattr(os, "memfd_create"):
            return
        import fcntl

        self.fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # It is made with mode 0777: any user with a descriptor of it could open it again, to write.
        os.fchmod(self.fd, 0o600)
        os.ftruncate(self.fd, SIZE)
        fcntl.fcntl(self.fd, F_ADD_SEALS, _SEAL | _SHRINK | _GROW)

    def take(self) -> DeployRequest | None:
        """Return the request that stands, and remove it; None when there is none. Raises `UpgradeError`, OSError."""
        if self.fd < 0:
            return None
        text = os.pread(self.fd, SIZE, 0).rstrip(b"\0")
        if not text:
            return None
        held = _is_locked(self.fd)
        os.pwrite(self.fd, bytes(SIZE), 0)
        return DeployRequest.decode(text) if held else None

    def close(self) -> None:
        """Close it: in a worker, which must not be able to ask, and at the end."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _is_locked(fd: int) -> bool:
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


@contextlib.contextmanager
def standing(pid: int, number: int, owner: int, request: DeployRequest) -> Iterator[None]:
    """Have a request stand in the box that the master `pid` of user `owner` has as descriptor `number`.

    To be sent SIGUSR2 within. Raises `UpgradeError` when that is not its request box, or another command uses it, and
    OSError when this user may not write there.
    """
    import fcntl

    with memfd.process_directory(pid) as directory:
        fd = memfd.open_named(directory, number, MEMFD_NAME, os.O_RDWR)
    try:
        if os.fstat(fd).st_uid != owner:
            raise UpgradeError(f"the request box of process {pid} was made by another user")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpgradeError(
                "another command has an `upgrade --to` or a `rollback` of this service under way: wait for its end"
            ) from None
        os.pwrite(fd, request.encode().ljust(SIZE, b"\0"), 0)
        yield
    finally:
        os.close(fd)
