"""systemd is told in one datagram, or there is nobody to tell."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from zdd_web.system.sd_notify import MOST_BYTES, datagram, notify


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


def test_full_socket_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(environ["NOTIFY_SOCKET"])

        def fill() -> None:
            while True:
                notify("READY=1", environ=environ)

        with pytest.raises(BlockingIOError):
            fill()
        with pytest.raises(TimeoutError):
            notify("READY=1", environ=environ, patience=0.001)
        systemd.recv(100)
        assert notify("READY=1", environ=environ, patience=60.0)


@pytest.mark.parametrize("breaks", ["\n", "\r\n", "\0", "\x1b[31m", "\x85", "\u2028"])
def test_no_line_becomes_two(breaks: str) -> None:
    said = datagram("READY=1", f"STATUS=it said{breaks}MAINPID=1").decode()
    assert said.splitlines()[0] == "READY=1"
    assert len(said.splitlines()) == 2


def test_long_status_is_cut_between_characters() -> None:
    said = datagram("READY=1", "STATUS=" + "\N{SNOWMAN}" * MOST_BYTES)
    assert MOST_BYTES - 3 < len(said) <= MOST_BYTES
    assert said.decode().endswith("\N{SNOWMAN}")
    assert datagram("STATUS=\udce4") == b"STATUS=\\udce4"
