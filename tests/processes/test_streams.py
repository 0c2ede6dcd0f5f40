"""A service whose stdout and stderr cannot be written starts, upgrades, reloads and stops as any other."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.processes.harness import Service, until
from zdd_web.board import Snapshot, WorkerState
from zdd_web.lifecycle import Phase


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    ours, theirs = os.openpty()
    os.close(ours)
    return theirs


STREAMS: dict[str, Callable[[], int | None]] = {
    "a pipe without a reader": closed_pipe,
    "a terminal that was closed": closed_terminal,
    "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "closed": lambda: None,
}


#: The harness's own asks for sys.stderr, which need not be there. What is printed stays in the buffer until the end of
#: the process, which must not make it another end.
PRINTS = """
print("the configuration")
from zdd_web.gunicorn import install
install(globals(), {settings})
"""


def spawn(service: Service, kind: str) -> subprocess.Popen[bytes]:
    """Start gunicorn with such streams."""
    fd = STREAMS[kind]()
    service.workers = 1
    command = service.command()
    if fd is None:
        # Of a process that has none the next file or socket becomes descriptor 0, 1 or 2.
        command = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    environ = {**os.environ, "ZDD_TEST_MARKER": service.marker, "PYTHONDONTWRITEBYTECODE": "1"}
    # What the configuration prints is to stay in a buffer: printed at once it would end the start by itself.
    environ.pop("PYTHONUNBUFFERED", None)
    service.process = subprocess.Popen(
        command, cwd=service.directory, env=environ, stdin=subprocess.DEVNULL, stdout=fd, stderr=fd,
        start_new_session=True,
    )  # fmt: skip
    if fd is not None:
        os.close(fd)
    return service.process


def serves(service: Service, generation: int) -> Snapshot:
    def found() -> Snapshot | None:
        snapshots = [each.snapshot() for each in service.generations()]
        return next((each for each in snapshots if (each.phase, each.generation) == (Phase.SERVING, generation)), None)

    return until(f"generation {generation}", found, service)


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_that_cannot_be_written_end_nothing(make_service: Callable[..., Service], kind: str) -> None:
    service = make_service()
    service.write_conf(PRINTS)
    spawn(service, kind)
    first = serves(service, 1)
    service.deploy("2", at_import="raise RuntimeError('a bad release')")
    failed = service.run("upgrade", "--name", service.name)
    assert (failed.returncode, "RuntimeError: a bad release" in failed.stderr) == (1, True), failed.stderr
    service.write_conf("raise RuntimeError('a bad configuration')\n")
    failed = service.run("upgrade", "--name", service.name)
    assert (failed.returncode, "a bad configuration" in failed.stderr) == (1, True), failed.stderr
    # The trial of a reload is a copy of the master, which must end as one.
    os.kill(first.master_pid, signal.SIGHUP)
    until("the end of the trial", lambda: len(service.processes()) == 2, service)
    assert serves(service, 1).master_pid == first.master_pid
    service.write_conf(PRINTS)
    service.deploy("3")
    done = service.run("upgrade", "--name", service.name)
    assert done.returncode == 0, done.stderr
    # The exit status of the first is that of a generation that was succeeded; then one is stopped.
    assert service.process is not None
    assert service.process.wait(30) == 0
    serves(service, 2)
    service.signal(signal.SIGTERM)
    service.ends(status=None)


@pytest.mark.parametrize("kind", STREAMS)
def test_stop_with_streams_that_cannot_be_written_has_status_0(make_service: Callable[..., Service], kind: str) -> None:
    service = make_service()
    service.write_conf(PRINTS)
    spawn(service, kind)
    serves(service, 1)
    service.stop(status=0)


@pytest.mark.parametrize("kind", STREAMS)
def test_start_that_fails_with_streams_that_cannot_be_written_has_status_1(
    make_service: Callable[..., Service], kind: str
) -> None:
    service = make_service()
    service.settings["grace"] = 1
    service.write_conf(PRINTS)
    assert spawn(service, kind).wait(30) == 1


@pytest.mark.parametrize("code", ["another = 1\n", "raise RuntimeError('a bad release')\n"])
def test_replacement_that_cannot_boot_does_not_end_the_service(make_service: Callable[..., Service], code: str) -> None:
    service = make_service()
    service.write_conf(PRINTS)
    spawn(service, "a pipe without a reader")
    first = serves(service, 1)
    good = (service.directory / "app.py").read_text()
    (service.directory / "app.py").write_text(code)
    os.kill(first.workers[0].pid, signal.SIGKILL)
    until("a failed boot", lambda: serves(service, 1).workers != first.workers and lost(service), service)
    (service.directory / "app.py").write_text(good)
    until(
        "a worker", lambda: [each for each in serves(service, 1).workers if each.state is WorkerState.SERVING], service
    )
    assert serves(service, 1).master_pid == first.master_pid
    assert service.process is not None
    assert service.process.poll() is None
    listener = serves(service, 1).listeners[0].name
    service.port = int(listener.rpartition(":")[2])
    assert service.get().status == 200
    service.stop(status=0)


def lost(service: Service) -> bool:
    """Tell whether the replacement was tried and has failed: it is tried again after a while."""
    return not serves(service, 1).workers
