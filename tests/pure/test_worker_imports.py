"""Imports inside `gunicorn/workers`, those for type checkers included: there is no cycle, and none leads upwards."""

from __future__ import annotations

import graphlib

from tests.pure.test_architecture import imports, trees

WORKERS = "zdd_web.gunicorn.workers"

#: What a worker may use of gunicorn/ beside its own part: what is below it. The master and the upgrade
#: use the workers' part, and not the other way round.
BELOW = {"adapter", "log_rotation", "process_exit", "settings_in_force", "sockets"}


def graph() -> dict[str, set[str]]:
    """Return which module of the workers' part imports which others."""
    modules = {module: set[str]() for module in trees() if module.startswith(f"{WORKERS}.")}
    for each in imports():
        # A name of a module is an import of the module.
        target = each.name if each.name in modules else each.name.rpartition(".")[0]
        if each.importer in modules and target in modules:
            modules[each.importer].add(target)
    return modules


def test_there_is_no_cycle_among_the_modules_of_a_worker() -> None:
    found = graph()
    assert f"{WORKERS}.worker_adapter" in found[f"{WORKERS}.gevent_adapter"]
    order = list(graphlib.TopologicalSorter(found).static_order())
    assert order[-1] == f"{WORKERS}.runtime"


def test_an_adapter_does_not_know_the_runtime() -> None:
    users = {module for module, used in graph().items() if f"{WORKERS}.runtime" in used}
    assert users == set()


def test_states_are_decided_without_touching_anything() -> None:
    used = {each.name for each in imports() if each.importer == f"{WORKERS}.exit_states"}
    assert {name.partition(".")[0] for name in used} == {"__future__", "collections", "enum", "zdd_web"}
    assert {name.split(".")[1] for name in used if name.startswith("zdd_web.")} == {"errors", "lifecycle"}


def test_a_worker_uses_nothing_of_what_stands_above_it() -> None:
    prefix = "zdd_web.gunicorn."
    used = {
        each.name.removeprefix(prefix).split(".")[0]
        for each in imports()
        if each.importer.startswith(f"{WORKERS}.") and each.name.startswith(prefix)
    }
    assert used - {"workers"} <= BELOW
