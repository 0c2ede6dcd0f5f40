"""`flask zdd status|history|upgrade|rollback|cancel|drain|check`: `zdd-web` where `flask` is at hand.

Only `check` loads the app.
"""

from __future__ import annotations

import flask
from flask.cli import with_appcontext

from zdd_web import checks, process
from zdd_web.cli.frameworks import group, report
from zdd_web.errors import SettingsError
from zdd_web.flask import registry_of, settings_of
from zdd_web.settings import of_app


@with_appcontext
def check() -> None:
    """Look at the settings of the app and run, once, the checks that it has registered."""
    app = flask.current_app
    serious = []
    own = None
    try:
        own = registry_of(app)
    except SettingsError as error:
        serious.append(str(error))
    try:
        here, brought = process.current(), settings_of(app)
        of_app(here.settings, here.fixed, brought)
        checks.load(brought.values.get("checks", ()), into=own)
    except SettingsError as error:
        serious.append(str(error))
    report(serious)


zdd = group(check)
