"""What the forked child does to become the new master: make the inherited descriptors inheritable, and exec.

Between fork and exec it is a copy of the live master: whatever fails there ends in `os._exit`, because an exception
that reached gunicorn's loop would stop the live service from inside the copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

from zdd_web.gunicorn.handoff.channel import Channel
from zdd_web.gunicorn.handoff.inheritance import ENV, Inheritance
from zdd_web.gunicorn.handoff.launch import Launch
from zdd_web.system import descriptors, stdio
from zdd_web.system.boot_log import BootLog


def become_successor(
    launch: Launch,
    inheritance: Inheritance,
    boot_log: BootLog,
    theirs: Channel,
    pre_exec: Callable[[Launch], Launch],
) -> NoReturn:
    """Become the new master, in the forked child; `theirs` is its end of the channel, on which a failure is sent."""
    try:
        stderr = stdio.duplicate_stderr()
        os.dup2(boot_log.output.writer, 2)
        inherited = inheritance._replace(channel=theirs.fileno(), stderr=stderr, passed_on=launch.descriptors)
        launch = pre_exec(launch)
        # After the hook, which may open what it likes.
        descriptors.inherit_only(inherited.descriptors, launch.descriptors)
        environ = dict(launch.environ)
        environ[ENV] = inherited.to_environ()
        if environ.get("WATCHDOG_PID") == str(inheritance.predecessor):
            # systemd's watchdog is the main process's, which this one is to be.
            environ["WATCHDOG_PID"] = str(os.getpid())
        # For a release without install(): gunicorn reads the second as numbers before it binds
        # (test_successor_reads_numbers_from_gunicorn_fd), and ends there. It would unlink a live Unix socket otherwise,
        # and serve ungated. With install(), the second also keeps --daemon from detaching again
        # (test_daemon_does_not_detach_where_gunicorn_fd_is_set). Both are taken out before gunicorn looks.
        environ["GUNICORN_PID"] = str(inheritance.predecessor)
        environ["GUNICORN_FD"] = "inherited-by-zdd_web"
        os.chdir(launch.directory)
        os.execvpe(launch.command[0], launch.command, environ)
    except BaseException as error:
        try:
            theirs.send("failed", reason=f"the new generation could not be started: {type(error).__name__}: {error}")
        finally:
            os._exit(127)
