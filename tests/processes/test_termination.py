"""A start that comes to nothing has an exit status other than 0, and its reason where Kubernetes shows it."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes.harness import CONF, Service, until

HANGS = "open('importing', 'w').close(); time.sleep(600)"
BOOM = "raise RuntimeError('no database at postgres://shop:hunter2@db')"

HOOK = "def {}:\n    raise OSError('not today')"

#: A statement of the app, one of the configuration, options; the exit status and the message.
FAILS: dict[str, tuple[str, str, list[str], int, str]] = {
    "the app": (BOOM, "", [], 3, r"worker \d+ ended before it served: .*RuntimeError: no database at postgres://\*\*\*@db"),
    "the app, preloaded": (BOOM, "", ["--preload"], 1, r"RuntimeError: no database at postgres://\*\*\*@db"),
    "a setting": ("", "ZDD = {'grace': 1}", [], 1, r"install\(grace=...\): no such setting 'grace'"),
    "gunicorn's setting": ("", "", ["--reuse-port"], 1, "reuse_port = True"),
    "a hook": ("", HOOK.format("on_starting(server)"), [], 1, "on_starting: OSError: not today"),
    "a hook in the loop": ("", HOOK.format("pre_fork(server, worker)"), [], 255, "OSError: not today"),
}  # fmt: skip


def prepare(service: Service, statement: str = "", configuration: str = "") -> Path:
    message = service.directory / "termination-log"
    message.write_text("of the container's life before")
    service.workers = 1
    service.deploy("1", at_import=statement)
    service.settings["termination_log"] = str(message)
    extra = ", **ZDD)" if configuration.startswith("ZDD") else ")"
    service.write_conf(f"{configuration}\n{CONF}".replace("{settings})", "{settings}" + extra))
    return message


@pytest.mark.parametrize("what", FAILS)
def test_start_that_fails_leaves_its_reason(make_service: Callable[..., Service], what: str) -> None:
    statement, configuration, service = FAILS[what][0], FAILS[what][1], make_service()
    service.arguments = FAILS[what][2]
    message = prepare(service, statement, configuration)
    assert service.spawn().wait(30) == FAILS[what][3], service.log()
    assert re.match(f"zdd_web: the start failed: {FAILS[what][4]}", message.read_text()), message.read_text()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
def test_start_that_is_ended_while_it_boots_says_what_it_was_doing(
    make_service: Callable[..., Service], sig: signal.Signals
) -> None:
    service = make_service()
    message = prepare(service, HANGS)
    process = service.spawn()
    until("an import that hangs", (service.directory / "importing").exists, service)
    process.send_signal(sig)
    service.ends(status=-sig if sig == signal.SIGKILL else 1)
    if sig == signal.SIGKILL:
        assert message.read_text() == "zdd_web: ended before it served, while its workers booted"
        return
    said = rf"ended by {sig.name} while it booted, after [\d.]+ s: workers: 1 booting of 1(; importing the app)?"
    assert re.fullmatch(f"zdd_web: the start failed: {said}", message.read_text()), message.read_text()
    assert service.matches(rf"\[ERROR\] Reason: {said}")


def test_service_that_has_served_ends_without_a_message(make_service: Callable[..., Service]) -> None:
    service = make_service()
    message = prepare(service)
    service.start()
    # A moment after the log says that it serves.
    until("no message", lambda: message.read_text() == "", service)
    # An upgrade that fails ends nothing.
    service.deploy("2", at_import=BOOM)
    service.upgrade(expect="upgrade.failed")
    assert message.read_text() == ""
    service.stop()
    assert message.read_text() == ""
