"""Say what a configuration sets of zdd_web: `python -m zdd_web.cli.rehearse.read_configuration FILE [GUNICORN ARGS]`.

A process of its own, as gunicorn's master would be: the configuration is code, and may read Django's settings. The
answer is written to FILE.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass

from zdd_web.errors import ZddError


@dataclass(frozen=True)
class Configured:
    """What of the app's settings decides how it is rehearsed."""

    listener: str
    systemd_names: dict[str, str]
    has_probe_port: bool
    has_probe_bind: bool
    #: The module that the app is imported from; "" where it does not come from a module.
    module: str = ""
    #: Where gunicorn runs the app.
    chdir: str = ""


def main(file: str, arguments: list[str]) -> None:
    """Load the configuration as gunicorn does, and write the answer. Ends as a start does when that cannot work."""
    from zdd_web.gunicorn import settings_in_force
    from zdd_web.gunicorn.adapter import config

    cfg, app = config.load(arguments)
    # As gunicorn's run() does, before a master would have Django's settings read.
    sys.path[:0] = [os.path.abspath(path) for path in (cfg.pythonpath or "").split(",") if path]
    try:
        settings = settings_in_force.settle(cfg)
    except ZddError as error:
        raise SystemExit(f"zdd_web: {error}") from None
    answer = Configured(
        settings.listener,
        dict(settings.systemd_names),
        settings.has_probe_port,
        bool(settings.probe_bind),
        app.partition(":")[0],
        os.path.abspath(cfg.chdir),
    )
    with open(file, "w") as out:
        json.dump(vars(answer), out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
