"""What each state of a service answers to each probe: the design's table, whole, and every rule about checks."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zdd_web.health import (
    CheckSeen,
    Health,
    Kind,
    Probe,
    Question,
    Reply,
    Result,
    Status,
    WorkerHealth,
    answer,
    examine,
    judge,
    not_found,
    table,
)
from zdd_web.lifecycle import Phase
from zdd_web.settings import Settings

READINESS = {
    Phase.BOOTING: (503, b"booting\n"),
    Phase.SERVING: (200, b"ok\n"),
    Phase.LAME_DUCK: (503, b"lame_duck\n"),
    Phase.DRAINING: (503, b"draining\n"),
    Phase.RETIRING: (503, b"retiring\n"),
    Phase.STOPPED: (503, b"stopped\n"),
}

DETAILS = Question(details=True)
VERBOSE = Question(details=True, verbose=True)


def ask(probe: Probe, phase: Phase, successor: Phase | None = None, method: str = "GET") -> Reply:
    return answer(probe, Question(method), Health(phase, successor))


def failed(name: str = "database", **changes: Any) -> CheckSeen:
    return CheckSeen(name, **{"result": Result.FAILED, "message": "no route", "failing_for": 12.3, **changes})


def passed(name: str = "database", **changes: Any) -> CheckSeen:
    return CheckSeen(name, **{"result": Result.PASSED, **changes})


def served_by(*workers: CheckSeen | list[CheckSeen], **changes: Any) -> Health:
    """A serving generation, with the checks of each worker."""
    seen = tuple(WorkerHealth(True, tuple(each) if isinstance(each, list) else (each,)) for each in workers)
    return Health(Phase.SERVING, **{"wanted": len(seen), "workers": seen, **changes})


# -- phases


@pytest.mark.parametrize("phase", Phase)
def test_readiness_is_that_of_the_phase(phase: Phase) -> None:
    reply = ask(Probe.READINESS, phase)
    assert (reply.status, reply.body) == READINESS[phase]


@pytest.mark.parametrize("phase", Phase)
def test_with_lame_duck_ready_a_lame_duck_is_ready_and_no_other_phase_of_a_stop(phase: Phase) -> None:
    reply = answer(Probe.READINESS, Question(), Health(phase, lame_duck_ready=True))
    expected = (200, b"ok\n") if phase is Phase.LAME_DUCK else READINESS[phase]
    assert (reply.status, reply.body) == expected


def test_a_ready_lame_duck_fails_as_a_serving_generation_does() -> None:
    ill = served_by(failed(), failed())._replace(phase=Phase.LAME_DUCK, lame_duck_ready=True)
    reply = answer(Probe.READINESS, DETAILS, ill)
    assert (reply.status, reply.body.splitlines()[0]) == (503, b"[+]phase lame_duck")
    assert b"readiness failed: database" in reply.body
    without_workers = Health(Phase.LAME_DUCK, wanted=2, lame_duck_ready=True)
    assert answer(Probe.READINESS, Question(), without_workers).status == 503
    # Nothing that is finishing its work is killed.
    lively = failed(kind=Kind.LIVENESS)
    stopping = served_by(lively)._replace(phase=Phase.LAME_DUCK, lame_duck_ready=True)
    assert answer(Probe.LIVENESS, Question(), stopping).status == 200


def test_the_successor_of_a_retiring_generation_may_be_a_ready_lame_duck() -> None:
    health = Health(Phase.RETIRING, Phase.LAME_DUCK, lame_duck_ready=True)
    assert answer(Probe.READINESS, Question(), health).status == 200


@pytest.mark.parametrize("phase", Phase)
def test_liveness_stays_up_to_the_end(phase: Phase) -> None:
    reply = ask(Probe.LIVENESS, phase)
    assert (reply.status_line, reply.body) == ("200 OK", b"ok\n")


@pytest.mark.parametrize("phase", Phase)
def test_a_service_has_started_once_it_has_booted(phase: Phase) -> None:
    assert ask(Probe.STARTUP, phase).status == (503 if phase is Phase.BOOTING else 200)


@pytest.mark.parametrize("successor", Phase)
def test_readiness_of_a_retiring_generation_is_that_of_its_successor(successor: Phase) -> None:
    reply = ask(Probe.READINESS, Phase.RETIRING, successor)
    assert (reply.status, reply.body) == READINESS[successor]
    assert ask(Probe.LIVENESS, Phase.RETIRING, successor).status == 200
    assert ask(Probe.STARTUP, Phase.RETIRING, successor).status == 200


def test_a_successor_that_is_not_ready_makes_its_predecessor_say_so() -> None:
    health = Health(
        Phase.RETIRING, Phase.SERVING, successor_trouble="database", workers=(WorkerHealth(True),), wanted=1
    )
    reply = answer(Probe.READINESS, DETAILS, health)
    assert (reply.status, reply.body) == (
        503,
        b"[+]phase serving\n[-]successor database\nreadiness failed: successor\n",
    )
    assert answer(Probe.LIVENESS, DETAILS, health).status == 200


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.RETIRING])
def test_successor_has_no_say_before_the_handover(phase: Phase) -> None:
    for successor in Phase:
        assert ask(Probe.READINESS, phase, successor) == ask(Probe.READINESS, phase), successor


# -- the form


@pytest.mark.parametrize(("probe", "phase"), list(itertools.product(Probe, Phase)))
def test_head_is_get_without_the_body(probe: Probe, phase: Phase) -> None:
    get, head = ask(probe, phase), ask(probe, phase, method="HEAD")
    assert (head.status, head.reason, head.headers, head.body) == (get.status, get.reason, get.headers, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "options", "get", ""])
def test_other_methods_are_not_allowed_in_any_phase(method: str) -> None:
    for probe, phase in itertools.product(Probe, Phase):
        reply = ask(probe, phase, method=method)
        assert reply.status_line == "405 Method Not Allowed"
        assert dict(reply.headers)["Allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize(("probe", "phase"), list(itertools.product(Probe, Phase)))
def test_options_has_the_status_of_get_and_an_empty_body(probe: Probe, phase: Phase) -> None:
    get, options = ask(probe, phase), ask(probe, phase, method="OPTIONS")
    assert (options.status, options.reason, options.body) == (get.status, get.reason, b"")
    expected = {**dict(get.headers), "Content-Length": "0", "Allow": "GET, HEAD, OPTIONS"}
    assert dict(options.headers) == expected


def test_options_for_a_path_that_does_not_exist_is_not_found() -> None:
    assert (not_found("OPTIONS").status, not_found("OPTIONS").body) == (404, b"")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_every_reply_is_plain_short_and_never_cached(method: str) -> None:
    for probe, phase in itertools.product(Probe, Phase):
        reply = ask(probe, phase, method=method)
        headers = dict(reply.headers)
        assert len(headers) == len(reply.headers)
        assert headers["Content-Type"] == "text/plain; charset=utf-8"
        assert headers["Cache-Control"] == "no-store"
        assert method == "HEAD" or headers["Content-Length"] == str(len(reply.body))
        assert headers.get("Retry-After") == ("5" if reply.status == 503 else None), (probe, phase)


def test_paths_are_probes_with_and_without_a_slash_at_their_end() -> None:
    plain = {
        "/livez": (Probe.LIVENESS, ""),
        "/readyz": (Probe.READINESS, ""),
        "/startupz": (Probe.STARTUP, ""),
        "/healthz": (Probe.READINESS, ""),
    }
    assert table(Settings()) == plain | {f"{path}/": asked for path, asked in plain.items()}
    checks = {"db": Kind.READINESS, "stuck": Kind.LIVENESS, "migrations": Kind.STARTUP}
    alone = {path: asked for path, asked in table(Settings(), checks).items() if asked[1] and path[-1] != "/"}
    # Each below the probe in which it has a say, and nowhere else.
    assert alone == {
        "/readyz/db": (Probe.READINESS, "db"),
        "/healthz/db": (Probe.READINESS, "db"),
        "/livez/stuck": (Probe.LIVENESS, "stuck"),
        "/startupz/migrations": (Probe.STARTUP, "migrations"),
    }
    assert table(Settings(), checks)["/livez/stuck/"] == (Probe.LIVENESS, "stuck")


def test_no_check_takes_the_path_of_a_probe() -> None:
    settings = Settings(health_path="/health", liveness_path="/health/live")
    assert table(settings, {"live": Kind.READINESS})["/health/live"] == (Probe.LIVENESS, "")


def test_a_check_alone_is_that_of_the_successor_while_a_generation_retires() -> None:
    well = Health(Phase.RETIRING, Phase.SERVING)
    ill = Health(Phase.RETIRING, Phase.SERVING, successor_trouble="cache; database")
    assert answer(Probe.READINESS, Question(only="database"), well).status == 200
    assert answer(Probe.READINESS, Question(only="database"), ill).status == 503
    assert answer(Probe.READINESS, Question(only="search"), ill).status == 200


@pytest.mark.parametrize("probe", [Probe.LIVENESS, Probe.READINESS])
def test_a_master_that_stalls_is_a_warning_and_fails_nothing(probe: Probe) -> None:
    health = Health(Phase.SERVING, wanted=1, workers=(WorkerHealth(),), worker_timeout=30.0, master_stalled=42.0)
    reply = answer(probe, Question(details=True, verbose=True), health)
    assert reply.status == 200
    assert b"[!]master its main loop has not run for 42 s\n" in reply.body
    assert answer(probe, Question(), health).body == b"ok\n"


def test_paths_are_those_of_the_settings() -> None:
    settings = Settings(liveness_path="/-/alive", readiness_path="/up", health_path="/up", startup_path="/-/begun")
    assert {path for path in table(settings) if not path.endswith("/")} == {"/-/alive", "/up", "/-/begun"}


def test_what_is_no_probe_is_not_found() -> None:
    assert (not_found("GET").status, not_found("HEAD").body) == (404, b"")
    assert Reply(418, "I'm a teapot", (), b"").status_line == "418 I'm a teapot"


@pytest.mark.parametrize(
    ("accept", "json_"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain, application/json", False),
        ("application/json", True),
        ("application/health+json;q=0.9, */*", True),
        ("APPLICATION/JSON ; charset=utf-8", True),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", False),
        ("application/json;q=0", False),
        ("application/jsonp", False),
    ],
)
def test_json_is_for_who_asks_for_it(accept: str, json_: bool) -> None:
    assert Question.read("GET", "", accept).json is json_


@given(query=st.text(), accept=st.text())
def test_no_query_and_no_header_is_too_strange(query: str, accept: str) -> None:
    question = Question.read("GET", query, accept, details=True)
    reply = answer(Probe.READINESS, question, served_by(passed()))
    assert reply.status == 200
    assert dict(reply.headers)["Content-Length"] == str(len(reply.body))


# -- heartbeats and workers


@pytest.mark.parametrize(("silence", "status"), [(0.0, 200), (30.0, 200), (30.1, 503)])
def test_a_service_lives_as_long_as_any_worker_beats(silence: float, status: int) -> None:
    health = served_by([], [], silence=silence, worker_timeout=30.0)
    assert answer(Probe.LIVENESS, Question(), health).status == status
    assert answer(Probe.READINESS, Question(), health).status == status
    assert answer(Probe.LIVENESS, Question(), served_by([], silence=silence)).status == 200


@pytest.mark.parametrize("phase", [Phase.BOOTING, Phase.LAME_DUCK, Phase.DRAINING, Phase.RETIRING])
def test_heartbeats_count_in_a_service_that_serves(phase: Phase) -> None:
    # What is still finishing its work must not be killed for it.
    assert answer(Probe.LIVENESS, Question(), Health(phase, silence=99, worker_timeout=1)).status == 200


def test_a_service_that_wants_no_worker_is_not_ready_and_one_without_gunicorn_is() -> None:
    assert answer(Probe.READINESS, Question(), Health(Phase.SERVING, wanted=0)).status == 503
    assert answer(Probe.READINESS, Question(), Health(Phase.SERVING)).status == 200


def test_a_service_without_a_worker_that_serves_is_not_ready() -> None:
    booting = Health(Phase.SERVING, wanted=2, workers=(WorkerHealth(False), WorkerHealth(False)))
    assert answer(Probe.READINESS, DETAILS, booting).body.splitlines()[1] == b"[-]workers 0 of 2 serve"
    one = Health(Phase.SERVING, wanted=2, workers=(WorkerHealth(True), WorkerHealth(False)))
    assert (
        answer(Probe.READINESS, VERBOSE, one).body == b"[+]phase serving\n[!]workers 1 of 2 serve\nreadiness passed\n"
    )


# -- checks


GOOD, BAD, WARN = Status.OK, Status.FAIL, Status.WARN


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        ([passed()], GOOD),
        ([passed(), passed()], GOOD),
        ([failed()], BAD),
        ([failed(), failed()], BAD),
        # One worker with a broken connection must not take the others out of service.
        ([failed(), passed()], WARN),
        ([failed(result=Result.LATE)], BAD),
        # Nobody knows: never vacuously green.
        ([CheckSeen("database")], BAD),
        ([passed(fresh=False)], BAD),
        ([passed(fresh=False), passed()], WARN),
        ([failed(critical=False)], WARN),
        ([failed(kind=Kind.STARTUP)], WARN),
    ],
)
def test_a_check_fails_when_it_fails_in_every_worker(seen: list[CheckSeen], status: Status) -> None:
    assert judge(seen).status is status


def test_what_hangs_never_fails_liveness() -> None:
    late = failed(kind=Kind.LIVENESS, result=Result.LATE)
    unknown = CheckSeen("database", kind=Kind.LIVENESS)
    stale = failed(kind=Kind.LIVENESS, fresh=False)
    for check in (late, unknown, stale):
        assert answer(Probe.LIVENESS, Question(), served_by(check)).status == 200
    wrong = failed(kind=Kind.LIVENESS)
    assert answer(Probe.LIVENESS, Question(), served_by(wrong)).status == 503
    assert answer(Probe.READINESS, Question(), served_by(wrong)).status == 200


def test_each_kind_has_a_say_in_its_own_probe() -> None:
    for kind in Kind:
        found = {
            probe for probe in Probe if any(each.is_check for each in examine(probe, served_by(failed(kind=kind))))
        }
        assert [probe.value for probe in found] == [kind.label]


def test_a_startup_check_is_shown_while_a_worker_boots() -> None:
    health = Health(Phase.BOOTING, wanted=1, workers=(WorkerHealth(False, (failed("migrations", kind=Kind.STARTUP),)),))
    assert answer(Probe.STARTUP, DETAILS, health).body == (
        b"[-]phase booting\n[!]migrations no route, for 12 s\nstartup failed: phase\n"
    )


def test_what_keeps_a_boot_up_is_shown_by_readiness_too() -> None:
    health = Health(Phase.BOOTING, wanted=1, workers=(WorkerHealth(False, (failed(),)),))
    shown = b"[-]phase booting\n[-]database no route, for 12 s\nreadiness failed: phase, database\n"
    assert answer(Probe.READINESS, DETAILS, health).body == shown
    alone = answer(Probe.READINESS, Question(only="database", details=True), health)
    assert alone.body.startswith(b"[-]database no route")
    assert answer(Probe.LIVENESS, Question(), health).status == 200


def test_workers_that_do_not_serve_have_no_say() -> None:
    health = Health(
        Phase.SERVING, wanted=1, workers=(WorkerHealth(True, (passed(),)), WorkerHealth(False, (failed(), failed("b"))))
    )
    assert [each.name for each in examine(Probe.READINESS, health)] == ["phase", "workers", "database"]
    assert answer(Probe.READINESS, Question(), health).status == 200


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.SERVING])
def test_no_check_says_more_than_the_phase(phase: Phase) -> None:
    health = Health(phase, wanted=1, workers=(WorkerHealth(True, (passed(),)),))
    assert answer(Probe.READINESS, Question(), health).status == 503


def test_a_check_can_be_asked_alone_and_left_out() -> None:
    health = served_by([passed("database"), failed("cache")])
    assert answer(Probe.READINESS, Question(), health).status == 503
    assert answer(Probe.READINESS, Question(only="database"), health).status == 200
    assert answer(Probe.READINESS, Question(only="cache"), health).status == 503
    assert answer(Probe.READINESS, Question(only="nobody_knows_it"), health).status == 503
    assert answer(Probe.READINESS, Question(exclude=("cache",)), health).status == 200
    # The drain cannot be left out.
    assert answer(Probe.READINESS, Question(exclude=("phase", "workers")), Health(Phase.DRAINING)).status == 503


def test_details_are_for_those_who_may_see_them() -> None:
    health = served_by([failed("secret", message="OperationalError: postgres://shop:pw@db:5432")])
    for question in (Question(), Question(verbose=True), Question(only="secret"), Question(verbose=True, json=True)):
        reply = answer(Probe.READINESS, question, health)
        assert reply.status == 503
        assert not {b"secret", b"postgres", b"Error"} & {
            word for word in (b"secret", b"postgres", b"Error") if word in reply.body
        }
    assert answer(Probe.READINESS, Question(), health).body == b"failed\n"


def test_text_is_marked_as_kubernetes_marks_it() -> None:
    health = served_by(
        [failed(), passed("cache"), failed("search", critical=False, failing_for=0.2)],
        [failed(), passed("cache"), passed("search")],
    )
    question = Question(details=True, verbose=True, exclude=("cahe",))
    assert answer(Probe.READINESS, question, health).body.decode().splitlines() == [
        "[+]phase serving",
        "[+]workers 2 of 2 serve",
        "[-]database no route (in 2 of 2 workers), for 12 s",
        "[+]cache ok",
        "[!]search no route (in 1 of 2 workers), for 0 s",
        "warn: 'cahe' was to be excluded and is not a check here",
        "readiness failed: database",
    ]
    # Without being asked when something fails, and not otherwise.
    assert answer(Probe.READINESS, DETAILS, health).body.startswith(b"[+]phase")
    assert answer(Probe.READINESS, DETAILS, served_by(passed())).body == b"ok\n"


def test_json_says_the_same() -> None:
    health = served_by([failed("search", critical=False), passed("cache")])
    public = answer(Probe.READINESS, Question(json=True), health)
    assert dict(public.headers)["Content-Type"] == "application/json"
    assert json.loads(public.body) == {"status": "ok", "probe": "readiness", "phase": "serving"}
    said = json.loads(answer(Probe.READINESS, Question(json=True, details=True, exclude=("x",)), health).body)
    assert said["status"] == "warn"
    assert said["findings"][2:] == [
        {"name": "search", "status": "warn", "text": "no route", "check": True, "failing_for": 12.3},
        {"name": "cache", "status": "ok", "text": "ok", "check": True},
    ]
    assert said["warnings"] == ["'x' was to be excluded and is not a check here"]
