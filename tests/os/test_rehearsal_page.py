"""The HTML page of a rehearsal: complete in itself, well formed, and with every loss and phase in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from zdd_web.cli.rehearse import charts, html_report, junit_report, report
from zdd_web.cli.rehearse.generator_health import GeneratorHealth
from zdd_web.cli.rehearse.report import Report
from zdd_web.cli.rehearse.samples import Handover, Outcome, PhaseSpan, Sample, ScenarioResult, StopResult
from zdd_web.cli.rehearse.tally import Tally

VOID = {"meta", "br", "link"}
EVIL = '/<script>alert(1)</script>?a=1&b="2"\x00\''


class Page(HTMLParser):
    """Holds that each element is closed, and keeps what a test looks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def classes(self, name: str) -> int:
        return sum(name in (attrs.get("class") or "").split() for _, attrs in self.tags)


def rehearsed(lost: int = 2, upgrades: int = 2) -> Report:
    """Make a report of a load that begins at 100 s and an upgrade every 5 s."""
    tally = Tally()
    spans = [PhaseSpan(1, "booting", 99.0, 100.0), PhaseSpan(1, "serving", 100.0, 105.0)]
    for number in range(1, upgrades + 1):
        at = 100.0 + 5 * number
        tally.expect(at - 0.5)
        tally.handover(Handover(number, number, number + 1, at - 0.5, at, at + 0.2, ok=True))
        spans += [PhaseSpan(number, "retiring", at, at + 0.3), PhaseSpan(number + 1, "booting", at - 0.4, at)]
        spans.append(PhaseSpan(number + 1, "serving", at, at + 5))
    for n in range(100 * (upgrades + 1)):
        at = 100 + n / 20
        tally.append(Sample(0, "new", "/", at, at, at + 0.004, Outcome.OK, 200, 1 + int((at - 100) / 5)))
    end = 100.0 + 5 * (upgrades + 1)
    for _ in range(lost):
        tally.append(Sample(0, "new", EVIL, end, end, end, Outcome.RESET, None, None, "ECONNRESET"))
    scenario = ScenarioResult("reload", end - 1, end - 0.5, True, "2 of 2 workers replaced", "", 10, 0)
    stop = StopResult(end, end + 1, 0, 3, ok=True)
    generator = GeneratorHealth(0.5, 80.0, 100.0, 60.0, 3, 32)
    return report.of(tally, stop=stop, scenarios=[scenario], phases=tuple(spans), generator=generator)


def test_page_is_well_formed_and_fetches_nothing() -> None:
    text = html_report.page(rehearsed())
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object", "image", "use")]
    assert not re.search(r"https?:|url\(|@import|\b(src|href|on\w+)=", text)
    assert {"charset": "utf-8"} in [attrs for tag, attrs in page.tags if tag == "meta"]
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text


def test_page_says_the_verdict_first_and_what_is_wrong() -> None:
    found = rehearsed()
    page = Page(html_report.page(found))
    assert "2 of 302 requests LOST in 2 upgrades, a reload and a stop" in page.text
    assert "the load generator was the bottleneck: it used a whole CPU for 50 % of the time" in page.text
    assert "waited for a CPU, up to 80 ms at the 99th percentile" in page.text
    assert "--rate 100 was not reached: 60.0 requests a second were sent, as all 32 clients were waiting" in page.text
    assert page.classes("verdict") == page.classes("bad") > 0


def test_every_svg_is_well_formed_and_each_loss_generation_and_phase_is_in_one() -> None:
    text = html_report.page(rehearsed(lost=2))
    svgs = [ET.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.S)]
    assert len(svgs) == 3 + 3  # losses, rates, latency, and a row for each generation
    titles = [title.text or "" for svg in svgs for title in svg.iter("title")]
    assert "2 lost" in titles
    assert {"generation 1: 100 requests", "generation 2: 100 requests", "generation 3: 100 requests"} <= set(titles)
    assert {"generation 2: booting, 0.40 s", "generation 1: retiring, 0.30 s"} <= set(titles)


def test_what_a_service_sends_is_text_on_the_page_and_in_the_xml() -> None:
    found = rehearsed(lost=1)
    assert "<script" not in html_report.page(found)
    assert "alert(1)" in html_report.page(found)
    document = ET.fromstring(junit_report.document(found).partition("\n")[2])
    assert "alert(1)" in "".join(document.itertext())
    assert "\x00" not in "".join(document.itertext())


def test_junit_has_a_case_for_each_promise() -> None:
    suite = ET.fromstring(junit_report.document(rehearsed(lost=1)).partition("\n")[2])[0]
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert list(cases) == ["no request is lost", "no reply differs", "upgrade 1", "upgrade 2", "reload", "stop"]
    failed = {name: each.get("message") for name, each in cases.items() if each is not None}
    assert failed == {
        "no request is lost": "1 of 301 requests LOST in 2 upgrades, a reload and a stop: 1 reset",
    }
    assert (suite.get("tests"), suite.get("failures")) == ("6", "1")


@pytest.mark.parametrize("upgrades", [0, 1, 200])
def test_page_stays_small_and_whole_for_any_number_of_upgrades(upgrades: int) -> None:
    text = html_report.page(rehearsed(lost=0, upgrades=upgrades))
    page = Page(text)
    assert len(text) < 600_000
    assert page.classes("phase") == min(upgrades + 1, 4 if upgrades > charts.ROWS else charts.ROWS)


def test_page_of_nothing() -> None:
    page = Page(html_report.page(report.of(Tally(), stop=None, interrupted="by SIGTERM after 0 of 5 upgrades")))
    assert "NOT PROVEN: no request was sent" in page.text
    assert "INTERRUPTED: by SIGTERM after 0 of 5 upgrades" in page.text


def test_losses_that_were_not_kept_are_marked_by_their_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    from zdd_web.cli.rehearse import tally

    monkeypatch.setattr(tally, "MOST_LOSSES", 1)
    counted = Tally()
    for n in range(10):
        counted.append(Sample(0, "new", "/", n, n, float(n), Outcome.REFUSED))
    found = report.of(counted, stop=None)
    svg = ET.fromstring(charts.losses(found, charts.Frame.of(found)))
    assert len(list(svg.iter("title"))) == 10


def test_excused_losses_are_named_and_do_not_spoil_the_verdict() -> None:
    tally = Tally()
    for n in range(20):
        tally.append(Sample(0, "new", "/", n, n, float(n), Outcome.OK, 200, 1))
    tally.append(Sample(0, "keepalive", "/", 20, 20, 20.0, Outcome.KEEPALIVE_RACE))
    scenario = ScenarioResult("kill-worker", 19, 20, True, "worker 7 held 3 connections", "", 2, 1, excused=1)
    found = report.of(tally, stop=None, scenarios=[scenario])
    assert (found.ok, found.lost, found.excused) == (True, 1, 1)
    page = Page(html_report.page(found))
    assert "1 of 21 requests lost, all with the process that was killed, in a kill-worker" in page.text
    assert "1 of the lost requests were in the hands of the process that kill-worker killed" in page.text
    worse = report.of(tally, stop=None, scenarios=[ScenarioResult("kill-worker", 19, 20, True, "", "", 2, 1)])
    assert not worse.ok
