"""For how long nobody answers when the only worker is recycled with a background job in hand.

`python -m benchmarks.recycle`. One worker, `max_requests = 100`, each hundredth request leaves a job of five seconds.
A probe every 50 ms, each on a new connection; the longest time without a reply is the gap.
"""

from __future__ import annotations

import http.client
import json
import time
from typing import TextIO

import click
import gunicorn as gunicorn_package
from tabulate import tabulate

from benchmarks.servers import Server, ServerError, gunicorn

EVERY = 0.05
COMMON = ["--workers", "1", "--max-requests", "100", "--log-level", "warning"]
SERVERS = {
    "gunicorn": ["benchmarks.apps:with_a_job"],
    "zdd_web": ["-c", "benchmarks/with_zdd_web.py", "benchmarks.apps:with_a_tracked_job"],
}
WORKER_CLASSES = ("sync", "gthread")


def longest_gap(server: Server, seconds: float) -> tuple[float, int, int]:
    """Probe for so long; return the longest time without a reply, how many came, and how many failed."""
    last = began = time.monotonic()
    longest, answered, failed = 0.0, 0, 0
    while (now := time.monotonic()) < began + seconds:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        try:
            connection.request("GET", "/", headers={"Connection": "close"})
            connection.getresponse().read()
            answered += 1
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        except (OSError, http.client.HTTPException):
            failed += 1
        finally:
            connection.close()
        time.sleep(max(0.0, EVERY - (time.monotonic() - now)))
    return longest, answered, failed


@click.command()
@click.option(
    "--seconds", default=30.0, show_default=True, type=click.FloatRange(1), help="Of probing for each server."
)
@click.option("--json", "json_file", type=click.File("w"), help="Write the figures to FILE ('-' for stdout) too.")
def main(seconds: float, json_file: TextIO | None) -> None:
    """Measure the longest gap between replies while the only worker is recycled with work in hand."""
    click.echo(f"gunicorn {gunicorn_package.__version__}, 1 worker, max_requests 100, a job of 5 s at each hundredth; "
               f"a probe every {EVERY * 1000:g} ms for {seconds:g} s")  # fmt: skip
    rows = []
    try:
        for worker_class in WORKER_CLASSES:
            for name, arguments in SERVERS.items():
                with gunicorn([*arguments, *COMMON, "--worker-class", worker_class]) as server:
                    gap, answered, failed = longest_gap(server, seconds)
                rows.append([worker_class, name, answered, failed, f"{gap * 1000:.0f} ms"])
    except ServerError as error:
        raise click.ClickException(str(error)) from None
    click.echo(tabulate(rows, ["worker class", "server", "answered", "failed", "longest gap"]))
    if json_file is not None:
        json.dump(rows, json_file, indent=2)


if __name__ == "__main__":
    main()
