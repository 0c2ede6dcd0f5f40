"""What a refused SIGHUP says: the reason, and a remedy that agrees with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.processes.harness import PATIENCE, Service, successor
from zdd_web.lifecycle import Phase

UPGRADE = 'remedy="use an upgrade; the old workers serve on"'
FIX = 'remedy="fix it and send SIGHUP again; the old workers serve on"'


@pytest.mark.parametrize(
    ("before", "reason", "remedy"),
    [
        ("bind = '127.0.0.2:0'\n", "bind changed from ['127.0.0.1:0'] to ['127.0.0.2:0']: SIGHUP", UPGRADE),
        (
            "worker_class, threads = 'sync', 1\n",
            "worker_class changed from 'gthread' to 'sync': use an upgrade (SIGUSR2)",
            UPGRADE,
        ),
        ("raise RuntimeError('boom')\n", "RuntimeError: boom", FIX),
        # The remedy depends on the kind of the error, not on its text.
        ("raise RuntimeError('use an upgrade (SIGUSR2)')\n", "RuntimeError: use an upgrade", FIX),
        ("raw_env = ['ZDD_WEB_GRACE_PERIOD=soon']\n", "ZDD_WEB_GRACE_PERIOD=soon: must be a number of seconds", FIX),
    ],
)
def test_reload_that_is_refused_names_the_reason_and_its_remedy(
    make_service: Callable[..., Service], before: str, reason: str, remedy: str
) -> None:
    service = make_service("", workers=1)
    own = "worker_class, threads, bind = 'gthread', 4, '127.0.0.1:0'\n"
    service.bind = None
    service.configure(own).start()
    service.configure(own + before)
    service.signal(signal.SIGHUP)
    line = service.wait_for("event=refused signal=HUP")
    assert f'reason="{reason}' in line
    assert remedy in line
    assert "zdd_web.errors" not in service.log()
    assert service.get().generation == 1
    service.stop()


def test_a_reload_right_after_the_handover_is_not_refused(make_service):
    # The new master may not have read yet that it is the service; whoever sends the signal has seen it.
    for _ in range(3):
        service = make_service("gthread").start()
        header = service.is_active().board.header
        service.signal(signal.SIGUSR2)
        new = successor(service)
        give_up = time.monotonic() + PATIENCE
        while header.phase not in (Phase.RETIRING, Phase.STOPPED) and time.monotonic() < give_up:
            time.sleep(0.0001)
        os.kill(new, signal.SIGHUP)
        service.wait_for(r"event=(reload\.done|refused)")
        assert service.matches("event=refused") == []
        service.stop()
