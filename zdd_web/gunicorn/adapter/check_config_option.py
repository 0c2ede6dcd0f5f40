"""gunicorn.app.base.Application: `--check-config`, which loads the app and calls no hook.

See tests/contract: test_check_config_loads_the_app_and_calls_no_hook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from gunicorn.app import base

from zdd_web.gunicorn.adapter.patches import replace

if TYPE_CHECKING:
    from zdd_web.gunicorn.adapter.config import Config
    from zdd_web.gunicorn.adapter.protocols import App, Application, Method


def examine(before_load: Callable[[Config], None], after_load: Callable[[], None]) -> None:
    """Have `--check-config` call the one with the finished configuration, and the other when the app is loaded.

    Called from the configuration file, when the application that reads it is made and `run()` is still to come.
    """
    run: Method = base.Application.run

    @functools.wraps(run)
    def examining(application: Application) -> None:
        if application.cfg.check_config:
            load = application.load

            def examined() -> App:
                before_load(application.cfg)
                app = load()
                after_load()
                return app

            replace(application, "load", examined)
        run(application)

    replace(base.Application, "run", examining)
