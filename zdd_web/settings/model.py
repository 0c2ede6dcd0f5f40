"""The settings themselves: one frozen `Settings`, validated when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from zdd_web.errors import SettingsError
from zdd_web.settings.values import NORMALISE, CheckSetting

#: Each worker reads these from its app. All others are the master's, which runs before there is an app.
APP_SETTINGS = frozenset(
    {"liveness_path", "readiness_path", "health_path", "startup_path", "checks", "details", "log_probes"}
)

#: Of these, what a probe port says as well: its process is the master's, and must not say something else.
PROBE_SETTINGS = APP_SETTINGS - {"checks", "log_probes"}

#: Kubernetes' default terminationGracePeriodSeconds, and what its users have tuned their load balancers to.
DEFAULT_GRACE_PERIOD = 30.0
#: tableflip's default; long enough for a Django project with a few hundred models on a busy machine.
DEFAULT_UPGRADE_TIMEOUT = 60.0
#: Longer than any download or import takes, and short enough that endless streams do not pile up generations in a day.
DEFAULT_RETIRE_TIMEOUT = 3600.0

#: By this header a rehearsal numbers its requests; with `generation_header` replies repeat it.
REQUEST_HEADER = "X-Zdd-Request"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that zdd_web can be told. All durations are seconds.

    Raises `SettingsError` when a value has the wrong type or cannot work, alone or with the others.

    >>> Settings(grace_period=10).stop_budget()
    StopBudget(lame_duck=0.0, work=9.0, margin=1.0)
    """

    listener: str = "fd"
    hand_over_connections: bool = True
    systemd_names: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    upgrade_timeout: float = DEFAULT_UPGRADE_TIMEOUT
    commit_window: float = 1.0
    watch: float = 0.0
    max_errors: float = 0.01
    canary: str = ""
    grace_period: float = DEFAULT_GRACE_PERIOD
    drain_delay: float = 0.0
    lame_duck_ready: bool = False
    recycle_timeout: float = 10.0
    retire_timeout: float = DEFAULT_RETIRE_TIMEOUT
    abandon_status: int = 1
    termination_log: str = "/dev/termination-log"
    warmup: tuple[str, ...] = ()
    max_generations: int = 4
    keep_pid: bool = False
    parent_stays: bool = False
    takeover: bool = False
    takeover_socket: str = ""
    release: str = ""
    release_dir: str = ""
    env_file: str = ""
    liveness_path: str = "/livez"
    readiness_path: str = "/readyz"
    health_path: str = "/healthz"
    startup_path: str = "/startupz"
    checks: tuple[CheckSetting, ...] = ()
    details: str = ""
    probe_bind: str = ""
    log_probes: bool = True
    generation_header: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, NORMALISE[field.name](value))
            except ValueError as error:
                raise SettingsError(f"{field.name.upper()} = {value!r}: {error}") from None
        paths = [self.liveness_path, self.readiness_path, self.startup_path, self.health_path]
        for path in paths:
            if paths.count(path) > 1 and path != self.health_path:
                raise SettingsError(
                    f"two probes share the path {path!r}: give LIVENESS_PATH, READINESS_PATH and STARTUP_PATH their own"
                )
        for name, path in (("LIVENESS_PATH", self.liveness_path), ("STARTUP_PATH", self.startup_path)):
            if path == self.health_path:
                raise SettingsError(f"HEALTH_PATH = {self.health_path!r} is {name} too: health means readiness here")
        if self.takeover_socket and not self.takeover:
            raise SettingsError(
                f"TAKEOVER_SOCKET = {self.takeover_socket!r}, and TAKEOVER = False: no process would connect to it; "
                f"set TAKEOVER = True, or remove TAKEOVER_SOCKET"
            )
        self.stop_budget()

    @property
    def has_probe_port(self) -> bool:
        """Whether probes are answered on a port of their own, bound by us or by systemd."""
        return bool(self.probe_bind) or "probe" in self.systemd_names.values()

    def stop_budget(self) -> StopBudget:
        """Split `grace_period` into lame duck, work and margin.

        Raises `SettingsError` with the sum when they do not fit.
        """
        # gunicorn's loop wakes once a second and processes take a moment to exit: what is promised to be gone before
        # GRACE_PERIOD must be sent SIGTERM earlier. A tenth, between half a second and two seconds.
        margin = min(2.0, max(0.5, self.grace_period / 10))
        work = self.grace_period - self.drain_delay - margin
        if work <= 0:
            raise SettingsError(
                f"DRAIN_DELAY = {self.drain_delay:g} and {margin:g} to exit leave no time for requests in "
                f"GRACE_PERIOD = {self.grace_period:g} ({self.drain_delay:g} + {margin:g} >= {self.grace_period:g}): "
                f"raise GRACE_PERIOD (and Kubernetes' terminationGracePeriodSeconds) or lower DRAIN_DELAY"
            )
        return StopBudget(lame_duck=self.drain_delay, work=work, margin=margin)


class StopBudget(NamedTuple):
    """How a stop spends `GRACE_PERIOD`, in seconds, one after the other."""

    lame_duck: float
    work: float
    margin: float

    @property
    def abandon_window(self) -> float:
        """Seconds of the margin in which workers name what they abandon, before they are killed.

        >>> Settings(grace_period=30).stop_budget().abandon_window
        1.7
        """
        return max(0.4 * self.margin, self.margin - 0.3)
