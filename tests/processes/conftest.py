from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes.harness import Service


@pytest.fixture(autouse=True)
def no_django(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep pytest-django's settings module from every master that a test starts: it would have it read."""
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE", raising=False)


@pytest.fixture(params=["sync", "gthread"])
def worker_class(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Service]]:
    """Make services; a failing test prints their logs, and none leaves a process behind."""
    made: list[Service] = []

    def make(worker_class: str = "gthread", **options: Any) -> Service:
        directory = tmp_path / f"service{len(made)}"
        directory.mkdir()
        service = Service(directory, worker_class, **options)
        made.append(service)
        return service

    yield make
    failed = getattr(request.node, "failed", False)
    for service in made:
        if failed:
            print(f"--- log of {service.name}\n{service.log()}")
        service.clean_up()


@pytest.fixture
def service(make_service: Callable[..., Service], worker_class: str) -> Service:
    """A service that is not started yet, for each worker class."""
    return make_service(worker_class)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    if outcome.get_result().failed:
        item.failed = True  # type: ignore[attr-defined]


#: What an attack on the promises has found and nobody has mended yet; each is to be mended, then taken out of here.
OPEN_FINDINGS = {
    "test_a_replacement_that_hangs_at_import_is_given_up_and_tried_again": "a hung replacement is not given up",
    "test_a_stop_now_takes_no_longer_than_a_stop_that_finishes_work": "INT and QUIT wait for gthread's threads",
    "test_a_gthread_worker_that_is_ended_is_replaced_while_its_threads_still_work": "its slot still says serving",
    "test_a_retiring_master_whose_pid_must_stay_sends_signals_on": "USR1, TTIN, TTOU and WINCH are not sent on",
    "test_an_old_master_killed_in_the_commit_window_leaves_no_file_beside_the_pid_file": "a prepared pid file stays",
    "test_the_page_says_what_a_signal_does[booting_first_start-TERM": "TERM during a first boot ends with status 1",
    "test_winch_does_not_have_a_booting_daemon_serve_without_workers": "WINCH with --daemon",
    "test_winch_during_an_upgrade_of_a_daemon_does_not_take_the_only_workers_away": "WINCH with --daemon",
    "test_term_during_the_proof_of_a_reload_stops_and_blames_nobody": "the ended proof is reported as a refusal",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in OPEN_FINDINGS.items():
            if item.name.startswith(name):
                item.add_marker(pytest.mark.xfail(reason=f"open finding: {reason}", strict=False))
