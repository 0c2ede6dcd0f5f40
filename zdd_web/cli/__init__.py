"""The command `zdd-web`; each of its commands has a module."""

from __future__ import annotations

import click

import zdd_web
from zdd_web.cli.cancel import cancel as _cancel
from zdd_web.cli.drain import drain as _drain
from zdd_web.cli.rehearse.command import rehearse as _rehearse
from zdd_web.cli.status import status as _status
from zdd_web.cli.upgrade import upgrade as _upgrade


@click.group(context_settings={"max_content_width": 80})
@click.version_option(zdd_web.__version__, prog_name="zdd-web")
def main() -> None:
    """Deploy, look at and rehearse a gunicorn service with zdd_web."""


for _each in (_upgrade, _cancel, _drain, _status, _rehearse):
    main.add_command(_each)
