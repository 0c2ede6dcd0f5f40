"""systemd is told in one datagram, or there is nobody to tell."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from zdd_web.listeners.notify import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_lines_arrive_in_one_datagram(tmp_path: Path, abstract: bool) -> None:
    name = f"zdd_web-unit-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}" if abstract else name)
        assert notify("MAINPID=4711", "READY=1", environ={"NOTIFY_SOCKET": f"@{name}" if abstract else name}) is True
        assert systemd.recv(100) == b"MAINPID=4711\nREADY=1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
def test_nobody_to_tell_is_no_error(environ: dict[str, str]) -> None:
    assert notify("READY=1", environ=environ) is False


def test_socket_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        notify("READY=1", environ={"NOTIFY_SOCKET": str(tmp_path / "gone")})
