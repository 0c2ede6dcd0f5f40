"""What fails in a successor, as the probes of a retiring generation have it."""

from __future__ import annotations

from zdd_web.board import MAX_CHECKS, Board, Header
from zdd_web.gunicorn.upgrade.successor_health import successor_health
from zdd_web.health import Health, Kind, Probe, Question, Result, answer
from zdd_web.lifecycle import Phase
from zdd_web.probes import look
from zdd_web.system import clock

DETAILS = Question(details=True)


def test_the_trouble_of_a_successor_has_the_name_of_every_check_that_fails() -> None:
    names = [f"{number:02}".join(("warehouse_connection_of_region_", "_is_reachable")) for number in range(MAX_CHECKS)]
    successor, ours = Board.private(), Board.private()
    slot = successor.slot(0)
    for index, name in enumerate(names):
        record = slot.check(index)
        record.name, record.kind, record.critical, record.result = name, Kind.READINESS, 1, Result.FAILED
        record.fresh_until = clock.after_ns(60)
    slot.checks = len(names)
    ours.header.alone, ours.header.phase = 0, Phase.RETIRING
    ours.header.successor_phase, ours.header.successor_trouble = successor_health(successor)
    asked = {name: answer(Probe.READINESS, Question(only=name), look(ours)).status for name in names}
    assert asked == dict.fromkeys(names, 503)
    assert answer(Probe.READINESS, Question(only=names[0][:-1]), look(ours)).status == 200


def test_a_service_without_workers_is_not_a_check_with_that_name() -> None:
    successor = Board.private()
    successor.header.alone, successor.header.workers_wanted = 0, 2
    health = Health(Phase.RETIRING, Phase.SERVING, successor_trouble=successor_health(successor)[1])
    assert answer(Probe.READINESS, Question(only="workers"), health).status == 200
    assert answer(Probe.READINESS, DETAILS, health).body.startswith(b"[+]phase serving\n[-]successor workers: 0 of 2 ")


def test_the_board_of_an_earlier_version_has_a_shorter_list_of_trouble() -> None:
    board = Board.private()
    board.header.successor_trouble = "database; cache"
    assert board.header.successor_trouble == "database; cache"
    board.header.slots_at = Header.successor_trouble_whole.index
    board.header.successor_trouble_whole = "a word of a slot"
    assert board.header.successor_trouble == "database; cache"
