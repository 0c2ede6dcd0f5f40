"""Say what `ZDD_WEB` in Django's settings module is: the child process in which gunicorn's master has it read.

    python -m zdd_web.django.read_settings FD JSON

`JSON` is the master's `{"path": sys.path, "argv": sys.argv}`: the module shall find what it will find in a worker. The
answer is written to descriptor `FD`, as JSON: `{"value": ...}`, `{"refused": what is wrong with it}` or `{"raised":
"ImportError: ..."}`.

A settings module does whatever its authors like, and imports Django; the master has to outlive that, and every worker
inherits what the master has imported. So nothing of it is ever imported there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any


def answer() -> dict[str, Any]:
    """Return what there is to say of the settings module that `DJANGO_SETTINGS_MODULE` names."""
    try:
        # Here, when the path is the master's.
        from django.conf import settings

        value = getattr(settings, "ZDD_WEB", {})
    except BaseException as error:
        return {"raised": " ".join(f"{type(error).__name__}: {error}".split())}
    if not isinstance(value, Mapping):
        return {"refused": f"{value!r} is not a dictionary: write ZDD_WEB = {{'GRACE_PERIOD': 30}}"}
    for key, each in value.items():
        try:
            json.dumps({key: each})
        except (TypeError, ValueError, RecursionError):
            remedy = "must be text, a number, True, False, None, or a list or dictionary of these"
            return {"refused": f"{key} = {each!r}: {remedy}"}
    return {"value": dict(value)}


def main(fd: int, process: str) -> None:
    """Write the answer."""
    there = json.loads(process)
    sys.path[:], sys.argv[:] = there["path"], there["argv"]
    said = json.dumps(answer()).encode()
    while said:
        said = said[os.write(fd, said) :]
    # Not through Python's end, which waits for the threads that the module may have started.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
