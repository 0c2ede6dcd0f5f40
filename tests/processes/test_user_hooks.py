"""The user's hooks during an upgrade, and how they tell it from a start and from a stop."""

from __future__ import annotations

from tests.processes.harness import Service

HOOKS = """
import os, zdd_web
MASTER = os.getpid()

def said(text):
    with open("said", "a") as file:
        file.write(f"{text}\\n")

def pre_exec(server):
    said(f"pre_exec {zdd_web.generation()} forked={os.getppid() == MASTER} pid={server.pid == MASTER}")
    server.cfg.env_orig["FROM_PRE_EXEC"] = "yes"
    server.cfg.env_orig.pop("TO_BE_REMOVED")

def on_starting(server):
    said(f"on_starting {zdd_web.generation()} {os.environ.get('FROM_PRE_EXEC')} {os.environ.get('TO_BE_REMOVED')}")

def worker_exit(server, worker):
    said(f"worker_exit {zdd_web.generation()} {zdd_web.successor_serves()}")

def on_exit(server):
    said(f"on_exit {zdd_web.generation()} {zdd_web.successor_serves()}")
"""

FAILS = """
def pre_exec(server):
    raise RuntimeError("not today")
"""


def said(service: Service) -> list[str]:
    return (service.directory / "said").read_text().splitlines()


def test_hooks_tell_an_upgrade_from_a_start_and_from_a_stop(make_service) -> None:
    service = make_service("sync", workers=1)
    service.environ["TO_BE_REMOVED"] = "still there"
    service.configure(HOOKS).start()
    service.upgrade()
    service.until_one_generation()
    service.stop()
    assert said(service) == [
        "on_starting 1 None still there",
        "pre_exec 1 forked=True pid=True",
        "on_starting 2 yes None",
        "worker_exit 1 True",
        "on_exit 1 True",
        "worker_exit 2 False",
        "on_exit 2 False",
    ]


def test_a_pre_exec_that_raises_fails_the_upgrade_and_nothing_else(make_service) -> None:
    service = make_service("sync", workers=1)
    service.configure(FAILS).start()
    line = service.upgrade(expect="upgrade.failed")
    assert "RuntimeError: not today" in line
    assert service.get().generation == 1
    service.stop()
