"""Whether the file of a Unix socket leads to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zdd_web.listeners.socket_file import identity, leads_to

SERVE = "import socket, sys; s = socket.socket(1); s.bind(sys.argv[1]); s.listen(); print('up', flush=True); input()"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "app.sock")


@pytest.fixture
def listener(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)
        made.listen(1)
        yield made


def test_file_leads_to_its_listener_also_by_a_link_and_when_the_queue_is_full(
    path: str, listener: socket.socket, tmp_path: Path
) -> None:
    os.symlink(path, tmp_path / "link")
    assert leads_to(path, listener)
    assert leads_to(str(tmp_path / "link"), listener)
    assert leads_to(path, listener)


def test_file_that_was_removed_leads_nowhere(path: str, listener: socket.socket) -> None:
    os.unlink(path)
    assert not leads_to(path, listener)
    assert identity(path) is None


def test_stale_socket_and_another_kind_of_file_lead_nowhere(path: str, listener: socket.socket) -> None:
    own = identity(path)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
    assert not leads_to(path, listener)
    assert identity(path) not in (own, None)
    os.unlink(path)
    Path(path).write_text("")
    assert not leads_to(path, listener)
    assert identity(path) is None


def test_socket_of_another_process_is_another(path: str, listener: socket.socket) -> None:
    os.unlink(path)
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == b"up\n"
        assert not leads_to(path, listener)
        other.communicate(b"\n")
