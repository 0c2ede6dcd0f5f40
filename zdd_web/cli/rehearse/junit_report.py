"""A rehearsal's report as JUnit XML, for CI: a test case for each promise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree as ET

from zdd_web.cli.rehearse import text_report
from zdd_web.cli.rehearse.report import Report

#: What XML 1.0 cannot hold, whatever it is escaped to.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def document(report: Report) -> str:
    """Return the report as the text of an XML file."""
    cases = list(_cases(report))
    failures = sum(bool(failure) for _, _, failure in cases)
    span = len(report.timeline.slices) * report.timeline.width
    suites = ET.Element("testsuites")
    suite = ET.SubElement(
        suites,
        "testsuite",
        {"name": "zdd-web rehearse", "tests": str(len(cases)), "failures": str(failures), "errors": "0",
         "skipped": "0", "time": f"{span:.3f}"},
    )  # fmt: skip
    for name, seconds, failure in cases:
        case = ET.SubElement(
            suite, "testcase", {"classname": "zdd_web.rehearse", "name": name, "time": f"{seconds:.3f}"}
        )
        if failure:
            element = ET.SubElement(case, "failure", {"message": _clean(failure.splitlines()[0])})
            element.text = _clean(failure)
    ET.SubElement(suite, "system-out").text = _clean(text_report.text(report))
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _cases(report: Report) -> Iterator[tuple[str, float, str]]:
    """Yield the name of each case, its seconds, and why it failed ("" for not at all)."""
    unproven = "" if report.requests else "no request was sent"
    counts = ", ".join(f"{n:,} {outcome.value}" for outcome, n in report.outcomes.items() if n and outcome.lost)
    lost = f"{text_report.verdict(report)}: {counts}" if report.lost > report.excused else ""
    yield "no request is lost", 0.0, lost or unproven
    yield "no reply differs", 0.0, f"{report.different:,} replies differ" if report.different else ""
    for around in report.handovers:
        handover, why = around.handover, ""
        if not handover.ok:
            why = handover.reason or "no reason known"
        elif around.early_answers:
            why = f"{around.early_answers:,} answers of generation {handover.to_generation} before it was ready"
        elif around.lost:
            why = f"{around.lost:,} of {around.requests:,} requests around it were lost"
        yield f"upgrade {handover.number}", handover.done_at - handover.requested_at, why
    for each in report.scenarios:
        why = each.reason
        if not why and each.lost > each.excused:
            why = f"{each.lost - each.excused:,} of {each.requests:,} requests were lost"
        yield each.name, each.ended_at - each.begun_at, why
    if (stop := report.stop) is not None:
        yield "stop", stop.ended_at - stop.requested_at, "" if stop.ok else stop.reason or "no reason known"
    if report.interrupted:
        yield "the rehearsal runs to its end", 0.0, f"interrupted {report.interrupted}"


def _clean(text: str) -> str:
    return _UNWRITABLE.sub("?", text)
