"""Secrets, masked in whatever is logged or shown of command lines, variables and addresses."""

from __future__ import annotations

import re
from collections.abc import Iterable

from zdd_web.system import escaping

MASK = "***"

#: A whole part of a name, as in SECRET_KEY, db-pass and MYSQL_PWD: PWD alone is the working directory.
_PARTS = frozenset({"PASS", "KEY", "KEYS", "DSN", "AUTH", "CREDENTIAL", "CREDENTIALS"})
#: Wherever they stand in a name, as in PGPASSWORD and authtoken.
_ANYWHERE = ("PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "TOKEN", "APIKEY")

#: gunicorn's `-e` and `--env`, whose words are variables; short options may stand together (`-De NAME=value`).
_ENV = re.compile(r"-[DR]*e\Z|--(?:raw[-_])?env\Z")
_ENV_WITH_VALUE = re.compile(r"(-[DR]*e(?!$)|--(?:raw[-_])?env=)(.*)", re.DOTALL)

_ASSIGNMENT = re.compile(r"(-{0,2}[A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_OPTION = re.compile(r"--?[A-Za-z][\w-]*\Z")

#: What is between `://` and the host. The second form is a password in which `/`, `?` or `#` was not escaped; a port
#: is not taken for one.
_USERINFO = re.compile(r"://(?:[^\s/?#'\"]*@|[^\s/?#:@'\"]*:(?!\d+[/?#])[^\s'\"]*@)")


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Return a text as it may be shown: what `urls()` masks is masked, what `escaping.printable()` escapes is escaped.

    >>> print(printable("postgres://shop:hunter2@db\x07"))
    postgres://***@db\x07
    """
    return escaping.printable(urls(text), keep)


def urls(text: str) -> str:
    """Mask the user and password of every URL in a text.

    >>> urls("cannot reach postgres://shop:hunter2@db/shop")
    'cannot reach postgres://***@db/shop'
    """
    return _USERINFO.sub(f"://{MASK}@", text) if "://" in text else text


def is_secret(name: str) -> bool:
    """Tell whether a variable or an option of that name holds a secret.

    >>> is_secret("SECRET_KEY"), is_secret("--db-password"), is_secret("--keyfile"), is_secret("PWD")
    (True, True, False, False)
    """
    parts = [part for part in re.split(r"[^A-Z0-9]+", name.upper()) if part]
    if any(word in "".join(parts) for word in _ANYWHERE) or not _PARTS.isdisjoint(parts):
        return True
    return len(parts) > 1 and parts[-1] == "PWD"


def variable(name: str, value: str) -> str:
    """Return a variable's value as it may be shown.

    >>> variable("SENTRY_DSN", "https://1234@sentry/5"), variable("LANG", "C")
    ('***', 'C')
    """
    return MASK if value and is_secret(name) else urls(value)


def command(words: Iterable[str]) -> list[str]:
    """Return the words of a command line as they may be shown: what `-e` and `--env` set is masked, and every secret.

    >>> " ".join(command(["gunicorn", "-e", "DEBUG=1", "--env=TOKEN=abc", "API_KEY=def", "-b", ":8000"]))
    'gunicorn -e DEBUG=*** --env=TOKEN=*** API_KEY=*** -b :8000'
    """
    shown: list[str] = []
    masks_next = ""
    for word in words:
        with_value = _ENV_WITH_VALUE.fullmatch(word)
        if masks_next == "variable":
            shown.append(_masked_variable(word))
        elif masks_next == "value" and not word.startswith("-"):
            shown.append(MASK)
        elif with_value:
            shown.append(with_value[1] + _masked_variable(with_value[2]))
        else:
            shown.append(_masked_word(word))
        if masks_next == "variable":
            masks_next = ""
        elif _ENV.match(word):
            masks_next = "variable"
        else:
            masks_next = "value" if _OPTION.match(word) and is_secret(word) else ""
    return shown


def _masked_variable(word: str) -> str:
    # All of them: what is not known to be harmless does not belong into a log.
    name, equals, _ = word.partition("=")
    return f"{name}={MASK}" if equals else MASK


def _masked_word(word: str) -> str:
    assignment = _ASSIGNMENT.fullmatch(word)
    if assignment:
        return f"{assignment[1]}={variable(assignment[1], assignment[2])}"
    return urls(word)
