"""Which path is which probe, and what is answered.

Liveness stays 200 through a drain: a probe that failed there would have Kubernetes kill what is still finishing its
work. Readiness is 503 from the moment a stop begins, while everything is still accepted; with `LAME_DUCK_READY` it goes
on in the lame duck as before.

All workers of a generation have the same code and ask the same dependencies. A check has failed when it fails in
*every* worker that has a say: a database that is gone fails in all of them within one interval, and one worker with a
broken connection must not take the others out of service. That one is a warning, and in the log.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from typing import NamedTuple

from zdd_web.health.view import CheckSeen, Health, Kind, Result
from zdd_web.lifecycle import Phase
from zdd_web.settings import Settings


class Probe(enum.Enum):
    """What a probe asks."""

    LIVENESS = "liveness"
    READINESS = "readiness"
    STARTUP = "startup"


class Status(enum.Enum):
    """What one line of an answer says; the value is how Kubernetes' own components mark it."""

    OK = "[+]"
    WARN = "[!]"
    FAIL = "[-]"


class Finding(NamedTuple):
    """One thing that was looked at. `text` is for clients that may see details."""

    name: str
    status: Status
    text: str
    is_check: bool = False
    failing_for: float = 0.0


#: The probe in which a check of a kind has a say.
_PROBE = {Kind.READINESS: Probe.READINESS, Kind.LIVENESS: Probe.LIVENESS, Kind.STARTUP: Probe.STARTUP}


def table(settings: Settings, checks: Mapping[str, Kind] | None = None) -> dict[str, tuple[Probe, str]]:
    """Map each path that is a probe, with and without a slash at its end, to what it asks.

    Each of `checks` can be asked alone, below the probe in which it has a say.

    >>> table(Settings(), {"database": Kind.READINESS})["/healthz/database"]
    (<Probe.READINESS: 'readiness'>, 'database')
    """
    paths = {
        settings.liveness_path: Probe.LIVENESS,
        settings.startup_path: Probe.STARTUP,
        settings.readiness_path: Probe.READINESS,
        settings.health_path: Probe.READINESS,
    }
    found = {
        f"{path}/{name}": (probe, name)
        for path, probe in paths.items()
        for name, kind in (checks or {}).items()
        if _PROBE[kind] is probe
    }
    # No check takes the path of a probe.
    found |= {path: (probe, "") for path, probe in paths.items()}
    return {f"{path}/": asked for path, asked in found.items()} | found


def examine(probe: Probe, health: Health, only: str = "", exclude: Collection[str] = ()) -> list[Finding]:
    """Look at all that a probe asks for, or at one check `only`; nothing is read but `health`.

    >>> [(each.name, each.status.name) for each in examine(Probe.READINESS, Health(Phase.LAME_DUCK))]
    [('phase', 'FAIL')]
    """
    checks = _checks(probe, health)
    if only and health.phase is Phase.RETIRING:
        bad = only in health.successor_trouble.split("; ")
        return [Finding(only, Status.FAIL if bad else Status.OK, "as in the successor", is_check=True)]
    if only:
        found = [each for each in checks if each.name == only]
        return found or [Finding(only, Status.FAIL, "no result yet", is_check=True)]
    phase = _phase(probe, health)
    # Where the phase fails it is the answer, whatever the checks say. Those of a boot show what keeps it up. Liveness
    # does not fail in a stop: no check has a say then.
    boots = health.phase is Phase.BOOTING and probe is not Probe.LIVENESS
    serves = health.speaking is Phase.SERVING or (probe is Probe.READINESS and health.takes_requests)
    asked = boots or serves or probe is Probe.STARTUP
    others = [*_service(probe, health), *checks] if asked else []
    return [phase, *(each for each in others if not (each.is_check and each.name in exclude))]


def _phase(probe: Probe, health: Health) -> Finding:
    if probe is Probe.STARTUP:
        begun = health.phase is not Phase.BOOTING
        return Finding("phase", Status.OK if begun else Status.FAIL, health.phase.label)
    ok = probe is Probe.LIVENESS or health.takes_requests
    return Finding("phase", Status.OK if ok else Status.FAIL, health.speaking.label)


def _service(probe: Probe, health: Health) -> list[Finding]:
    if probe is Probe.STARTUP or health.phase is Phase.BOOTING:
        return []
    if health.phase is Phase.RETIRING:
        if probe is Probe.LIVENESS or not health.successor_trouble:
            return []
        return [Finding("successor", Status.FAIL, health.successor_trouble)]
    found = []
    limit = health.worker_timeout
    if limit is not None:
        silent = health.silence > limit
        text = f"the last one {health.silence:.0f} s ago, worker timeout {limit:g} s"
        found.append(Finding("heartbeat", Status.FAIL if silent else Status.OK, text))
    if health.master_stalled:
        # Not a failure: workers serve on without it, and once they do not, their heartbeats and number fail.
        text = f"its main loop has not run for {health.master_stalled:.0f} s"
        found.append(Finding("master", Status.WARN, text))
    if probe is Probe.READINESS and health.wanted is not None:
        serving = sum(worker.serving for worker in health.workers)
        text = f"{serving} of {health.wanted} serve"
        status = Status.FAIL if not serving else Status.WARN if serving < health.wanted else Status.OK
        found.append(Finding("workers", status, text))
    return found


def _checks(probe: Probe, health: Health) -> list[Finding]:
    if health.phase is Phase.RETIRING:
        return []
    seen: dict[str, list[CheckSeen]] = {}
    for worker in health.workers:
        # A worker that is not ready yet shows what keeps it: any check does.
        boots = health.phase is Phase.BOOTING and probe is not Probe.LIVENESS
        if worker.serving or boots or probe is Probe.STARTUP:
            for check in worker.checks:
                if _PROBE[check.kind] is probe or boots:
                    seen.setdefault(check.name, []).append(check)
    # A worker that names a check which the others do not have must not have the whole service restarted.
    least = sum(worker.serving for worker in health.workers) if probe is Probe.LIVENESS else 0
    return [judge(checks, lenient=probe is not Probe.READINESS, least=least) for checks in seen.values()]


def judge(checks: list[CheckSeen], *, lenient: bool = False, least: int = 0) -> Finding:
    """Judge one check by what all workers have seen of it.

    `lenient`: no result and a late one do not count as failures, so that what hangs cannot fail liveness. `least`: in
    how many workers it fails, at least, before it counts.

    >>> judge([CheckSeen("db", result=Result.FAILED), CheckSeen("db", result=Result.PASSED)]).status.name
    'WARN'
    """
    bad = [check for check in checks if not _good(check, lenient)]
    first = checks[0]
    if not bad:
        return Finding(first.name, Status.OK, "ok", is_check=True)
    worst = max(bad, key=lambda check: check.failing_for)
    text = worst.message or "no recent result"
    if len(checks) > 1:
        text += f" (in {len(bad)} of {len(checks)} workers)"
    counts = any(check.critical for check in bad) and first.kind is not Kind.STARTUP
    failed = counts and len(bad) >= max(len(checks), least)
    return Finding(first.name, Status.FAIL if failed else Status.WARN, text, True, worst.failing_for)


def _good(check: CheckSeen, lenient: bool) -> bool:
    if lenient:
        return check.result is not Result.FAILED or not check.fresh
    return check.result is Result.PASSED and check.fresh
