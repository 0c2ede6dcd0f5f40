"""The user's own app under the user's own gunicorn.conf.py, on a free port, apart from everything in production.

Settings that touch what a production service may own are overridden: in a configuration file of the rehearsal's that
runs the user's first, on the command line, which wins over both the file and GUNICORN_CMD_ARGS, and, for zdd_web's own,
in the environment, which wins over all that an app may set. What the user passes for those is refused, not silently
dropped.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any

from zdd_web import service
from zdd_web.cli.rehearse import read_configuration, socket_activation
from zdd_web.cli.rehearse.read_configuration import Configured
from zdd_web.cli.rehearse.releases import Releases
from zdd_web.errors import ZddError
from zdd_web.lifecycle import Phase
from zdd_web.system import masking, proc

GENERATION_HEADER = "X-Zdd-Generation"

#: How long the app may take to be there, seconds.
STARTS_WITHIN = 90.0

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

#: zdd_web's own: what the app would share with a service on this machine, or is known by.
SHARED = {
    "ZDD_WEB_GENERATION_HEADER": GENERATION_HEADER,
    "ZDD_WEB_TAKEOVER": "no",
    "ZDD_WEB_TAKEOVER_SOCKET": "",
    "ZDD_WEB_TERMINATION_LOG": "",
}

#: zdd_web's own that depend on what the app has.
DEPENDING = ("ZDD_WEB_NAME", "ZDD_WEB_LISTENER", "ZDD_WEB_SYSTEMD_NAMES", "ZDD_WEB_PROBE_BIND")

_CONFIGURATION = """\
# Written by `zdd-web rehearse`; the user's own configuration runs first, in this namespace.
import os as _os
_here = [_each for _each in {releases!r} if (_os.getcwd() + "/").startswith(_each + "/")]
__file__ = _os.path.join(_here[0], {inner!r}) if _here else {path!r}
exec(compile(open(__file__).read(), __file__, "exec"), globals())
for _name in ("daemon", "reload"):
    if globals().get(_name):
        raise SystemExit("zdd_web: rehearse: " + __file__ + " sets " + _name + " = True: no rehearsal under that")
if "__zdd_web__" not in globals():
    raise SystemExit("zdd_web: rehearse: " + __file__ + " does not call zdd_web.gunicorn.install(globals()) at its end")
globals().update({overrides!r})
# Where it would win over the environment.
_env = globals().get("raw_env") or []
_env = _env.split(",") if isinstance(_env, str) else _env
raw_env = [each for each in _env if each.partition("=")[0].strip() not in {variables!r}]
"""

#: Behind it, for a release that is broken on purpose: its app cannot be imported, as after a typing error. The app's
#: own files are not touched.
_BREAKABLE = """\
import sys as _sys
if _os.path.exists({marker!r}):
    class _Broken:
        def find_spec(self, name, path=None, target=None):
            if name == {module!r}:
                raise ImportError("broken on purpose by `zdd-web rehearse`: " + name)
    if not {module!r}:
        raise ImportError("broken on purpose by `zdd-web rehearse`")
    _sys.modules.pop({module!r}, None)
    _sys.meta_path.insert(0, _Broken())
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
    from zdd_web.gunicorn.adapter import config

    try:
        parsed = config.parse(arguments)
    except SystemExit:
        raise RehearsalError(f"{source}: gunicorn does not accept {shlex.join(masking.command(arguments))}") from None
    for name in OWN:
        if getattr(parsed, name, None) not in (None, False):
            raise RehearsalError(f"{source}: {name} is the rehearsal's own to set: leave it out")
    for each in parsed.raw_env or []:
        variable = each.partition("=")[0]
        if variable in SHARED or variable in DEPENDING:
            raise RehearsalError(f"{source}: {variable} is the rehearsal's own to set: leave it out")


def in_place_of(app: Configured, mode: str | None) -> dict[str, str]:
    """Return what else of the app's settings is overridden, as variables, when `mode` is rehearsed (None for its own).

    >>> in_place_of(Configured("systemd", {"web": "app", "health": "probe"}, True, False), "fd")
    {'ZDD_WEB_LISTENER': 'fd', 'ZDD_WEB_SYSTEMD_NAMES': '', 'ZDD_WEB_PROBE_BIND': '127.0.0.1:0'}
    """
    changed = {}
    if mode is not None:
        changed["ZDD_WEB_LISTENER"] = mode
    without_names = bool(app.systemd_names) and (mode or app.listener) != "systemd"
    if without_names:
        # No process would pass them.
        changed["ZDD_WEB_SYSTEMD_NAMES"] = ""
    if app.has_probe_bind or (without_names and app.has_probe_port):
        changed["ZDD_WEB_PROBE_BIND"] = "127.0.0.1:0"
    return changed


class Server:
    """The rehearsed service; a context manager that leaves nothing behind."""

    def __init__(
        self,
        target: str,
        arguments: Sequence[str] = (),
        listener: str | None = None,
        options: Mapping[str, str] | None = None,
        *,
        with_releases: bool = False,
    ) -> None:
        """`options` are gunicorn's, by their names on its command line, besides those of every rehearsal.

        `with_releases` starts the app in a release directory, so that it can be deployed from another one.
        """
        self._options = dict(options or {})
        self.configuration = configuration_of(target)
        refuse_own(arguments, "GUNICORN ARGS")
        refuse_own(shlex.split(os.environ.get("GUNICORN_CMD_ARGS", "")), "GUNICORN_CMD_ARGS")
        #: Where gunicorn would be started: in the app's directory, or where `gunicorn -c FILE` would find the app.
        self.working_directory = os.path.abspath(target) if os.path.isdir(target) else os.getcwd()
        self.name = f"rehearsal-{os.getpid()}"
        self.environ = {"ZDD_WEB_NAME": self.name, **SHARED}
        self._with_releases = with_releases
        self.releases: Releases | None = None
        self._arguments, self._mode = arguments, listener
        self._directory = tempfile.TemporaryDirectory(prefix="zdd-web-rehearse-")
        self.log_path = os.path.join(self._directory.name, "log")
        self._marker = os.path.join(self._directory.name, "broken")
        #: Shown to the user: every setting that is not theirs.
        self.overrides: dict[str, Any] = {}
        self.command: list[str] = []
        #: Where the rehearsal plays systemd, which holds its sockets for as long as it likes.
        self._held: dict[str, socket.socket] = {}
        self.port = 0
        self._first: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        try:
            self._prepare()
        except BaseException:
            self._remove_directories()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for held in self._held.values():
            held.close()
        self._remove_directories()

    def _remove_directories(self) -> None:
        if self.releases is not None:
            self.releases.close()
        self._directory.cleanup()

    def _prepare(self) -> None:
        wrapper = os.path.join(self._directory.name, "gunicorn.conf.py")
        with open(wrapper, "w") as file:
            # The environment as the app has it, to begin with.
            file.write(self._wrapping(variables=()))
        app = self._ask(wrapper)
        if self._with_releases:
            self._make_releases(app)
        self.environ.update(in_place_of(app, self._mode))
        if (self._mode or app.listener) == "systemd":
            names = app.systemd_names or {"web": "app"}
            self._held = {name: socket.create_server(("127.0.0.1", 0), backlog=2048) for name in names}
        with open(wrapper, "w") as file:
            file.write(self._wrapping(variables=(*SHARED, *DEPENDING)))
            file.write(_BREAKABLE.format(marker=self._marker, module=app.module))
        on_command_line = self._on_command_line()
        self.overrides = {**on_command_line, **IN_FILE, **self.environ}
        options = [word for name, value in on_command_line.items() for word in (f"--{name}", value)]
        self.command = [sys.executable, "-m", "gunicorn", "-c", wrapper, *self._arguments, *options]

    def _make_releases(self, app: Configured) -> None:
        try:
            self.releases = Releases(self.working_directory, self.configuration, app.chdir)
        except OSError as error:
            raise RehearsalError(f"{self.working_directory} cannot be laid out as two releases: {error}") from None
        self.working_directory = self.releases.current
        # As a shell would: by it the master knows the symlink that it was started by.
        self.environ["PWD"] = self.working_directory

    def _wrapping(self, variables: tuple[str, ...]) -> str:
        inner = "" if self.releases is None else self.releases.inner
        releases = (self.releases.a, self.releases.b) if self.releases is not None and inner else ()
        return _CONFIGURATION.format(
            path=self.configuration, overrides=IN_FILE, variables=variables, releases=releases, inner=inner
        )

    def _on_command_line(self) -> dict[str, str]:
        options = {
            "pid": os.path.join(self._directory.name, "pid"),
            "error-logfile": "-",
            "access-logfile": os.devnull,
            "log-level": "info",
            **self._options,
        }
        if not self._held:
            options["bind"] = "127.0.0.1:0"
        if _knows("control_socket"):
            options["control-socket"] = os.path.join(self._directory.name, "control")
        return options

    def _ask(self, wrapper: str) -> Configured:
        """Have the configuration loaded, and return what it sets. Raises `RehearsalError`."""
        answer = os.path.join(self._directory.name, "configured")
        command = [*_run(read_configuration), answer, "-c", wrapper, *self._arguments]
        with open(self.log_path, "wb") as log:
            asked = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.working_directory
            )
            try:
                status = asked.wait(STARTS_WITHIN)
            except BaseException as error:
                asked.kill()
                asked.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise RehearsalError(
                    f"{self.configuration} did not load within {STARTS_WITHIN:g} s:\n{self.log_tail()}"
                ) from None
        if status or not os.path.exists(answer):
            raise RehearsalError(f"the app did not start (exit status {status}):\n{self.log_tail()}")
        with open(answer) as file:
            return Configured(**json.load(file))

    def start(self, timeout: float = STARTS_WITHIN) -> service.Generation:
        """Start gunicorn and wait until its first generation serves, at most `timeout` seconds.

        Raises `RehearsalError` with the end of its log.
        """
        # Upgrades orphan the masters that follow: their exit statuses shall still come to us.
        proc.become_subreaper()
        command = self.command
        sockets = {name: held.fileno() for name, held in self._held.items()}
        if sockets:
            command = [*_run(socket_activation), socket_activation.spell(sockets), *command]
        with open(self.log_path, "wb") as log:
            self._first = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environ},
                cwd=self.working_directory,
                pass_fds=tuple(sockets.values()),
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

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Have every generation that starts meanwhile fail to import the app."""
        with open(self._marker, "w"):
            pass
        try:
            yield
        finally:
            os.unlink(self._marker)

    def generations(self) -> list[service.Generation]:
        """Return the generations that are alive, oldest first."""
        return [each for each in service.generations(os.geteuid()) if each.header.name == self.name]

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
    from zdd_web.gunicorn.adapter import config

    return config.knows(setting)


def _run(module: ModuleType) -> list[str]:
    return [sys.executable, "-m", module.__name__]
