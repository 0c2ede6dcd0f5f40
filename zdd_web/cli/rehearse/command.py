"""`zdd-web rehearse`: upgrade the user's own app under load, then stop it, and count what was lost."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from zdd_web.cli.errors import CannotHelp
from zdd_web.cli.output import save, say, show
from zdd_web.cli.rehearse import request_mix
from zdd_web.settings import LISTENERS
from zdd_web.system import masking
from zdd_web.system.stdio import TolerantStream

if TYPE_CHECKING:
    from ssl import SSLContext

    from zdd_web.cli.rehearse.rehearsal import Plan
    from zdd_web.cli.rehearse.report import Report

#: The scenarios besides upgrades, in the order of `all`: scenarios.SCENARIOS, which `--help` need not import.
SCENARIOS = ("failed-upgrade", "rollback", "reload", "recycle", "kill-worker")

#: Requests after which a worker is recycled, where that is rehearsed: a few seconds of load.
MAX_REQUESTS = 500


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("target", metavar="APP_DIR_OR_CONF", required=False)
@click.argument("arguments", metavar="[-- GUNICORN ARGS]", nargs=-1, type=click.UNPROCESSED)
@click.option("--upgrades", default=5, show_default=True, type=click.IntRange(0, 1000), help="How many upgrades.")
@click.option("--scenario", "scenarios", multiple=True, type=click.Choice([*SCENARIOS, "all"]),
              help="What else is done to the service, after the upgrades; may be repeated.")  # fmt: skip
@click.option("--url", metavar="URL", help="Measure the service there instead, which is not started or stopped.")
@click.option("--do", "command", metavar="COMMAND", help="With --url: what is run under load, such as a deploy.")
@click.option("--cacert", metavar="FILE", type=click.Path(exists=True, dir_okay=False),
              help="With an https URL: trust the CAs of this PEM file instead of this machine's.")  # fmt: skip
@click.option("--insecure", is_flag=True, help="With an https URL: check no certificate.")
@click.option("--clients", default=32, show_default=True, type=click.IntRange(1, 1000), help="Concurrent clients.")
@click.option("--keepalive", default=0.5, show_default=True, type=click.FloatRange(0, 1),
              help="Share of them that keep their connections; half of those pause between requests.")  # fmt: skip
@click.option("--think", default=0.05, show_default=True, type=click.FloatRange(0, 60), help="That pause, seconds.")
@click.option("--rate", type=click.FloatRange(0, 100_000, min_open=True),
              help="Requests a second, sent when they are due whether or not earlier ones were answered.")  # fmt: skip
@click.option("--duration", default=0.0, type=click.FloatRange(0, 86_400), metavar="SECONDS",
              help="How long the load lasts at least; what is done is spread over it.")  # fmt: skip
@click.option("--path", "paths", multiple=True, metavar="[WEIGHT:]PATH",
              help="What is requested, with GET; may be repeated.  [default: /]")  # fmt: skip
@click.option("--upload", "uploads", multiple=True, metavar="[WEIGHT:]PATH",
              help="Where a body of --upload-size is sent to, with POST; may be repeated.")  # fmt: skip
@click.option("--upload-size", default=request_mix.UPLOAD, show_default=True, type=click.IntRange(0, 100_000_000),
              help="Bytes.")  # fmt: skip
@click.option("--stream", "streams", multiple=True, metavar="[WEIGHT:]PATH",
              help="What is requested and may take any time, if it is never silent for --timeout.")  # fmt: skip
@click.option("--timeout", default=10.0, show_default=True, type=click.FloatRange(0.1, 600),
              help="Seconds after which a request counts as lost.")  # fmt: skip
@click.option("--listener", type=click.Choice(LISTENERS),
              help="Rehearse this listener mode and not the app's own; systemd's part is played.")  # fmt: skip
@click.option("--json", "json_file", type=click.File("w"), help="Write the report to FILE ('-' for stdout) too.")
@click.option("--html", "html_file", type=click.File("w"), help="Write it to FILE as a page with charts too.")
@click.option("--junit", "junit_file", type=click.File("w"), help="Write it to FILE as JUnit XML too.")
@click.option("-v", "--verbose", is_flag=True, help="Print every setting that is overridden.")
def rehearse(
    target: str | None,
    arguments: tuple[str, ...],
    upgrades: int,
    scenarios: tuple[str, ...],
    url: str | None,
    command: str | None,
    cacert: str | None,
    insecure: bool,
    clients: int,
    rate: float | None,
    duration: float,
    keepalive: float,
    think: float,
    paths: tuple[str, ...],
    uploads: tuple[str, ...],
    upload_size: int,
    streams: tuple[str, ...],
    timeout: float,
    listener: str | None,
    json_file: TextIO | None,
    html_file: TextIO | None,
    junit_file: TextIO | None,
    verbose: bool,
) -> None:
    """Prove that an app is upgraded and stopped without losing a request, under load, on this machine.

    Starts the app of APP_DIR_OR_CONF (a directory with a gunicorn.conf.py, or such a file for an app in the current
    directory) on a free port of 127.0.0.1, away from a service that may run beside it; sends load; upgrades it; stops
    it. Or, with --url, sends load to a service that runs while any command deploys it.

    Status 1 when anything was lost or the rehearsal was interrupted, 2 when it could not be held.
    """
    if (target is None) == (url is None):
        raise click.UsageError("give APP_DIR_OR_CONF or --url" + (", not both" if url else ""))
    if command is not None and url is None:
        raise click.UsageError("--do is run for a service that is measured from outside: give --url too")
    if url is not None and (scenarios or listener):
        raise click.UsageError("--scenario and --listener are for a service that the rehearsal starts, not for --url")
    if (cacert or insecure) and not (url or "").startswith("https:"):
        raise click.UsageError("--cacert and --insecure are for a --url that begins with https:")
    if cacert and insecure:
        raise click.UsageError("--insecure checks no certificate, so --cacert would have no effect: give one of them")
    from zdd_web.cli.rehearse.rehearsal import Plan
    from zdd_web.cli.rehearse.server import RehearsalError

    asked: dict[str, Any] = {
        "target": target, "arguments": masking.command(arguments), "clients": clients, "keepalive": keepalive,
        "think": think, "paths": paths or ("/",), "listener": listener, "url": url, "rate": rate,
        "cacert": cacert, "insecure": insecure,
        "duration": duration, "scenarios": scenarios, "uploads": uploads, "streams": streams,
    }  # fmt: skip
    try:
        wanted = [request_mix.parse(each) for each in paths]
        wanted += [request_mix.parse(each, upload=upload_size) for each in uploads]
        wanted += [request_mix.parse(each, stream=True) for each in streams]
        plan = Plan(
            requests=wanted,
            clients=clients,
            keepalive=keepalive,
            think=think,
            timeout=timeout,
            rate=rate,
            duration=duration,
            upgrades=upgrades if url is None else 0,
            scenarios=SCENARIOS if "all" in scenarios else scenarios,
        )
        with _interrupted_by_sigterm():
            if url is not None:
                report, overrides, tail = *_measure(url, command, plan, cacert, insecure), ""
            else:
                report, overrides, tail = _rehearse(str(target), arguments, listener, plan, verbose)
    except (RehearsalError, ValueError) as error:
        raise CannotHelp(str(error)) from None
    _show(report, tail, json_file, {"rehearsal": asked, "overrides": overrides})
    _write(report, html_file, junit_file)
    sys.exit(0 if report.ok else 1)


def _rehearse(
    target: str, arguments: Sequence[str], listener: str | None, plan: Plan, verbose: bool
) -> tuple[Report, dict[str, Any], str]:
    from dataclasses import replace

    from zdd_web.cli.rehearse.rehearsal import Course, Progress
    from zdd_web.cli.rehearse.server import Server

    plan = plan if plan.requests else replace(plan, requests=[request_mix.Request("/")])
    options = {"max-requests": str(MAX_REQUESTS)} if "recycle" in plan.scenarios else {}
    with Server(target, arguments, listener, options, with_releases="rollback" in plan.scenarios) as server:
        say(f"$ cd {shlex.quote(server.working_directory)} && {shlex.join(masking.command(server.command))}")
        _say_overrides(server.overrides, verbose)
        generation = server.start()
        _warn_about_paths("127.0.0.1", server.port, plan)
        with _progress_bar(plan.upgrades) as upgrade:
            progress = Progress(lambda text: say(text, err=True), upgrade)
            report = Course(server, generation, plan, progress).run()
        return report, server.overrides, server.log_tail()


def _say_overrides(overrides: dict[str, Any], verbose: bool) -> None:
    if verbose:
        say("overridden, away from production and from other services on this machine:")
        for name, value in overrides.items():
            say(f"  {name} = {masking.variable(name, str(value))}")
    else:
        say(f"{len(overrides)} settings overridden (bind, logs, NAME, ...), away from production; --verbose lists them")


def _measure(
    url: str, command: str | None, plan: Plan, cacert: str | None, insecure: bool
) -> tuple[Report, dict[str, Any]]:
    import ssl
    from dataclasses import replace

    from zdd_web.cli.rehearse import external_service, trusted_certificates
    from zdd_web.cli.rehearse.server import RehearsalError

    address = external_service.address_of(url)
    context = trusted_certificates.context(cacert, insecure=insecure) if address.tls else None
    plan = plan if plan.requests else replace(plan, requests=[request_mix.Request(address.path)])
    try:
        _warn_about_paths(address.host, address.port, plan, context)
    except ssl.SSLError as error:
        raise trusted_certificates.explain(url, error) from None
    try:
        return external_service.measure(address, command, plan, context), {}
    except OSError as error:
        raise RehearsalError(f"--url {url}: {error}") from None


def _warn_about_paths(host: str, port: int, plan: Plan, tls: SSLContext | None = None) -> None:
    import http.client
    import ssl

    from zdd_web.cli.rehearse.server import RehearsalError

    for request in plan.requests:
        # An upload has effects, and a stream has no end: the load will show it.
        if request.method != "GET" or request.stream:
            continue
        path = request.path
        connection = (
            http.client.HTTPConnection(host, port, timeout=plan.timeout)
            if tls is None
            else http.client.HTTPSConnection(host, port, timeout=plan.timeout, context=tls)
        )
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
        except ssl.SSLError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise RehearsalError(f"GET {path} before any upgrade: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if status >= 500:
            raise RehearsalError(f"GET {path} answers {status} before any upgrade: choose another with --path")
        if status >= 400:
            say(f"note: GET {path} answers {status}; choose another with --path to exercise the app", err=True)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Have SIGTERM do what Ctrl-C does: what was measured so far is reported."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress_bar(upgrades: int) -> Iterator[Callable[[int], object]]:
    stderr = cast("TextIO", TolerantStream(sys.stderr))
    with click.progressbar(length=upgrades, label="upgrades", file=stderr) as bar:
        # It is drawn by what moves it: before the first upgrade by nothing.
        yield lambda number: bar.update(1 if number > 1 else 0)


def _show(report: Report, tail: str, json_file: TextIO | None, others: dict[str, object]) -> None:
    from zdd_web.cli.rehearse.text_report import text

    show()
    show(text(report))
    if json_file is not None:
        save(json.dumps({**report.to_json(), **others}, indent=2), json_file)
    if not report.ok and tail:
        say("\nthe end of the service's log:\n" + tail, err=True)


def _write(report: Report, html_file: TextIO | None, junit_file: TextIO | None) -> None:
    if html_file is not None:
        from zdd_web.cli.rehearse.html_report import page

        save(page(report), html_file)
    if junit_file is not None:
        from zdd_web.cli.rehearse.junit_report import document

        save(document(report), junit_file)
