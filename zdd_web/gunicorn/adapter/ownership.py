"""How a process of gunicorn's is called, and whose it is."""

from __future__ import annotations

from gunicorn import util

from zdd_web.gunicorn.adapter.config import Config


def set_process_title(title: str) -> None:
    """Have `ps` show a process as gunicorn's, where setproctitle is installed."""
    util._setproctitle(title)


def change_user(cfg: Config) -> None:
    """Have this process run as the user and group of its workers."""
    util.set_owner_process(cfg.uid, cfg.gid, initgroups=cfg.initgroups)
