"""`zdd-web rehearse`: upgrade the user's own app under load, then stop it, and count what was lost."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from typing import TYPE_CHECKING, TextIO, cast

import click

from zdd_web import service
from zdd_web.cli import control
from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.output import save, say, show
from zdd_web.cli.rehearse.report import Handover, Report, StopResult, build
from zdd_web.cli.rehearse.server import RehearsalError, Server
from zdd_web.lifecycle import Phase
from zdd_web.settings import LISTENERS
from zdd_web.system import masking
from zdd_web.system.stdio import TolerantStream

if TYPE_CHECKING:
    from zdd_web.cli.rehearse.load import LoadThread

#: Load that runs before the first upgrade and between two, seconds: more than the second on each side that is judged.
SETTLE = 1.5


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("target", metavar="APP_DIR_OR_CONF")
@click.argument("arguments", metavar="[-- GUNICORN ARGS]", nargs=-1, type=click.UNPROCESSED)
@click.option("--upgrades", default=5, show_default=True, type=click.IntRange(0, 1000), help="How many upgrades.")
@click.option("--clients", default=32, show_default=True, type=click.IntRange(1, 1000), help="Concurrent clients.")
@click.option("--keepalive", default=0.5, show_default=True, type=click.FloatRange(0, 1),
              help="Share of them that keep their connections; half of those pause between requests.")  # fmt: skip
@click.option("--think", default=0.05, show_default=True, type=click.FloatRange(0, 60), help="That pause, seconds.")
@click.option("--path", "paths", multiple=True, default=("/",), show_default=True,
              help="What is requested, with GET; may be repeated.")  # fmt: skip
@click.option("--timeout", default=10.0, show_default=True, type=click.FloatRange(0.1, 600),
              help="Seconds after which a request counts as lost.")  # fmt: skip
@click.option("--listener", type=click.Choice(LISTENERS),
              help="Rehearse this listener mode and not the app's own; systemd's part is played.")  # fmt: skip
@click.option("--json", "json_file", type=click.File("w"), help="Write the report to FILE ('-' for stdout) too.")
def rehearse(
    target: str,
    arguments: tuple[str, ...],
    upgrades: int,
    clients: int,
    keepalive: float,
    think: float,
    paths: tuple[str, ...],
    timeout: float,
    listener: str | None,
    json_file: TextIO | None,
) -> None:
    """Prove that an app is upgraded and stopped without losing a request, under load, on this machine.

    Starts the app of APP_DIR_OR_CONF (a directory with a gunicorn.conf.py, or such a file for an app in the current
    directory) on a free port of 127.0.0.1, away from a service that may run beside it; sends load; upgrades it; stops
    it. Status 1 when anything was lost, 2 when the rehearsal could not be held.
    """
    from zdd_web.cli.rehearse.load import Load, LoadThread

    try:
        with Server(target, arguments, listener) as server:
            say(f"$ cd {shlex.quote(server.working_directory)} && {shlex.join(masking.command(server.command))}")
            say("overridden, away from production and from other services on this machine:")
            for name, value in server.overrides.items():
                say(f"  {name} = {masking.variable(name, str(value))}")
            generation = server.start()
            _warn_about_paths(server.port, paths, timeout)
            load = LoadThread(Load("127.0.0.1", server.port, paths, clients, keepalive, think, timeout))
            report = _perform(server, generation, load, upgrades)
            _show(report, server, json_file, {"target": target, "arguments": masking.command(arguments),
                                              "clients": clients, "keepalive": keepalive, "think": think,
                                              "paths": paths, "listener": listener})  # fmt: skip
    except (RehearsalError, ValueError) as error:
        raise CannotHelp(str(error)) from None
    sys.exit(0 if report.ok else 1)


def _warn_about_paths(port: int, paths: tuple[str, ...], timeout: float) -> None:
    import http.client

    for path in paths:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
        except OSError as error:
            raise RehearsalError(f"GET {path} before any upgrade: {error}") from None
        finally:
            connection.close()
        if status >= 500:
            raise RehearsalError(f"GET {path} answers {status} before any upgrade: choose another with --path")
        if status >= 400:
            say(f"note: GET {path} answers {status}; choose another with --path to exercise the app", err=True)


def _perform(server: Server, generation: service.Generation, load: LoadThread, upgrades: int) -> Report:
    handovers: list[Handover] = []
    with load:
        time.sleep(SETTLE)
        stderr = cast("TextIO", TolerantStream(sys.stderr))
        with click.progressbar(range(1, upgrades + 1), label="upgrades", file=stderr) as numbers:
            for number in numbers:
                handover, generation = _upgrade(server, generation, number)
                handovers.append(handover)
                time.sleep(SETTLE)
        stop = _stop(server, generation, load)
    return build(load.samples, handovers, stop=stop)


def _upgrade(server: Server, generation: service.Generation, number: int) -> tuple[Handover, service.Generation]:
    before = generation.board.header.generation
    outcome = control.upgrade(generation)
    done_at = time.monotonic()
    ready_at = None
    if outcome.ok:
        generation = service.is_active(server.generations())
        # From the board: the instant before the gate opened, on the clock that the samples have too.
        ready_at = generation.board.header.ready_at / 1e9
    else:
        say(f"\nupgrade {number} {outcome.reason}\n{outcome.log}", err=True)
    handover = Handover(
        number=number,
        from_generation=before,
        to_generation=outcome.generation,
        requested_at=outcome.requested_at,
        ready_at=ready_at,
        done_at=done_at,
        ok=outcome.ok,
        reason=outcome.reason,
    )
    return handover, generation


def _stop(server: Server, generation: service.Generation, load: LoadThread) -> StopResult:
    # Clients begin nothing new from now on, as after a load balancer took this backend out; what they have in hand
    # at the signal must still be answered.
    _until_alone(server, generation)
    # Before the signal, not beside it: who comes behind a closed door is refused, which is no loss of the service's.
    load.dismiss()
    in_flight = load.in_flight
    requested_at = time.monotonic()
    os.kill(generation.pid, signal.SIGTERM)
    status = server.wait(generation, timeout=_grace(generation))
    ended_at = time.monotonic()
    load.stop()
    left = server.generations()
    if status is None:
        reason = "the service did not end in time"
    elif status != 0:
        reason = f"the service ended with status {status}"
    elif left:
        reason = f"generations still alive: {', '.join(str(each.pid) for each in left)}"
    else:
        reason = ""
    return StopResult(requested_at, ended_at, status, in_flight, not reason, reason)


def _until_alone(server: Server, generation: service.Generation) -> None:
    # Its predecessor would take the exit status of the last one, and is bounded by the requests it still has.
    deadline = time.monotonic() + 30
    while len(server.generations()) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def _grace(generation: service.Generation) -> float:
    # The service's own GRACE_PERIOD is what it may take; a day would be its longest.
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        header = generation.board.header
        if header.phase == Phase.STOPPED:
            return 30.0
        if header.deadline:
            return max(0.0, header.deadline / 1e9 - time.monotonic()) + 5.0
        time.sleep(0.01)
    return 30.0


def _show(report: Report, server: Server, json_file: TextIO | None, arguments: dict[str, object]) -> None:
    from zdd_web.cli.rehearse.render import text

    show()
    show(text(report))
    if json_file is not None:
        written = json.dumps({**report.to_json(), "rehearsal": arguments, "overrides": server.overrides}, indent=2)
        save(written, json_file)
    if not report.ok:
        say("\nthe end of the service's log:\n" + server.log_tail(), err=True)
