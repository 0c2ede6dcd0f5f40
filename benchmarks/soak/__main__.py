"""A long chain of upgrades, some of broken code, in each listener mode, under load: `python -m benchmarks.soak`.

Status 0 when nothing was lost, every upgrade ended as it must and nothing has grown; 1 otherwise. Ctrl-C and SIGTERM
end it after the upgrade that is under way, with what was measured so far and status 128 + the signal's number.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

import click

from benchmarks.servers import ServerError
from benchmarks.soak import report
from benchmarks.soak.chain import Chain, Plan
from benchmarks.soak.service import MODES, missing

CLASSES = ("gthread", "gevent", "asgi", "uvicorn", "sync")


class Interrupts:
    """Signals that were sent to end it; a second one ends it at once."""

    def __init__(self) -> None:
        self.number = 0

    def catch(self, *numbers: signal.Signals) -> None:
        """Note these from now on."""
        for each in numbers:
            signal.signal(each, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.number:
            sys.exit(128 + number)
        self.number = number
        click.echo("ending after this upgrade; again to end at once", err=True)


def shares(upgrades: int, modes: int) -> list[int]:
    """Return how many upgrades each chain has.

    >>> shares(1000, 3)
    [334, 333, 333]
    """
    return [upgrades // modes + (index < upgrades % modes) for index in range(modes)]


@click.command()
@click.option("--upgrades", default=1000, show_default=True, type=click.IntRange(1), help="Of all chains together.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Only this one; repeatable.")
@click.option("--worker-class", type=click.Choice(CLASSES), default="gthread", show_default=True)
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1))
@click.option("--broken-each", default=10, show_default=True, type=click.IntRange(0),
              help="Every so many upgrades one is of broken code; 0 for none.")  # fmt: skip
@click.option("--clients", default=12, show_default=True, type=click.IntRange(2), help="Half of them keep connections.")
@click.option("--kept", default=64, show_default=True, type=click.IntRange(2), help="Kept connections.")
@click.option(
    "--at-most", type=click.FloatRange(1), metavar="SECONDS", help="End after so long, an upgrade more or less."
)
@click.option("--report", "report_file", type=click.File("w", lazy=True), help="Write a page in Markdown.")
@click.option("--log", "log_file", type=click.Path(path_type=Path), help="Append the services' log lines to this file.")
def main(
    upgrades: int,
    modes: tuple[str, ...],
    worker_class: str,
    workers: int,
    broken_each: int,
    clients: int,
    kept: int,
    at_most: float | None,
    report_file: TextIO | None,
    log_file: Path | None,
) -> None:
    """Upgrade a service again and again under load, and count what is lost and what grows."""
    if kept < clients:
        raise click.UsageError(f"--kept {kept} is less than --clients {clients}: a client would wait for a connection")
    interrupts = Interrupts()
    interrupts.catch(signal.SIGINT, signal.SIGTERM)
    began, chains, trouble = time.monotonic(), list[Chain](), list[str]()
    click.echo(f"{report.machine()}; load average {report.load_average()}")
    chosen = [mode for mode in modes or MODES if not missing(mode)]
    trouble += [f"{mode}: {missing(mode)}" for mode in modes if missing(mode)]
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="zdd-web-soak-"))
        log = log_file.absolute() if log_file else Path(directory, "log")
        for index, (mode, share) in enumerate(zip(chosen, shares(upgrades, len(chosen)), strict=True)):
            # What is left of the time is shared by the chains that are left.
            left = None if at_most is None else at_most - (time.monotonic() - began)
            deadline = None if left is None else time.monotonic() + left / (len(chosen) - index)
            if interrupts.number or not share:
                break
            chain = Chain(Plan(mode, worker_class, share, workers, broken_each, clients, kept))
            chains.append(chain)

            def is_over(deadline: float | None = deadline) -> bool:
                return bool(interrupts.number) or (deadline is not None and time.monotonic() > deadline)

            try:
                chain.run(log, is_over, lambda text: click.echo(text, err=True))
            except ServerError as error:
                trouble.append(f"{mode}: the chain ended: {error}")
    _tell(chains, trouble)
    if report_file is not None:
        report_file.write(report.page(chains, trouble))
    if interrupts.number:
        sys.exit(128 + interrupts.number)
    sys.exit(1 if trouble or report.verdict(chains) else 0)


def _tell(chains: list[Chain], trouble: list[str]) -> None:
    click.echo(report.summary(chains))
    click.echo(f"\n{report.latencies(chains)}")
    for chain in chains:
        click.echo(f"\n{chain.plan.mode}, {len(chain.samples)} samples\n{report.figures(chain)}")
        for line in report.losses(chain):
            click.echo(line)
    reasons = [*trouble, *report.verdict(chains)]
    click.echo("\nNOT as promised:" if reasons else "\nas promised: nothing lost, nothing grew")
    for reason in reasons:
        click.echo(f"- {reason}")


if __name__ == "__main__":
    main()
