"""Checks: what fails, how soon, what is said of it, and where they come from."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from zdd_web import process
from zdd_web.board import MAX_CHECKS, Board
from zdd_web.checks import Registry, Runner, State, check, failing, load, pass_all, registered, registry, runner
from zdd_web.errors import LifecycleError, SettingsError
from zdd_web.health import Kind, Result
from zdd_web.probes import Probes, is_loopback, kinds, look, may_see
from zdd_web.settings import Settings
from zdd_web.waitgroup import all_groups, background, on_drained, run_drained_hooks

DEADLINE = 20


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "shared", registry.Registry())
    monkeypatch.setattr(registry, "listener", None)
    monkeypatch.setattr(runner, "AGAIN", 0.01)
    monkeypatch.setattr(runner, "BEAT", 0.01)
    yield


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def quiet(why: str = "") -> None:
    pass


def turn_until(runner: Runner, what: Callable[[], object]) -> None:
    until = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < until
        runner.wake.wait(min(0.01, runner.turn()))


def test_what_raises_returns_false_or_hangs_has_failed_and_the_rest_has_not(never: threading.Event) -> None:
    @check("passes")
    def passes() -> None: ...

    @check("true")
    def true() -> bool:
        return True

    @check("false")
    def false() -> bool:
        return False

    @check("raises")
    def raises() -> None:
        raise ConnectionRefusedError("no database")

    @check("exits")
    def exits() -> None:
        sys.exit(3)

    @check("hangs", timeout=0.05)
    def hangs() -> None:
        never.wait(30)

    @check("asynchronous")
    async def asynchronous() -> bool:
        return False

    @check("sleeps", timeout=0.05)
    async def sleeps() -> None:
        await asyncio.sleep(30)

    assert failing() == {
        "false": "it returned False",
        "raises": "ConnectionRefusedError: no database",
        "exits": "SystemExit: 3",
        "hangs": "no answer within 0.05 s",
        "asynchronous": "it returned False",
        "sleeps": "no answer within 0.05 s",
    }


def test_a_check_that_hangs_is_not_started_a_second_time(never: threading.Event) -> None:
    started, seen = [], []

    @check("hangs", timeout=0.01, interval=0.01)
    def hangs() -> None:
        started.append(1)
        never.wait(30)

    @check("quick", interval=0.01)
    def quick() -> None:
        seen.append(1)

    here = Runner()
    threads = threading.active_count()
    # A hundred intervals of both.
    turn_until(here, lambda: len(seen) >= 100)
    assert (started, here.states[0].result) == ([1], Result.LATE)
    assert threading.active_count() <= threads + 2
    never.set()
    turn_until(here, lambda: here.states[0].result is Result.PASSED)


def test_a_worker_waits_beats_and_says_why_until_the_critical_checks_pass(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tries, beats, said = [], [], []

    @check("database")
    def database() -> bool:
        tries.append(1)
        return len(tries) >= 3

    @check("cache", critical=False)
    def cache() -> bool:
        return False

    pass_all(Runner(), lambda: beats.append(1), said.append)
    assert len(tries) == 3
    assert len(beats) >= 2
    assert said == ["check 'database' failed: it returned False", ""]
    # Once for as long as it fails in the same way.
    assert sorted(record.getMessage().partition(" after=")[0] for record in caplog.records) == [
        'event=check.failed check=cache critical=False error="it returned False"',
        'event=check.failed check=database critical=True error="it returned False"',
        "event=check.passed check=database",
    ]


def test_without_checks_nobody_waits() -> None:
    pass_all(Runner(), quiet, quiet)
    assert failing() == {}


def test_a_startup_check_is_asked_until_it_passes_and_never_again() -> None:
    seen = {"startup": 0, "readiness": 0}

    for kind in seen:

        def count(kind: str = kind) -> bool:
            seen[kind] += 1
            return seen[kind] > 1

        count.__qualname__ = kind
        check(kind, kind=kind, interval=0.01)(count)
    here = Runner()
    turn_until(here, lambda: seen["readiness"] >= 10)
    assert seen["startup"] == 2


def test_a_startup_check_that_is_not_critical_is_not_asked_by_workers_that_serve() -> None:
    seen: list[int] = []
    check("optional", kind="startup", critical=False, interval=0.01)(lambda: seen.append(1) or False)
    here = Runner()
    pass_all(here, quiet, quiet)
    asked = len(seen)
    here.start()
    assert here.states == []
    assert len(seen) == asked


def test_one_check_does_not_wait_for_another() -> None:
    @check("slow", critical=False, timeout=0.3)
    async def slow() -> None:
        await asyncio.sleep(30)

    @check("quick", timeout=0.3)
    async def quick() -> None: ...

    assert failing() == {"slow": "no answer within 0.3 s"}


def test_all_is_asked_once_whatever_fails(never: threading.Event) -> None:
    seen: list[int] = []
    check("wrong", interval=0.01)(lambda: seen.append(1) or False)
    check("slow", timeout=0.2)(lambda: never.wait(30))
    assert set(failing()) == {"wrong", "slow"}


def test_a_machine_without_threads_fails_a_check_and_not_all_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    check("database", interval=0.01)(lambda: None)
    start, refused = threading.Thread.start, [1]

    def refuse(thread: threading.Thread) -> None:
        if refused and thread.name.startswith("zdd_web-check-"):
            refused.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    here = Runner()
    turn_until(here, lambda: here.states[0].result is Result.FAILED)
    assert here.states[0].message == "RuntimeError: can't start new thread"
    turn_until(here, lambda: here.states[0].result is Result.PASSED)


def test_an_error_without_words_is_one_too() -> None:
    class WordlessError(Exception):
        def __str__(self) -> str:
            raise ValueError

    @check("wordless")
    def wordless() -> None:
        raise WordlessError

    assert failing() == {"wordless": "WordlessError"}


def test_whatever_can_be_awaited_is() -> None:
    class Answer:
        def __await__(self) -> Iterator[None]:
            raise ConnectionError("gone")
            yield

    check("answer")(lambda: Answer())
    assert failing() == {"answer": "ConnectionError: gone"}


def test_nothing_is_started_while_the_process_leaves() -> None:
    seen: list[int] = []
    check("database", interval=0.01)(lambda: seen.append(1))
    leaving = [True]
    here = Runner(idle=lambda: leaving[0])
    for _ in range(5):
        here.turn()
    assert seen == []
    leaving[0] = False
    turn_until(here, lambda: seen)


def test_async_checks_run_in_the_loop_that_is_there() -> None:
    loops = []

    @check("loop")
    async def loop_of() -> None:
        loops.append(asyncio.get_running_loop())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        here = Runner(loop=loop)
        await asyncio.to_thread(pass_all, here, quiet, quiet)
        assert loops == [loop]

    asyncio.run(main())


# -- the registry


def test_one_name_is_one_check() -> None:
    @check("database")
    def one() -> None: ...

    with pytest.raises(SettingsError, match=r"check 'database' is registered twice, by .*one and .*two: give one"):

        @check("database")
        def two() -> None: ...

    # The same place, imported again.
    check("database")(one)


@pytest.mark.parametrize("name", ["", "two words", 5, "a-b", "a" * 49, "datenbänk"])
def test_a_name_can_be_logged(name: object) -> None:
    with pytest.raises(SettingsError, match="a name must be letters"):
        check(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0, -1, 3601, True, "2", float("nan")])
def test_times_are_seconds(seconds: object) -> None:
    with pytest.raises(SettingsError, match=r"timeout = .* must be seconds between 0 and 60"):
        check("database", timeout=seconds)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"interval = .* must be seconds between 0 and 3600"):
        check("database", interval=seconds)  # type: ignore[arg-type]


def test_a_kind_is_one() -> None:
    with pytest.raises(SettingsError, match="kind = 'live' must be one of 'readiness', 'liveness', 'startup'"):
        check("database", kind="live")


def test_there_are_not_more_than_the_board_holds() -> None:
    for number in range(MAX_CHECKS):
        check(f"check_{number}")(lambda: None)
    with pytest.raises(SettingsError, match="one too many"):
        check("more")(lambda: None)


# -- CHECKS


@pytest.fixture
def shop() -> Iterator[types.ModuleType]:
    module = types.ModuleType("zdd_shop")

    class Cache:
        def __init__(self, alias: str = "default") -> None:
            self.alias = alias

        async def run(self) -> None:
            if self.alias != "default":
                raise ConnectionError(self.alias)

    def database(alias: str = "default") -> bool:
        return alias == "default"

    def migrations() -> None: ...

    for each in (Cache, database, migrations):
        each.__module__, each.__qualname__ = "zdd_shop", each.__name__
        setattr(module, each.__name__, each)
    migrations.zdd_check = {"kind": "startup"}  # type: ignore[attr-defined]
    module.number = 5  # type: ignore[attr-defined]
    sys.modules["zdd_shop"] = module
    yield module
    del sys.modules["zdd_shop"]


def named(*entries: Any) -> None:
    load(Settings(checks=entries).checks)


def test_checks_are_named_by_their_path_and_given_options(shop: types.ModuleType) -> None:
    named(
        "zdd_shop.database",
        ("zdd_shop.database", {"alias": "replica", "name": "replica", "critical": False, "interval": 30}),
        "zdd_shop.Cache",
        ("zdd_shop.Cache", {"alias": "sessions", "name": "sessions", "timeout": 1}),
        "zdd_shop.migrations",
    )
    assert [(each.name, each.critical, each.interval, each.timeout, each.kind) for each in registered()] == [
        ("database", True, 10, 2, Kind.READINESS),
        ("replica", False, 30, 2, Kind.READINESS),
        ("cache", True, 10, 2, Kind.READINESS),
        ("sessions", True, 10, 1, Kind.READINESS),
        ("migrations", True, 10, 2, Kind.STARTUP),
    ]
    assert failing() == {"replica": "it returned False", "sessions": "ConnectionError: sessions"}
    # A reload of the settings names the same ones.
    named("zdd_shop.database")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("zdd_nowhere.database", "CHECKS: zdd_nowhere.database: there is no module 'zdd_nowhere'"),
        ("zdd_shop.databse", "CHECKS: zdd_shop.databse: .*has no 'databse'|there is no module"),
        ("zdd_shop.number", "CHECKS: zdd_shop.number is int, and no function"),
        ("email.mime", "CHECKS: module email.mime registers no check"),
        (("zdd_shop.database", {"alais": "x"}), "CHECKS: zdd_shop.database with {'alais': 'x'}: .*'alais'"),
        (("zdd_shop.database", {"kind": "live"}), "CHECKS: zdd_shop.database: check 'database': kind = 'live' must"),
        ("fractions.Fraction", "it is a class without run"),
        ("time.mktime", "CHECKS: time.mktime with {}: "),
    ],
)
def test_what_cannot_be_a_check_ends_the_start(shop: types.ModuleType, entry: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        named(entry)


def test_an_error_in_a_checks_module_is_not_taken_for_a_missing_one(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "zdd_broken.py").write_text("import zdd_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="zdd_not_installed"):
        named("zdd_broken.database")


@pytest.mark.parametrize("value", [5, [5], ["database"], [("a.b",)], [("a.b", 5)], [("a.b", {1: 2})], ["a.b()"]])
def test_the_setting_is_a_list_of_paths(value: object) -> None:
    with pytest.raises(SettingsError, match="CHECKS = "):
        Settings(checks=value)  # type: ignore[arg-type]


# -- on the board


def test_results_stand_on_the_board_and_probes_read_them(never: threading.Event) -> None:
    board = Board.private()
    here = process.attach(board, None, Settings())
    answers = [True]

    @check("database", interval=0.01)
    def database() -> bool:
        return answers[0]

    @check("hangs", timeout=0.05, critical=False)
    def hangs() -> None:
        never.wait(30)

    probes = Probes()
    first = probes.answer("/readyz", "GET")
    assert first is not None and first.status == 200
    seen = {each.name: each for each in look(board).workers[0].checks}
    assert (seen["database"].result, seen["hangs"].result) == (Result.PASSED, Result.LATE)
    assert (seen["hangs"].message, seen["hangs"].critical) == ("no answer within 0.05 s", False)
    answers[0] = False
    until = time.monotonic() + DEADLINE
    while (reply := probes.answer("/readyz", "GET")) and reply.status == 200:
        assert time.monotonic() < until
    assert reply is not None and reply.body == b"failed\n"
    alone = probes.answer("/readyz/database/", "GET")
    assert alone is not None and alone.status == 503
    assert probes.answer("/readyz/nobody", "GET") is None
    here.stop_checks()


def test_a_check_that_comes_later_is_asked_too() -> None:
    here = process.attach(Board.private(), None, Settings(details="always"))
    probes = Probes()
    assert (probes.answer("/readyz", "GET") or pytest.fail()).status == 200
    check("late")(lambda: False)
    reply = probes.answer("/readyz", "GET", peer="10.1.2.3")
    assert reply is not None and b"[-]late it returned False" in reply.body
    here.stop_checks()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[process.Process]:
    """This process as a worker of gunicorn."""
    monkeypatch.setattr(all_groups, "observer", None)
    board = Board.private()
    board.header.alone = 0
    yield process.attach(board, board.slot(0), Settings())
    process.attach(Board.private(), None, Settings())


def test_a_worker_runs_the_checks_of_all_apps(worker: process.Process) -> None:
    check("shared")(lambda: None)
    apps = [Registry(), Registry()]
    apps[0].check("one")(lambda: None)
    apps[1].check("two")(lambda: None)
    assert [state.check.name for state in worker.checks_runner().states] == ["shared", "one", "two"]
    assert set(kinds(worker.board)) == {"shared", "one", "two"}
    # Whichever app is asked.
    assert (Probes(own=apps[0]).answer("/readyz/two", "GET") or pytest.fail()).status == 503


def test_two_apps_of_a_worker_share_a_name_only_for_the_same_check() -> None:
    def factory(result: bool) -> Registry:
        made = Registry()
        made.check("database")(lambda: result)
        return made

    apps = [factory(False), factory(True)]
    (only,) = registered()
    assert only.function() is True
    other = Registry()
    other.check("database")(quiet)
    with pytest.raises(SettingsError, match=r"check 'database' is registered twice, by .*factory.* and .*quiet"):
        registered()
    del apps


def test_a_check_that_is_registered_again_in_a_worker_runs_from_then_on() -> None:
    answers, calls = [], []

    def register(answer: str) -> None:
        check("database", interval=0.01)(lambda: calls.append(answer))

    register("old")
    made = Runner(lambda state: answers.append(state.result))
    made.start()
    until = time.monotonic() + DEADLINE
    while "old" not in calls:
        assert time.monotonic() < until
    register("new")
    while "new" not in calls:
        assert time.monotonic() < until
    made.stop()
    assert len(made.states) == 1


def test_reset_forgets_what_all_apps_share_and_opens_groups_again() -> None:
    here = process.attach(Board.private(), None, Settings())
    check("database")(lambda: False)
    own = Registry()
    own.check("own")(lambda: None)
    on_drained(lambda: pytest.fail())
    background.close()
    probes = Probes()
    assert (probes.answer("/readyz", "GET") or pytest.fail()).status == 503
    process.reset()
    assert (probes.answer("/readyz", "GET") or pytest.fail()).status == 200
    assert background.go(lambda: 1).result(DEADLINE) == 1
    run_drained_hooks()
    assert list(own.kinds()) == ["own"]
    here.stop_checks()


def test_a_worker_is_not_reset(worker: process.Process) -> None:
    with pytest.raises(LifecycleError, match=r"reset\(\) is for tests"):
        process.reset()


def test_a_result_that_is_too_old_is_no_result() -> None:
    here = process.attach(Board.private(), None, Settings())
    check("database")(lambda: None)
    made = here.checks_runner()
    pass_all(made, quiet, quiet)
    assert look(here.board).workers[0].checks[0].fresh
    record = here.board.slot(0).check(0)
    # Interval, time limit and slack.
    assert (record.fresh_until - record.at) / 1e9 == 17.0
    record.fresh_until = 1
    assert not look(here.board).workers[0].checks[0].fresh


def test_long_messages_and_strange_ones_are_cut_and_kept(never: threading.Event) -> None:
    here = process.attach(Board.private(), None, Settings())

    @check("database")
    def database() -> None:
        raise ValueError("é" * 500 + "\udc80")

    made = here.checks_runner()
    turn_until(made, lambda: made.states[0].result is Result.FAILED)
    assert look(here.board).workers[0].checks[0].message.startswith("ValueError: éé")
    assert isinstance(made.states[0], State)


@pytest.mark.parametrize(
    ("peer", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False),
     ("", False), ("unix:", False), ("::ffff:10.0.0.1", False)],
)  # fmt: skip
def test_loopback_is_this_machine(peer: str, loopback: bool) -> None:
    assert is_loopback(peer) is loopback
    assert may_see("", peer, "loopback") is loopback
    assert may_see("", peer, "never") is False
    assert may_see("always", peer, "never") is True
