"""What a rehearsal decides before it starts anything, and how it plays systemd."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from tests.helpers.forks import spawn, status_of
from zdd_web.cli.rehearse import command, scenarios, socket_activation
from zdd_web.cli.rehearse.read_configuration import Configured
from zdd_web.cli.rehearse.server import RehearsalError, in_place_of, refuse_own

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

PLAIN = Configured("fd", {}, has_probe_port=False, has_probe_bind=False)
BOUND = Configured("fd", {}, has_probe_port=True, has_probe_bind=True)
NAMED = Configured("systemd", {"web": "app", "health": "probe"}, has_probe_port=True, has_probe_bind=False)
APP_ONLY = Configured("systemd", {"web": "app"}, has_probe_port=False, has_probe_bind=False)
#: Under `fd` systemd's sockets are taken where there are any.
NAMED_FD = Configured("fd", NAMED.systemd_names, has_probe_port=True, has_probe_bind=False)

NO_NAMES = {"ZDD_WEB_SYSTEMD_NAMES": ""}
FREE_PORT = {"ZDD_WEB_PROBE_BIND": "127.0.0.1:0"}


@pytest.mark.parametrize(
    ("app", "mode", "changed"),
    [
        (PLAIN, None, {}),
        (PLAIN, "systemd", {"ZDD_WEB_LISTENER": "systemd"}),
        (BOUND, None, FREE_PORT),
        (BOUND, "systemd", {"ZDD_WEB_LISTENER": "systemd", **FREE_PORT}),
        (NAMED, None, {}),
        (NAMED, "systemd", {"ZDD_WEB_LISTENER": "systemd"}),
        (NAMED, "reuseport", {"ZDD_WEB_LISTENER": "reuseport", **NO_NAMES, **FREE_PORT}),
        (APP_ONLY, "fd", {"ZDD_WEB_LISTENER": "fd", **NO_NAMES}),
        (NAMED_FD, None, {**NO_NAMES, **FREE_PORT}),
    ],
)
def test_what_of_an_app_is_overridden(app: Configured, mode: str | None, changed: dict[str, str]) -> None:
    assert in_place_of(app, mode) == changed


def test_the_command_offers_every_scenario() -> None:
    assert tuple(scenarios.SCENARIOS) == command.SCENARIOS


def test_variable_that_is_the_rehearsals_own_is_refused() -> None:
    refuse_own(["--env", "ZDD_WEB_GRACE_PERIOD=5"], "GUNICORN ARGS")
    with pytest.raises(RehearsalError, match="GUNICORN ARGS: ZDD_WEB_TAKEOVER is the rehearsal's own to set"):
        refuse_own(["--env", "A=B", "--env", "ZDD_WEB_TAKEOVER=yes"], "GUNICORN ARGS")


#: Ends with status 0 when the sockets are where they belong.
LOOK = """
import os, socket, sys
ports = [socket.socket(fileno=fd).getsockname()[1] for fd in (3, 4)]
names = os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"], os.environ["LISTEN_PID"]
sys.exit(ports != [int(port) for port in sys.argv[1:]] or names != ("2", "a=b,c:d", str(os.getpid())))
"""


def test_sockets_stand_where_systemd_puts_them_whatever_their_numbers_were() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [str(each.getsockname()[1]) for each in (first, second)]

        def become() -> None:
            numbers = [os.dup(first.fileno()), os.dup(second.fileno())]
            # Each has the number that the other is to get.
            os.dup2(numbers[0], 4)
            os.dup2(numbers[1], 3)
            sockets = socket_activation.parse(socket_activation.spell({"a=b,c": 4, "d": 3}))
            socket_activation.activate(sockets, [sys.executable, "-W", "ignore", "-c", LOOK, *ports])

        assert status_of(spawn(become)) == 0
