"""`zdd-web rollback`: back to the release that served before."""

from __future__ import annotations

import click

from zdd_web.cli.options import Which, which_service
from zdd_web.cli.upgrade import deploy
from zdd_web.deploy_request import DeployRequest


@click.command()
@which_service
def rollback(which: Which) -> None:
    """Go back to the release that served before, as it was started then.

    Status 0 only when it serves; 1 when the newer one goes on. The same gate and the same checks as in an upgrade: a
    release that does not start any more changes nothing. A second rollback goes further back.
    """
    deploy(which, DeployRequest(back=True))
