"""What takes minutes, and is not part of CI: `pytest -n 8 -m long`, for a change in how a worker or a master ends.

CI has the same at a smaller scale: tests/processes/test_every_line.py for each second line of one request, and the
scenes of tests/processes for what a random walk meets.
"""

from __future__ import annotations

import os
import shutil

import pytest

from tests.processes.test_every_line import told_to_leave_at_each_line
from tests.soak.random_walk import walk_once

#: Of a worker's loop, from its first.
LINES = int(os.environ.get("ZDD_WEB_TEST_LINES", "2000"))

#: How many sequences of signals, kills, standstills, deploys and attacks, over both worker classes.
SEQUENCES = int(os.environ.get("ZDD_WEB_TEST_SEQUENCES", "200"))
SEED = int(os.environ.get("ZDD_WEB_TEST_SEED", "1"))


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_a_worker_that_is_told_to_leave_at_any_of_many_lines_loses_nothing(make_service, worker_class: str) -> None:
    told_to_leave_at_each_line(make_service(worker_class, workers=1), LINES)


@pytest.mark.parametrize("number", range(1, SEQUENCES + 1))
def test_a_random_walk_violates_no_promise(number: int) -> None:
    worker_class = ("sync", "gthread")[number % 2]
    verdict, walk = walk_once(SEED, number, worker_class)
    repeat = (
        f"python -m tests.soak.random_walk --seed {SEED} --start {number} --sequences 1 --worker-class {worker_class}"
    )
    steps = "\n".join([*walk.steps, f"repeat: {repeat}"])
    assert not verdict, f"{verdict}\n{walk.service.log()}\nsteps:\n{steps}"
    shutil.rmtree(walk.service.directory, ignore_errors=True)
