"""Bytecode of the package and of the tests, written once: before services start, and before test processes collect.

It is written even under PYTHONDONTWRITEBYTECODE: each service that compiled the package would take 0.2 s of CPU more,
and each of xdist's processes 10 s to rewrite the same assertions as the others.
"""

from __future__ import annotations

import compileall
import contextlib
import multiprocessing
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import zdd_web
from tests.helpers.tiers import is_asked_for, markers_of

TESTS = Path(__file__).resolve().parents[1]
#: What pytest compiles in its own way.
REWRITTEN = re.compile(r"/(test_[^/]*|conftest)\.py$")


def write(config: pytest.Config) -> None:
    """Compile what has changed, for the test processes and services of this run."""
    compileall.compile_dir(os.path.dirname(zdd_web.__file__), quiet=2)
    if not getattr(config.option, "numprocesses", None):
        return  # this process will rewrite each file once
    compileall.compile_dir(TESTS, quiet=2, rx=REWRITTEN)
    # Where pytest has changed inside, each of xdist's processes rewrites for itself, as without us.
    with contextlib.suppress(ImportError, AttributeError, KeyError):
        _rewrite(config, list(_to_rewrite(config)))


def _to_rewrite(config: pytest.Config) -> Iterator[tuple[Path, Path]]:
    """Yield the test files of this run that pytest has not rewritten yet, each with where that is kept."""
    from _pytest.assertion.rewrite import PYC_TAIL

    for argument in config.args:
        path = Path(argument.partition("::")[0]).resolve()
        for source in [path] if path.is_file() else path.rglob("test_*.py"):
            # Nor what this run does not read: for the smoke tests alone that would be most of their time.
            if not source.is_relative_to(TESTS) or not is_asked_for(markers_of(source), config.option.markexpr):
                continue
            kept = source.parent / "__pycache__" / (source.stem + PYC_TAIL)
            if not kept.exists() or kept.stat().st_mtime < source.stat().st_mtime:
                yield source, kept


def _rewrite(config: pytest.Config, files: list[tuple[Path, Path]]) -> None:
    """Rewrite these files, on all cores."""
    from _pytest.assertion import rewrite

    state, _, _ = config.stash[rewrite.assertstate_key], rewrite._rewrite_test, rewrite._write_pyc
    count = min(os.cpu_count() or 1, len(files))

    def share(number: int) -> None:
        for source, kept in files[number::count]:
            # What cannot be written, or is not Python, is for pytest to report.
            with contextlib.suppress(OSError, SyntaxError):
                kept.parent.mkdir(exist_ok=True)
                identity, code = rewrite._rewrite_test(source, config)
                rewrite._write_pyc(state, code, identity, kept)

    # Forked, because nothing of this can be pickled; the controller of a test run has no threads yet.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=share, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
