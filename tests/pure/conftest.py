"""Tests of decisions and documents: no fork, no socket, no process."""

from __future__ import annotations

from tests.helpers.in_process import no_handle, nothing_is_left_behind, service

__all__ = ["no_handle", "nothing_is_left_behind", "service"]
