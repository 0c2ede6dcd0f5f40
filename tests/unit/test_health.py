"""What each phase answers to each probe: the design's table, whole."""

from __future__ import annotations

import itertools

import pytest

from zdd_web.health import Probe, Reply, decide, table
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


@pytest.mark.parametrize("phase", Phase)
def test_readiness_is_that_of_the_phase(phase: Phase) -> None:
    reply = decide(Probe.READINESS, "GET", phase)
    assert (reply.status, reply.body) == READINESS[phase]


@pytest.mark.parametrize("phase", Phase)
def test_liveness_stays_up_to_the_end(phase: Phase) -> None:
    reply = decide(Probe.LIVENESS, "GET", phase)
    assert (reply.status_line, reply.body) == ("200 OK", b"ok\n")


@pytest.mark.parametrize("successor", Phase)
def test_readiness_of_a_retiring_generation_is_that_of_its_successor(successor: Phase) -> None:
    reply = decide(Probe.READINESS, "GET", Phase.RETIRING, successor)
    assert (reply.status, reply.body) == READINESS[successor]
    assert decide(Probe.LIVENESS, "GET", Phase.RETIRING, successor).status == 200


@pytest.mark.parametrize(
    ("phase", "successor"),
    list(itertools.product([phase for phase in Phase if phase is not Phase.RETIRING], Phase)),
)
def test_successor_has_no_say_before_the_handover(phase: Phase, successor: Phase) -> None:
    assert decide(Probe.READINESS, "GET", phase, successor) == decide(Probe.READINESS, "GET", phase)


@pytest.mark.parametrize(("probe", "phase"), list(itertools.product(Probe, Phase)))
def test_head_is_get_without_the_body(probe: Probe, phase: Phase) -> None:
    get, head = decide(probe, "GET", phase), decide(probe, "HEAD", phase)
    assert (head.status, head.reason, head.headers, head.body) == (get.status, get.reason, get.headers, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get", ""])
@pytest.mark.parametrize("probe", Probe)
def test_other_methods_are_not_allowed_in_any_phase(probe: Probe, method: str) -> None:
    for phase in Phase:
        reply = decide(probe, method, phase)
        assert reply.status_line == "405 Method Not Allowed"
        assert dict(reply.headers)["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(("probe", "method", "phase"), list(itertools.product(Probe, ["GET", "HEAD", "POST"], Phase)))
def test_every_reply_is_plain_short_and_never_cached(probe: Probe, method: str, phase: Phase) -> None:
    reply = decide(probe, method, phase)
    headers = dict(reply.headers)
    assert len(headers) == len(reply.headers)
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert method == "HEAD" or headers["Content-Length"] == str(len(reply.body))
    assert headers.get("Retry-After") == ("5" if reply.status == 503 else None)


def test_paths_are_probes_with_and_without_a_slash_at_their_end() -> None:
    assert table(Settings()) == {
        "/livez": Probe.LIVENESS,
        "/livez/": Probe.LIVENESS,
        "/readyz": Probe.READINESS,
        "/readyz/": Probe.READINESS,
        "/healthz": Probe.READINESS,
        "/healthz/": Probe.READINESS,
    }


def test_paths_are_those_of_the_settings() -> None:
    settings = Settings(liveness_path="/-/alive", readiness_path="/up", health_path="/up")
    assert table(settings) == {
        "/-/alive": Probe.LIVENESS,
        "/-/alive/": Probe.LIVENESS,
        "/up": Probe.READINESS,
        "/up/": Probe.READINESS,
    }


def test_status_line_is_as_wsgi_wants_it() -> None:
    assert Reply(418, "I'm a teapot", (), b"").status_line == "418 I'm a teapot"
