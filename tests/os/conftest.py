"""Tests with real pipes, forks, sockets and threads, without a server."""

from __future__ import annotations

from tests.helpers.commands import masters, name
from tests.helpers.in_process import no_handle, nothing_is_left_behind, service

__all__ = ["masters", "name", "no_handle", "nothing_is_left_behind", "service"]
