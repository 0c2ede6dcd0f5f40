"""Every error that zdd_web raises on purpose.

A message says what was wrong, the value that was seen, where it came from, and what to write instead.
"""

from __future__ import annotations


class ZddError(Exception):
    """Base of all errors of this package."""


class SettingsError(ZddError):
    """A setting cannot work: unknown name, wrong type, impossible value or a contradiction."""


class ListenerError(ZddError):
    """A listening socket cannot be had, inherited or told apart."""


class LifecycleError(ZddError):
    """An event arrived in a phase that does not know it; nothing was changed."""


class BoardError(ZddError):
    """The shared-memory board is full, foreign, or of another layout."""


class UpgradeError(ZddError):
    """An upgrade was refused or failed; the old generation serves on."""


class NeedsUpgrade(ZddError):
    """A reload (SIGHUP) was refused, because only an upgrade (SIGUSR2) can make the change."""


class ServiceNotFound(ZddError):
    """No running service, or more than one, answers to what the operator named."""


class GroupClosed(ZddError):
    """Background work was offered to a group that accepts no more: the process is about to end."""
