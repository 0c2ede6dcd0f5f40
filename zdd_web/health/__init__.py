"""What a probe is answered: pure decisions from a service at an instant, translated by the adaptors."""

from zdd_web.health.decision import Finding, Probe, Status, examine, judge, table
from zdd_web.health.reply import Question, Reply, answer, not_found, plain
from zdd_web.health.view import CheckSeen, Health, Kind, Result, WorkerHealth

__all__ = [
    "CheckSeen",
    "Finding",
    "Health",
    "Kind",
    "Probe",
    "Question",
    "Reply",
    "Result",
    "Status",
    "WorkerHealth",
    "answer",
    "examine",
    "judge",
    "not_found",
    "plain",
    "table",
]
