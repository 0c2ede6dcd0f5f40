"""The report of a soak: as text for the terminal, and as a page for docs/."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import gunicorn
from tabulate import tabulate

import zdd_web
from benchmarks.soak.chain import Chain

#: Losses that a page lists.
MOST_LISTED = 40

#: Of a line in docs/.
WIDTH = 120


def machine() -> str:
    """Return what it ran on."""
    model, memory = "", 0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = f" ({line.partition(':')[2].strip()})"
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return (
        f"{len(os.sched_getaffinity(0))} cores{model}, {memory} GiB, Linux {platform.release()}, Python "
        f"{platform.python_version()}, gunicorn {gunicorn.__version__}, zdd_web {zdd_web.__version__}"
    )


def load_average() -> str:
    """Return how busy the machine is.

    >>> len(load_average().split())
    3
    """
    return " ".join(f"{each:.1f}" for each in os.getloadavg())


def table(rows: Sequence[Sequence[object]], columns: Sequence[str], *, is_page: bool) -> str:
    """Return a table; on a page without padding, which would make its lines long.

    >>> print(table([["fd", 3]], ["listener", "lost"], is_page=True))
    | listener | lost |
    |---|---|
    | fd | 3 |
    """
    if not is_page:
        return tabulate(rows, columns, disable_numparse=True)
    return "\n".join(
        [
            f"| {' | '.join(columns)} |",
            f"|{'---|' * len(columns)}",
            *(f"| {' | '.join(map(str, row))} |" for row in rows),
        ]
    )


def summary(chains: Sequence[Chain], *, is_page: bool = False) -> str:
    """Return a table with a row for each chain."""
    rows = [
        [
            chain.plan.mode, chain.good, chain.broken.total(), len(chain.unexpected),
            f"{chain.load.get('requests', 0):,}", f"{chain.load.get('posts', 0):,}", chain.lost, chain.held,
            f"{chain.load.get('opened', 0):,}", chain.load.get("closed", 0), f"{chain.slowest:.1f} s",
            f"{chain.seconds:.0f} s",
        ]
        for chain in chains
    ]  # fmt: skip
    columns = ["listener", "good", "broken", "unexpected", "requests", "POSTs", "lost", "in crashed", "opened",
               "kept closed", "slowest", "took"]  # fmt: skip
    return table(rows, columns, is_page=is_page)


def latencies(chains: Sequence[Chain], *, is_page: bool = False) -> str:
    """Return a table of latencies, in upgrades and between them."""
    rows = [
        [chain.plan.mode, {"steady": "between upgrades", "upgrade": "in upgrades"}[name], f"{count or 0:,.0f}",
         *("-" if value is None else f"{value:.1f} ms" for value in (p50, p99, most))]
        for chain in chains for name, (count, p50, p99, most) in chain.latencies.items()
    ]  # fmt: skip
    return table(rows, ["listener", "requests", "answered", "p50", "p99", "longest"], is_page=is_page)


def figures(chain: Chain, *, is_page: bool = False) -> str:
    """Return a table of what may grow."""
    rows = [[each.name, f"{each.first:,.0f}", f"{each.last:,.0f}", "**grew**" if each.grew else "no"]
            for each in chain.growth]  # fmt: skip
    return table(rows, ["figure", "first tenth", "last tenth", "grew"], is_page=is_page)


def losses(chain: Chain) -> list[str]:
    """Return a line for each loss, those in crashed workers included."""
    lines = []
    for each in chain.losses[:MOST_LISTED]:
        at = time.strftime("%H:%M:%S", time.gmtime(each["at"]))
        lines.append(f"{at} UTC: {each['kind']}, {each['method']} on a {each['connection']} connection, "
                     f"begun in: {each['then']}; lost in: {each['now']}")  # fmt: skip
    return lines


def verdict(chains: Sequence[Chain]) -> list[str]:
    """Return the reasons for a bad verdict, chain by chain; nothing for a good one."""
    return [f"{chain.plan.mode}: {reason}" for chain in chains for reason in chain.verdict.reasons]


def page(chains: Sequence[Chain], trouble: Sequence[str]) -> str:
    """Return the whole report in Markdown."""
    requests = sum(chain.load.get("requests", 0) for chain in chains)
    lost, upgrades = sum(chain.lost for chain in chains), sum(chain.upgrades for chain in chains)
    broken = sum(chain.broken.total() for chain in chains)
    reasons = [*trouble, *verdict(chains)]
    plan = chains[0].plan if chains else None
    lines = [
        "# A long chain of upgrades", "",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}: {upgrades} upgrades, {broken} of them of broken code, and "
        f"{requests:,} requests: **{lost} lost**.", "",
        "```console", f"$ python -m benchmarks.soak {' '.join(sys.argv[1:])}", "```", "",
        f"On {machine()}; {plan.worker_class if plan else '?'}, {plan.workers if plan else 0} workers, "
        f"{plan.clients if plan else 0} clients; load average at the end: {load_average()}.", "",
        summary(chains, is_page=True), "",
        "Good and broken are upgrades, and unexpected are those that ended otherwise than they must. A request is lost "
        "that has no complete reply with the right body. \"In crashed\" are those in hand of workers that kill "
        "themselves in the commit window, one of the broken releases; they are not among the lost. \"Kept closed\" are "
        "kept connections that the server has closed. The slowest is that of the good upgrades, command included.",
        "",
        latencies(chains, is_page=True), "",
    ]  # fmt: skip
    for chain in chains:
        how = ", ".join(f"{name} {count}" for name, count in sorted(chain.broken.items())) or "none"
        lines += [f"## {chain.plan.mode}", "", f"Broken releases: {how}. {len(chain.samples)} samples.", "",
                  figures(chain, is_page=True), ""]  # fmt: skip
        lines += [f"- {line}" for line in losses(chain)]
        lines += [""] if chain.losses else []
    lines += [
        "## Verdict",
        "",
        *([f"- {reason}" for reason in reasons] or ["As promised: nothing lost, nothing grew."]),
    ]
    return "\n".join(map(_wrapped, lines)) + "\n"


def _wrapped(line: str) -> str:
    if line.startswith(("|", "$")) or len(line) <= WIDTH:
        return line
    return textwrap.fill(line, WIDTH, subsequent_indent="  " if line.startswith("- ") else "", break_long_words=False)
