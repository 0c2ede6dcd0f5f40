"""What each setting accepts, and the type it becomes: one function a setting, shared by all sources."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from zdd_web.errors import SettingsError

LISTENERS = ("fd", "reuseport", "systemd")


def check_name(key: str, source: str, spell: Callable[[str], str] = str) -> None:
    """Raise `SettingsError` for a name that is none; `spell` is how names are written in that source."""
    if key not in NORMALISE:
        raise SettingsError(
            f"{source}: no such setting {key!r}; {hint(spell(key), [spell(name) for name in NORMALISE])}"
        )


def hint(key: str, known: Collection[str]) -> str:
    """Say which name was meant, in whatever case it was written, or else all there are."""
    import difflib  # for a start that fails alone

    spelling = {name.lower(): name for name in known}
    close = difflib.get_close_matches(key.lower(), spelling, n=1)
    return f"did you mean {spelling[close[0]]}?" if close else f"known: {', '.join(sorted(known))}"


def spelled(value: object) -> str:
    """Spell a value as one would write it: 30 and not 30.0.

    >>> spelled(30.0), spelled("/up")
    ('30', "'/up'")
    """
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _listener(value: object) -> str:
    if value not in LISTENERS:
        raise ValueError(f"must be one of {', '.join(map(repr, LISTENERS))}")
    return str(value)


def _seconds(*, least: float, most: float = 86_400.0) -> Callable[[object], float]:
    def normalise(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError("must be a number of seconds")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise ValueError("must be a number of seconds") from None
        if not least <= number <= most:  # false for NaN as well
            raise ValueError(f"must be between {least:g} and {most:g} seconds")
        return number

    return normalise


def _path(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"/[^\s?#]*[^\s?#/]", value):
        raise ValueError("must be an absolute path without query and without a slash at its end, such as '/readyz'")
    return value


def _paths(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list of paths, such as ['/', '/search?q=warm']")
    for path in value:
        if not isinstance(path, str) or not re.fullmatch(r"(https?://[A-Za-z0-9.:\[\]-]+)?/[^\s#]*", path):
            raise ValueError(f"{path!r} is not a path: each must begin with '/' or http(s)://HOST/ and hold no space")
    return tuple(value)


class CheckSetting(NamedTuple):
    """One entry of CHECKS: where the check is, and what it is to be given."""

    path: str
    options: Mapping[str, Any]


def _checks(value: object) -> tuple[CheckSetting, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list of dotted paths, such as ['shop.checks.database']")
    found = []
    for each in value:
        path, options = each if isinstance(each, (list, tuple)) and len(each) == 2 else (each, {})
        if not isinstance(path, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", path):
            raise ValueError(f"{each!r} is neither a dotted path nor (dotted path, options)")
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise ValueError(f"{each!r}: options must be a dictionary, such as {{'timeout': 1}}")
        found.append(CheckSetting(path, dict(options)))
    return tuple(found)


DETAILS = ("never", "loopback", "always")


def _details(value: object) -> str:
    if value not in ("", *DETAILS):
        raise ValueError(f"must be one of {', '.join(map(repr, DETAILS))}")
    return str(value)


def _address(value: object) -> str:
    if value == "":
        return ""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9.-]*):(\d{1,5})", value) if isinstance(value, str) else None
    if match is None or int(match[2]) > 65535:
        raise ValueError("must be HOST:PORT, such as '0.0.0.0:8081' or '[::]:8081', or empty for none")
    return str(value)


def _generations(value: object) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or not 2 <= int(str(value)) <= 100:
        raise ValueError("must be a whole number between 2 (the old and the new) and 100")
    return int(str(value))


#: What a socket that systemd passes may be for.
ROLES = ("app", "probe")


def _socket_names(value: object) -> dict[str, str]:
    if isinstance(value, str):
        pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        if any(not equals for _, equals, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
            raise ValueError(
                "must be NAME=app or NAME=probe, each name once, separated by commas: 'web=app,health=probe'"
            )
        value = {name.strip(): role.strip() for name, _, role in pairs}
    if not isinstance(value, Mapping):
        raise ValueError("must map names of sockets to 'app' or 'probe', such as {'web': 'app', 'health': 'probe'}")
    for name, role in value.items():
        # What systemd takes for FileDescriptorName=.
        if not isinstance(name, str) or not re.fullmatch(r"[!-9;-~]([ -9;-~]{0,253}[!-9;-~])?", name):
            raise ValueError(f"{name!r} is not a FileDescriptorName: must be 1 to 255 ASCII characters without ':'")
        if role not in ROLES:
            raise ValueError(f"{name!r} is for {role!r}: must be one of {', '.join(map(repr, ROLES))}")
    if value and "app" not in value.values():
        raise ValueError("no socket is the app's: add NAME=app for the one that is")
    if list(value.values()).count("probe") > 1:
        raise ValueError("more than one socket is the probe port's: leave one")
    return dict(value)


def _exit_status(value: object) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) > 255:
        raise ValueError("must be a whole number from 0 to 255")
    return int(str(value))


def _switch(value: object) -> bool:
    word = str(value).lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ValueError("must be True or False")


def _absolute(value: object) -> str:
    if not isinstance(value, str) or (value and not value.startswith("/")):
        raise ValueError("must be an absolute path, or empty for none")
    return value


def _socket_path(value: object) -> str:
    path = _absolute(value)
    # The kernel's limit for the address of a Unix socket.
    if len(path.encode()) > 107:
        raise ValueError("must be at most 107 bytes long, as the path of any Unix socket")
    return path


def _header(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9-]*", value):
        raise ValueError("must be a header name of letters, digits and '-', or empty for none")
    return value


def _name(value: object) -> str:
    # It becomes part of a memfd's name, which the kernel limits to 249 bytes, and of log lines.
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._:@/\[\]-]{0,100}", value):
        raise ValueError("must be at most 100 letters, digits or any of . _ : @ / [ ] -")
    return value


def _share(value: object) -> float:
    text = value.strip() if isinstance(value, str) else value
    percent = isinstance(text, str) and text.endswith("%")
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise ValueError("must be a share from 0 to 1, or from '0%' to '100%'")
    try:
        number = float(text.removesuffix("%")) / 100 if isinstance(text, str) and percent else float(text)
    except (ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= 1:  # false for NaN as well
        raise ValueError("must be a share from 0 to 1, or from '0%' to '100%'")
    return number


def _canary(value: object) -> str:
    text = value.strip() if isinstance(value, str) else "" if isinstance(value, bool) else str(value)
    if value != "" and not re.fullmatch(r"[1-9][0-9]{0,3}|(100|[1-9][0-9]?)%", text):
        raise ValueError("must be a number of workers from 1, or '1%' to '100%' of them, or empty for all")
    return text


def _release(value: object) -> str:
    # It becomes part of log lines, of a label of the metrics, and of a table.
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{0,100}", value):
        raise ValueError("must be at most 100 printable ASCII characters without a space, or empty for what is found")
    return value


#: Each returns what the value becomes, and raises ValueError with what it must be.
NORMALISE: dict[str, Callable[[object], Any]] = {
    "listener": _listener,
    "systemd_names": _socket_names,
    "upgrade_timeout": _seconds(least=1),
    "commit_window": _seconds(least=0),
    "watch": _seconds(least=0),
    "max_errors": _share,
    "canary": _canary,
    "grace_period": _seconds(least=1),
    "drain_delay": _seconds(least=0),
    "lame_duck_ready": _switch,
    "recycle_timeout": _seconds(least=0),
    "retire_timeout": _seconds(least=1),
    "abandon_status": _exit_status,
    "termination_log": _absolute,
    "warmup": _paths,
    "max_generations": _generations,
    "hand_over_connections": _switch,
    "keep_pid": _switch,
    "parent_stays": _switch,
    "takeover": _switch,
    "takeover_socket": _socket_path,
    "release_dir": _absolute,
    "env_file": _absolute,
    "liveness_path": _path,
    "readiness_path": _path,
    "health_path": _path,
    "startup_path": _path,
    "checks": _checks,
    "details": _details,
    "probe_bind": _address,
    "log_probes": _switch,
    "generation_header": _header,
    "name": _name,
    "release": _release,
}
