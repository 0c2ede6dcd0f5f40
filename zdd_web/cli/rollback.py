"""`zdd-web rollback`: back to the release that served before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from zdd_web.deploy_request import DeployRequest


def add_to(
    main: click.Group,
    which_service: Callable[[Callable[..., Any]], Callable[..., Any]],
    deploy: Callable[[Any, DeployRequest], None],
) -> None:
    """Add the command to the group; `deploy` follows an upgrade and prints how it goes."""

    def rollback(which: Any) -> None:
        """Go back to the release that served before, as it was started then; status 0 only when it serves.

        The same gate and the same checks as in an upgrade: a release that does not start any more changes nothing. A
        second rollback goes further back.
        """
        deploy(which, DeployRequest(back=True))

    main.command("rollback")(which_service(rollback))
