"""The user's own app under the user's own gunicorn.conf.py, on a free port, apart from everything in production.

Settings that touch what a production service may own are overridden: in a configuration file of the rehearsal's that
runs the user's first, and on the command line, which wins over both the file and GUNICORN_CMD_ARGS. What the user
passes for those is refused, not silently dropped.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from zdd_web import proc, service
from zdd_web.errors import ZddError
from zdd_web.lifecycle import Phase

GENERATION_HEADER = "X-Zdd-Generation"

#: What the rehearsal decides itself, as gunicorn names it.
OWN = (
    "bind", "pidfile", "daemon", "reload", "config", "errorlog", "accesslog", "logconfig", "logconfig_json", "syslog",
    "control_socket", "certfile", "keyfile", "proc_name", "statsd_host", "reuse_port", "print_config", "check_config",
)  # fmt: skip

#: In the file: what has no option on the command line, or none that takes it back.
IN_FILE: dict[str, Any] = {
    "logconfig": None,
    "logconfig_dict": {},
    "logconfig_json": None,
    "syslog": False,
    "statsd_host": None,
    "capture_output": False,
    "certfile": None,
    "keyfile": None,
}

_CONFIGURATION = """\
# Written by `zdd-web rehearse`; the user's own configuration runs first, in this namespace.
__file__ = {path!r}
exec(compile(open(__file__).read(), __file__, "exec"), globals())
for _name in ("daemon", "reload"):
    if globals().get(_name):
        raise SystemExit("zdd_web: rehearse: " + __file__ + " sets " + _name + " = True: no rehearsal under that")
if "__zdd_web__" not in globals():
    raise SystemExit("zdd_web: rehearse: " + __file__ + " does not call zdd_web.gunicorn.install(globals()) at its end")
globals().update({overrides!r})
"""


class RehearsalError(ZddError):
    """The rehearsal cannot be held."""


def configuration_of(target: str) -> str:
    """Return the path of the configuration file that a directory or a file names.

    Raises `RehearsalError`.
    """
    path = os.path.join(target, "gunicorn.conf.py") if os.path.isdir(target) else target
    if not os.path.isfile(path):
        raise RehearsalError(f"{target}: no gunicorn.conf.py there: name the app's directory or its configuration file")
    return os.path.abspath(path)


def refuse_own(arguments: Sequence[str], source: str) -> None:
    """Raise `RehearsalError` for gunicorn arguments that the rehearsal must decide itself."""
    from gunicorn.config import Config

    try:
        parsed, _ = Config().parser().parse_known_args(list(arguments))
    except SystemExit:
        raise RehearsalError(f"{source}: gunicorn does not accept {shlex.join(arguments)}") from None
    for name in OWN:
        if getattr(parsed, name, None) not in (None, False):
            raise RehearsalError(f"{source}: {name} is the rehearsal's own to set: leave it out")


class Server:
    """The rehearsed service; a context manager that leaves nothing behind."""

    def __init__(self, target: str, arguments: Sequence[str] = (), listener: str | None = None) -> None:
        self.configuration = configuration_of(target)
        refuse_own(arguments, "GUNICORN ARGS")
        refuse_own(shlex.split(os.environ.get("GUNICORN_CMD_ARGS", "")), "GUNICORN_CMD_ARGS")
        self.name = f"rehearsal-{os.getpid()}"
        self._directory = tempfile.TemporaryDirectory(prefix="zdd-web-rehearse-")
        self.log_path = os.path.join(self._directory.name, "log")
        on_command_line = {
            "bind": "127.0.0.1:0",
            "pid": os.path.join(self._directory.name, "pid"),
            "error-logfile": "-",
            "access-logfile": os.devnull,
            "log-level": "info",
            "control-socket": os.path.join(self._directory.name, "control"),
        }
        if not _knows("control_socket"):
            del on_command_line["control-socket"]
        self.environ = {"ZDD_WEB_NAME": self.name, "ZDD_WEB_GENERATION_HEADER": GENERATION_HEADER}
        #: Where the rehearsal plays systemd, which holds the socket for as long as it likes.
        self._held: socket.socket | None = None
        if listener is not None:
            self.environ["ZDD_WEB_LISTENER"] = listener
        if listener == "systemd":
            self._held = socket.create_server(("127.0.0.1", 0), backlog=2048)
            del on_command_line["bind"]
        #: Shown to the user: every setting that is not theirs.
        self.overrides: dict[str, Any] = {**on_command_line, **IN_FILE, **self.environ}
        wrapper = os.path.join(self._directory.name, "gunicorn.conf.py")
        with open(wrapper, "w") as file:
            file.write(_CONFIGURATION.format(path=self.configuration, overrides=IN_FILE))
        options = [word for name, value in on_command_line.items() for word in (f"--{name}", value)]
        self.command = [sys.executable, "-m", "gunicorn", "-c", wrapper, *arguments, *options]
        self.port = 0
        self._first: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if self._held is not None:
            self._held.close()
        self._directory.cleanup()

    def start(self, timeout: float = 90.0) -> service.Generation:
        """Start gunicorn and wait until its first generation serves, at most `timeout` seconds.

        Raises `RehearsalError` with the end of its log.
        """
        # Upgrades orphan the masters that follow: their exit statuses shall still come to us.
        proc.become_subreaper()
        command = self.command
        pass_fds: tuple[int, ...] = ()
        if self._held is not None:
            pass_fds = (self._held.fileno(),)
            command = [sys.executable, "-m", "zdd_web.cli.rehearse.activate", str(pass_fds[0]), *command]
        with open(self.log_path, "wb") as log:
            self._first = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environ},
                pass_fds=pass_fds,
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._first.poll() is not None:
                raise RehearsalError(
                    f"the app did not start (exit status {self._first.returncode}):\n{self.log_tail()}"
                )
            generation = service.generation_of(self._first.pid)
            if generation is not None and generation.board.header.phase == Phase.SERVING:
                self.port = self._read_port()
                return generation
            time.sleep(0.05)
        raise RehearsalError(f"the app was not ready within {timeout:g} s:\n{self.log_tail()}")

    def _read_port(self) -> int:
        for line in self.log_tail(1_000_000).splitlines():
            _, found, rest = line.partition("Listening at: http://127.0.0.1:")
            if found:
                # In `reuseport` mode there are several, and each has its number behind the port.
                return int(re.match(r"\d+", rest)[0])  # type: ignore[index]
        raise RehearsalError(f"gunicorn did not log its port:\n{self.log_tail()}")

    def generations(self) -> list[service.Generation]:
        """Return the generations that are alive, oldest first."""
        return [each for each in service.generations() if each.board.header.name == self.name]

    def log_tail(self, size: int = 4_000) -> str:
        """Return the end of what the service has logged."""
        with open(self.log_path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - size))
            return log.read().decode("utf-8", "replace")

    def wait(self, generation: service.Generation, timeout: float) -> int | None:
        """Wait for the end of a master; return its exit status, None when it did not end in time.

        A negative status is the signal that killed it.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._first is not None and generation.pid == self._first.pid:
                if self._first.poll() is not None:
                    return self._first.returncode
            else:
                try:
                    pid, status = os.waitpid(generation.pid, os.WNOHANG)
                except ChildProcessError:
                    pid = 0  # not an orphan yet: its predecessor still retires
                if pid:
                    return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None

    def kill(self) -> None:
        """End whatever is left of the service, at once."""
        for generation in self.generations():
            proc.kill(generation.pid, generation.board.header.master_start, signal.SIGKILL)
            for pid, start in generation.board.worker_pids():
                proc.kill(pid, start, signal.SIGKILL)
        if self._first is not None and self._first.poll() is None:
            self._first.kill()
            self._first.wait()
        self._reap()

    def _reap(self) -> None:
        for _ in range(200):
            try:
                pid, _status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                time.sleep(0.005)


def _knows(setting: str) -> bool:
    from gunicorn.config import make_settings

    return setting in make_settings()
