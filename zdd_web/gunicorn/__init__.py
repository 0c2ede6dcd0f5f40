"""zdd_web in gunicorn: the last line of `gunicorn.conf.py`.

from zdd_web.gunicorn import install

install(globals(), grace_period=30)
"""

from __future__ import annotations

import gc
from typing import Any

from zdd_web.errors import ZddError

__all__ = ["install"]


def install(namespace: dict[str, Any], **settings: Any) -> None:
    """Add zdd_web's hooks to a gunicorn configuration.

    `namespace` is the configuration's `globals()`; hooks that it defines keep working, ours and theirs both run.
    `settings` are the names of `zdd_web.settings.Settings`; an environment variable `ZDD_WEB_<NAME>` wins over them.
    Call it once, at the end of the file: a hook that is defined after it would replace ours.

    Ends gunicorn's start with the reason on stderr and status 1 when a setting, this gunicorn or its configuration
    cannot work.

    >>> namespace = {"workers": 2}
    >>> install(namespace, name="doctest")
    >>> callable(namespace["post_fork"])
    True
    """
    # What is made by imports stays: to look for garbage meanwhile finds none, and takes 5 ms of 70.
    collects = gc.isenabled()
    gc.disable()
    try:
        from zdd_web.gunicorn import hooks
    finally:
        if collects:
            gc.enable()

    try:
        hooks.install(namespace, settings)
    except ZddError as error:
        hooks.fail(error)
