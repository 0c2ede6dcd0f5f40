"""Run `zdd-web rehearse` on an app from a test, and fail with its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: An interrupted rehearsal ends its service and reports within this, seconds.
ENDS_WITHIN = 30.0


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal has shown: `text` for a person, `report` as docs/reference/commands.md describes the JSON."""

    text: str
    report: dict[str, Any]

    @property
    def lost(self) -> int:
        """How many requests were lost."""
        return int(self.report["lost"])

    @property
    def requests(self) -> int:
        """How many there were."""
        return int(self.report["requests"])


def rehearse(
    app: str | os.PathLike[str],
    *arguments: str,
    upgrades: int = 1,
    scenarios: Sequence[str] = (),
    paths: Sequence[str] = ("/",),
    clients: int = 8,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    html: str | os.PathLike[str] | None = None,
    timeout: float = 300.0,
) -> Rehearsal:
    """Start an app under real gunicorn, upgrade it and stop it under load; raise AssertionError if that lost anything.

    In processes of its own, on a free port of 127.0.0.1.

    Args:
        app: The directory with the app's gunicorn.conf.py, or the path of such a file.
        arguments: gunicorn's, such as "shop.wsgi".
        upgrades: How many upgrades come before the stop.
        scenarios: What else is done, such as "reload"; "all" for everything.
        paths: What is requested, each as "[WEIGHT:]PATH".
        clients: How many clients send requests.
        options: More options of `zdd-web rehearse`, such as ["--upload", "/files"].
        env: Variables besides those of this process.
        html: Where the page of the report is written.
        timeout: Seconds for everything.

    Raises AssertionError with the report and the end of the service's log, and subprocess.TimeoutExpired.
    """
    words = [sys.executable, "-m", "zdd_web.cli", "rehearse", os.fspath(app), f"--upgrades={upgrades}"]
    words += [f"--clients={clients}", *(f"--path={path}" for path in paths)]
    words += [*(f"--scenario={name}" for name in scenarios), *options]
    if html is not None:
        words.append(f"--html={os.fspath(html)}")
    with tempfile.TemporaryDirectory(prefix="zdd-web-testing-") as directory:
        file = Path(directory, "report.json")
        words.append(f"--json={file}")
        if arguments:
            words += ["--", *arguments]
        status, text, errors = _run(words, {**os.environ, **(env or {})}, timeout)
        report = json.loads(file.read_text() or "{}") if file.exists() else {}
    if status:
        where = f"\nthe report with charts: {os.fspath(html)}" if html is not None and report else ""
        raise AssertionError(f"zdd-web rehearse {os.fspath(app)}: exit status {status}\n{text}\n{errors}{where}")
    return Rehearsal(text, report)


def _run(words: Sequence[str], env: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
    # In a process of its own: a rehearsal adopts and reaps the processes that gunicorn leaves, which would take the
    # exit statuses of other children of the test run.
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(env)
    )
    try:
        text, errors = process.communicate(timeout=timeout)
    except BaseException:
        # Not SIGKILL, which would leave the app's gunicorn behind.
        process.terminate()
        try:
            process.communicate(timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        raise
    return process.returncode, text, errors
