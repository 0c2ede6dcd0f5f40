"""How an answer is written: plain text as Kubernetes' own components write it, JSON for clients that accept it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from zdd_web.health.decision import Finding, Probe, Status, examine
from zdd_web.health.view import Health


class Reply(NamedTuple):
    """An answer that an adaptor translates for its framework; `body` is empty for HEAD and OPTIONS."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def status_line(self) -> str:
        """The status as WSGI wants it."""
        return f"{self.status} {self.reason}"


class Question(NamedTuple):
    """What came with a probe, besides its path."""

    method: str = "GET"
    only: str = ""
    verbose: bool = False
    exclude: tuple[str, ...] = ()
    json: bool = False
    #: Whether this client may see names and messages.
    details: bool = False

    @classmethod
    def read(cls, method: str, query: str, accept: str, *, only: str = "", details: bool = False) -> Question:
        """Read the query string and the Accept header, whatever they hold.

        >>> Question.read("GET", "verbose&exclude=db&exclude=cache", "application/json").exclude
        ('db', 'cache')
        """
        asked = parse_qs(query[:4096], keep_blank_values=True) if query else {}
        exclude = tuple(asked.get("exclude", ()))
        return cls(method, only, "verbose" in asked, exclude, _accepts_json(accept), details)


NOT_FOUND = 404

#: OPTIONS too: it is what HAProxy's `option httpchk` sends unless it is given another method.
METHODS = ("GET", "HEAD", "OPTIONS")
ALLOW = ("Allow", ", ".join(METHODS))

#: A balancer that asks again after this many seconds finds another pod, or this one restarted.
RETRY_AFTER = 5

_JSON = re.compile(r"application/(json|[\w.-]+\+json)\s*(;|\Z)", re.IGNORECASE)
_TEXT = re.compile(r"(text/plain|text/\*|\*/\*)\s*(;|\Z)", re.IGNORECASE)
_ZERO = re.compile(r";\s*q=0(\.0*)?\s*(;|\Z)", re.IGNORECASE)


def _accepts_json(accept: str) -> bool:
    # In the order in which a client names them; no client that asks for probes weighs them by q.
    for each in accept[:1024].split(","):
        if _ZERO.search(each):
            continue
        if _JSON.match(each.strip()):
            return True
        if _TEXT.match(each.strip()):
            return False
    return False


def answer(probe: Probe, question: Question, health: Health) -> Reply:
    """Answer a probe.

    >>> from zdd_web.lifecycle import Phase
    >>> answer(Probe.READINESS, Question(), Health(Phase.SERVING)).body
    b'ok\\n'
    """
    if question.method not in METHODS:
        return _not_allowed(question.method)
    found = examine(probe, health, question.only, question.exclude)
    failed = any(each.status is Status.FAIL for each in found)
    text, kind = (_json, "application/json") if question.json else (_text, "text/plain; charset=utf-8")
    body = text(probe, question, health, found)
    if not failed:
        return _reply(200, "OK", body, question.method, content_type=kind)
    retry = ("Retry-After", str(RETRY_AFTER))
    return _reply(503, "Service Unavailable", body, question.method, retry, content_type=kind)


def _word(health: Health, found: Collection[Finding]) -> str:
    """What may be said to anybody."""
    failed = [each for each in found if each.status is Status.FAIL]
    if not failed:
        return "ok"
    # An app may call a check so too.
    return health.speaking.label if any(each.name == "phase" and not each.is_check for each in failed) else "failed"


def _text(probe: Probe, question: Question, health: Health, found: list[Finding]) -> str:
    word = _word(health, found)
    if not question.details or not (question.verbose or word != "ok"):
        return f"{word}\n"
    lines = [f"{each.status.value}{each.name} {each.text}{_since(each)}" for each in found]
    if question.verbose and not question.only and health.release:
        lines.append(f"{Status.OK.value}release {health.release}")
    unknown = _unknown(question, health, probe)
    lines += [f"warn: {name!r} was to be excluded and is not a check here" for name in unknown]
    if word == "ok":
        return "\n".join([*lines, f"{probe.value} passed\n"])
    failed = ", ".join(each.name for each in found if each.status is Status.FAIL)
    return "\n".join([*lines, f"{probe.value} failed: {failed}\n"])


def _since(finding: Finding) -> str:
    return f", for {finding.failing_for:.0f} s" if finding.failing_for else ""


def _json(probe: Probe, question: Question, health: Health, found: list[Finding]) -> str:
    statuses = {each.status for each in found}
    status = next(each for each in (Status.FAIL, Status.WARN, Status.OK) if each in statuses or each is Status.OK)
    said: dict[str, Any] = {"status": status.name.lower(), "probe": probe.value, "phase": health.speaking.label}
    if question.details:
        said["findings"] = [
            {
                "name": each.name,
                "status": each.status.name.lower(),
                "text": each.text,
                "check": each.is_check,
                **({"failing_for": round(each.failing_for, 1)} if each.failing_for else {}),
            }
            for each in found
        ]
        if health.release and not question.only:
            said["release"] = health.release
        unknown = _unknown(question, health, probe)
        if unknown:
            said["warnings"] = [f"{name!r} was to be excluded and is not a check here" for name in unknown]
    elif status is Status.WARN:
        # That something optional fails is a detail.
        said["status"] = "ok"
    return json.dumps(said) + "\n"


def _unknown(question: Question, health: Health, probe: Probe) -> list[str]:
    known = {check.name for worker in health.workers for check in worker.checks}
    return [name for name in dict.fromkeys(question.exclude) if name not in known]


def _reply(
    status: int, reason: str, text: str, method: str, *headers: tuple[str, str], content_type: str = ""
) -> Reply:
    # HEAD has the length that GET would have; a reply to OPTIONS has a body of its own, which is empty.
    body = b"" if method == "OPTIONS" else text.encode("utf-8", "backslashreplace")
    all_headers = (
        ("Content-Type", content_type or "text/plain; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        *(() if method in ("GET", "HEAD") or status == NOT_FOUND else (ALLOW,)),
        *headers,
    )
    return Reply(status, reason, all_headers, b"" if method == "HEAD" else body)


def _not_allowed(method: str) -> Reply:
    return _reply(405, "Method Not Allowed", "method not allowed\n", method)


def plain(status: int, reason: str, text: str, method: str, content_type: str = "") -> Reply:
    """Return an answer with a text that is made already, in the same form; methods not in `METHODS` get 405."""
    if method not in METHODS:
        return _not_allowed(method)
    return _reply(status, reason, text, method, content_type=content_type)


def not_found(method: str) -> Reply:
    """Return what a port that has nothing but probes says to every other path."""
    return _reply(NOT_FOUND, "Not Found", "not found\n", method)
