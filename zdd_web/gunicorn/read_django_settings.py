"""Django's settings module, as gunicorn's master has it read: by a child process, since the master imports no app.

What the child runs is zdd_web/django/read_settings.py. A module that is not imported in time is left out: the start
goes on, after a WARNING.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from zdd_web import log
from zdd_web.errors import SettingsError
from zdd_web.settings import FrameworkSettings, django_source
from zdd_web.system import boot_log, proc
from zdd_web.system.captured_output import CapturedOutput, last_line

#: A settings module of a big project imports in two or three seconds on a busy machine; seconds until a longer import
#: is reported.
SLOW_AFTER = 10.0

SETTINGS_MODULE = "DJANGO_SETTINGS_MODULE"


def read_django(environ: Mapping[str, str], timeout: float) -> FrameworkSettings | None:
    """Return what Django's settings module says, as a child process reads it; None when the environment names none.

    Also None, after a WARNING, when its import takes longer than `timeout` seconds. Raises `SettingsError` when it
    cannot be imported, or when it holds what cannot work.
    """
    module = environ.get(SETTINGS_MODULE, "")
    if not module:
        return None
    try:
        answer = _ask(environ, timeout)
    except subprocess.TimeoutExpired:
        log.emit("settings.unread", logging.WARNING, module=module, seconds=timeout, remedy=_remedy_unread(module))
        return None
    source = django_source(module)
    if "refused" in answer:
        raise SettingsError(f"{source}: {answer['refused']}")
    if "value" in answer:
        return FrameworkSettings.read(source, answer["value"], module)
    raise SettingsError(
        f"{SETTINGS_MODULE}={module} cannot be read for ZDD_WEB: {answer['raised']}: fix it "
        f"({shlex.join(['python', '-c', f'import {module}'])} in {os.getcwd()} shows where), "
        f"or unset the variable for gunicorn's master"
    )


def _remedy_unread(module: str) -> str:
    return (
        f"the start goes on without its ZDD_WEB, if it has one: pass those settings to install(), unset "
        f"{SETTINGS_MODULE} for gunicorn's master, or find out what is slow ({_import_command(module)})"
    )


def _import_command(module: str) -> str:
    return f"{shlex.join(['python', '-X', 'importtime', '-c', f'import {module}'])} in {os.getcwd()}"


def _ask(environ: Mapping[str, str], timeout: float) -> dict[str, Any]:
    # Raises TimeoutExpired.
    there = json.dumps({"path": sys.path, "argv": sys.argv})
    # A file, not a pipe: what the module may have started would hold that open after the child's end.
    answer = boot_log.create()
    try:
        output = CapturedOutput()
    except OSError:
        os.close(answer)
        raise
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "zdd_web.django.read_settings", str(answer), there],
            env=dict(environ), stdin=subprocess.DEVNULL, stdout=output.writer, stderr=output.writer, pass_fds=[answer],
            # A group of its own, to be killed as one; and with the master, which may be killed meanwhile.
            start_new_session=True,
            preexec_fn=functools.partial(proc.die_with_parent, signal.SIGKILL, os.getpid()),
        )  # fmt: skip
        try:
            output.close_writer()
            status = _wait(child, output, timeout, environ[SETTINGS_MODULE])
        except BaseException:
            # Also Ctrl-C, which does not reach a group of its own.
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        said = os.pread(answer, os.fstat(answer).st_size, 0)
        if said:
            found: dict[str, Any] = json.loads(said)
            return found
        output.drain_all()
        said_last = last_line(output.text())
        return {"raised": f"the process that tried it ended with status {status}" + (said_last and f"; {said_last}")}
    finally:
        os.close(answer)
        output.close()


def _wait(child: subprocess.Popen[bytes], output: CapturedOutput, timeout: float, module: str) -> int:
    # By the child's end, not the pipe's. Raises TimeoutExpired as `Popen.wait()` does.
    began, reported = time.monotonic(), False
    while True:
        output.drain()
        try:
            return child.wait(0.02)
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - began
            if seconds > timeout:
                raise
            if seconds > SLOW_AFTER and not reported:
                reported = True
                log.emit("settings.slow", logging.WARNING, module=module, seconds=seconds, timeout=timeout)
