"""`zdd-web upgrade --watch`: a release that answers worse than the old one is taken back, a good one is not."""

from __future__ import annotations

import json
import textwrap

import pytest

from tests.processes.harness import APP, Service, answered_from, generations_of, lost, skip_unless_installed, until
from tests.processes.test_worker_classes import ASGI_APP
from zdd_web.cli.rehearse.load import LoadThread
from zdd_web.cli.rehearse.report import Outcome

CLASSES = ["sync", "gthread", "asgi"]

#: A worker ends when its twentieth reply is sent; in the WSGI apps and in the ASGI app.
DIES = {
    "    return [body]\n": "    SEEN[0] += 1\n    return Reply([body])\n",
    '"body": body})': '"body": body})\n    SEEN[0] += 1\n    SEEN[0] == 20 and LOOP().call_soon(os._exit, 3)',
    "HELD = set()": "HELD, LOOP = set(), asyncio.get_running_loop",
}
REPLY = """
class Reply(list):
    def close(self):
        SEEN[0] == 20 and os._exit(3)

"""

#: Of each worker's requests every tenth fails; in the WSGI apps and in the ASGI app.
COUNTER = "SEEN = [0]\n"
FAILS = {
    'start_response("200 OK", [("Content-Length"': (
        'SEEN[0] += 1\n    start_response("500 No" if SEEN[0] % 10 == 0 else "200 OK", [("Content-Length"'
    ),
    '"status": 200': '"status": 500 if (SEEN.append(SEEN.pop() + 1) or SEEN[0] % 10 == 0) else 200',
}


@pytest.fixture(params=CLASSES)
def watched(make_service, request) -> Service:
    service = make_service(skip_unless_installed(request.param))
    write(service, "1")
    return service.configure(generation_header="X-Zdd-Generation", upgrade_timeout=60)


def write(service: Service, version: str, **changes: str) -> None:
    """Put a version of the app on disk, with texts of it replaced."""
    text = textwrap.dedent(ASGI_APP if service.worker_class == "asgi" else APP).replace("STARTUP", "pass")
    text = text.replace('VERSION = "1"', f'VERSION = "{version}"\n{changes.pop("at_import", "")}')
    for change, texts in (("fails", FAILS), ("dies", DIES)):
        if changes.pop(change, ""):
            text = COUNTER + REPLY + text
            for old, new in texts.items():
                text = text.replace(old, new)
    (service.directory / "app.py").write_text(text)


def deploy(service: Service, load: LoadThread, *options: str):
    done = service.run("upgrade", "--name", service.name, *options)
    answered_from(load, 50)
    return done


def really_lost(load: LoadThread) -> list:
    return [sample for sample in lost(load) if sample.outcome is not Outcome.SERVER_ERROR]


def test_release_that_fails_a_tenth_of_its_requests_is_taken_back(watched):
    service = watched.start()
    write(service, "2", fails="yes")
    with service.under_load(clients=8, may_lose=True) as load:
        done = deploy(service, load, "--watch", "60", "--max-errors", "1%")
        assert done.returncode == 1, done.stdout + done.stderr
    assert "it answers with more errors: status 500 and above for" in done.stderr
    assert "and 1.0% more are allowed" in done.stderr
    assert "generation 1 serves on" in done.stderr
    assert really_lost(load) == [], service.log()
    # All that failed was answered by the release that was taken back.
    assert {sample.generation for sample in lost(load)} == {2}
    service.until_alone()
    assert service.get().version == "1"
    entries = json.loads(service.run("history", "--json", "--name", service.name).stdout)["entries"]
    assert (entries[-1]["outcome"], entries[-1]["generation"]) == ("failed", 2)
    assert "more errors" in entries[-1]["reason"]


def test_release_whose_worker_dies_is_taken_back(watched):
    service = watched.start()
    write(service, "2", dies="yes")
    # Of one client: a worker that dies when it has sent a reply has nothing else in hand.
    with service.under_load(clients=1, pause=0) as load:
        done = deploy(service, load, "--watch", "60")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ended in the commit window: exit status 3" in done.stderr
    assert "generation 1 serves on" in done.stderr
    assert 2 in generations_of(load)
    service.until_alone()
    assert service.get().version == "1"


def test_worker_that_dies_amid_many_requests_takes_its_own_along_at_most(make_service):
    service = make_service("sync")
    write(service, "1")
    service.configure(generation_header="X-Zdd-Generation", upgrade_timeout=60).start()
    # Once it serves, on the way of requests: after any commit window of a second.
    write(service, "2", at_import="import threading; threading.Timer(4, lambda: os._exit(3)).start()")
    with service.under_load(clients=8, may_lose=True) as load:
        done = deploy(service, load, "--watch", "60")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ended in the commit window" in done.stderr
    service.until_alone()
    assert service.get().version == "1"
    # Two workers, each of which has one request in hand.
    assert len(really_lost(load)) <= 2
    assert {sample.generation for sample in really_lost(load)} <= {2, None}


def test_good_release_is_kept_and_serves_beside_the_old_one_meanwhile(watched):
    service = watched.start()
    write(service, "2")
    with service.under_load(clients=8) as load:
        done = deploy(service, load, "--watch", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    until("version 2", lambda: service.get().version == "2", service)
    assert service.snapshot().generation == 2


def test_errors_that_both_have_do_not_count_against_the_new_one(make_service):
    service = make_service("sync")
    write(service, "1", fails="yes")
    service.configure(watch=3, max_errors="10%").start()
    write(service, "2", fails="yes")
    with service.under_load(clients=8, may_lose=True) as load:
        # By the settings, and a plain signal.
        service.upgrade()
        answered_from(load, 50)
    assert really_lost(load) == []
    assert service.get().version == "2"
