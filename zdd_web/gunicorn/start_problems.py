"""What a start would refuse, found without a start: `gunicorn --check-config`.

What only the machine can tell is left out, since a check must neither bind nor depend on what runs: sockets that
systemd passes, addresses that are in use, the socket of a takeover.
"""

from __future__ import annotations

from zdd_web import checks
from zdd_web.board import SLOTS
from zdd_web.errors import SettingsError
from zdd_web.gunicorn import settings_in_force
from zdd_web.gunicorn.adapter.config import Config
from zdd_web.gunicorn.adapter.sockets import check_certificates
from zdd_web.gunicorn.handoff.launch import read_env_file
from zdd_web.gunicorn.master.worker_count import too_many_workers
from zdd_web.listeners.bind_errors import refuse_mixed
from zdd_web.listeners.matching import Place
from zdd_web.settings import Settings


def examine_configuration(cfg: Config, settings: Settings) -> None:
    """Raise `ZddError` for what a start refuses before it loads the app."""
    too_many = too_many_workers(cfg.workers, SLOTS)
    if too_many:
        raise SettingsError(too_many)
    if settings.listener == "reuseport":
        refuse_mixed([Place(bind, address) for bind, address in zip(cfg.bind, cfg.address, strict=True)])
    if settings.env_file:
        read_env_file(settings.env_file)
    check_certificates(cfg)


def examine_app(settings: Settings) -> None:
    """Raise `SettingsError` for what ends a worker's boot, when the app is loaded."""
    checks.load(settings_in_force.apply_app_settings(settings).checks)
