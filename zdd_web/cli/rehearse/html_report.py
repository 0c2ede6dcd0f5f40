"""A rehearsal's report as one page: charts as inline SVG, light and dark, nothing that is fetched from anywhere."""

from __future__ import annotations

from html import escape

from zdd_web.cli.rehearse import charts, text_report
from zdd_web.cli.rehearse.page_style import STYLE
from zdd_web.cli.rehearse.report import Report

#: Rows of a table; the JSON report has more.
MOST_ROWS = 100
#: Events that are numbered in the charts.
MOST_NUMBERS = 40


def page(report: Report) -> str:
    """Return the report as the text of an HTML file."""
    frame = charts.Frame.of(report)
    title = text_report.verdict(report)
    parts = [
        f'<header class="verdict{"" if report.ok else " bad"}"><h1>{escape(title)}</h1>',
        f"<p>{escape(_summary(report, frame))}</p></header>",
        _problems(report),
        _rates(report, frame),
        _latency(report, frame),
        _phases(report, frame),
        _events(report, frame),
        _losses(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _summary(report: Report, frame: charts.Frame) -> str:
    seconds = frame.end - frame.begin
    # A span that is only as long as a clock's turn has no rate.
    text = f"{report.requests:,} requests in {seconds:.1f} s, {report.requests / max(seconds, 0.1):,.0f} a second"
    steady, around = report.latency["steady"], report.latency["around"]
    if steady.p50 is not None and steady.p99 is not None:
        text += f"; half were answered within {steady.p50:.1f} ms and 99 % within {steady.p99:.1f} ms"
    if around.p99 is not None:
        text += f" ({around.p99:.1f} ms around an upgrade)"
    return text + "."


def _problems(report: Report) -> str:
    items = "".join(f"<li>{escape(each)}</li>" for each in text_report.problems(report))
    return f'<ul class="problems">{items}</ul>' if items else ""


def _row(label: str, svg: str, size: str) -> str:
    return f'<div class="row"><div class="label middle">{label}</div><div class="plot {size}">{svg}</div></div>'


def _key(name: str, style: str) -> str:
    return f'<span class="key"><i style="{style}"></i>{escape(name)}</span>'


def _share(place: float) -> str:
    return f"{100 * place / charts.WIDTH:.2f}%"


def _rates(report: Report, frame: charts.Frame) -> str:
    svg, top = charts.rates(report, frame)
    labels = "".join(f'<span style="top:{share}%">{top * (1 - share / 100):,g}</span>' for share in (0, 50, 100))
    known = [generation for generation in report.generations if generation is not None]
    keys = [_key(f"generation {g}", f"background:var(--{charts.colour(g)})") for g in known[: charts.ROWS]]
    if any(None in each.answered for each in report.timeline.slices):
        keys.append(_key("no generation named", "background:var(--gx)"))
    keys.append(_key(f"lost: {report.lost:,}", "background:var(--bad)"))
    return (
        f"<h2>Replies a second, by the generation that sent them</h2><div>{''.join(keys)}</div>"
        f"{_numbers(report, frame)}"
        f"{_row('lost', charts.losses(report, frame), 'strip')}"
        f'<div class="row"><div class="label">{labels}</div><div class="plot tall">{svg}</div></div>{_axis(frame)}'
    )


def _latency(report: Report, frame: charts.Frame) -> str:
    svg, marks = charts.latency(report, frame)
    labels = "".join(f'<span style="top:{share * 100:.2f}%">{text}</span>' for share, text in marks)
    keys = [("median", "--g0"), ("99th percentile", "--g2"), ("slowest", "--gx")]
    legend = "".join(_key(name, f"background:var({variable})") for name, variable in keys)
    return (
        f"<h2>Latency, logarithmic</h2><div>{legend}</div>"
        f'<div class="row"><div class="label">{labels}</div><div class="plot low">{svg}</div></div>{_axis(frame)}'
    )


def _phases(report: Report, frame: charts.Frame) -> str:
    rows = "".join(_row(escape(label), svg, "phase") for label, svg in charts.phases(report, frame))
    if not rows:
        return ""
    shades = [("booting", 0.35), ("serving", 1.0), ("retiring, lame duck or draining", 0.6)]
    legend = "".join(_key(name, f"background:var(--g0);opacity:{opacity}") for name, opacity in shades)
    return f"<h2>Phases of each generation</h2><div>{legend}</div>{rows}{_axis(frame)}"


def _axis(frame: charts.Frame) -> str:
    ticks = "".join(f'<span style="left:{_share(x)}">{text}</span>' for x, text in frame.ticks())
    return f'<div class="row"><div></div><div class="plot axis">{ticks}</div></div>'


def _numbers(report: Report, frame: charts.Frame) -> str:
    found = charts.events(report)
    if not 0 < len(found) <= MOST_NUMBERS:
        return ""
    spans = "".join(
        f'<span class="{"" if each.ok else "bad"}" style="left:{_share(frame.x(each.begun_at))}">{number}</span>'
        for number, each in enumerate(found, 1)
    )
    return f'<div class="row"><div class="label middle">event</div><div class="plot numbers">{spans}</div></div>'


def _events(report: Report, frame: charts.Frame) -> str:
    found = charts.events(report)
    rows = "".join(
        f'<tr><td class="n">{number}</td><td class="n">{each.begun_at - frame.begin:.2f} s</td>'
        f'<td class="n">{each.ended_at - each.begun_at:.2f} s</td><td>{escape(each.what)}</td>'
        f'<td class="{"" if each.ok else "bad"}">{escape(each.outcome)}</td></tr>'
        for number, each in enumerate(found[:MOST_ROWS], 1)
    )
    head = '<tr><th class="n">event</th><th class="n">at</th><th class="n">took</th><th>what</th><th></th></tr>'
    return _table("What was done", head, rows, len(found))


def _losses(report: Report) -> str:
    rows = "".join(
        f'<tr><td class="n">{each.at:.3f} s</td><td>{escape(each.sample.outcome.value)}</td>'
        f"<td>{escape(each.sample.method)} {escape(each.sample.path)}</td><td>{escape(each.where)}</td>"
        f"<td>{escape(each.sample.detail)}</td></tr>"
        for each in report.losses[:MOST_ROWS]
    )
    head = '<tr><th class="n">at</th><th>outcome</th><th>request</th><th>where</th><th>detail</th></tr>'
    return _table("Lost requests", head, rows, report.lost)


def _table(title: str, head: str, rows: str, count: int) -> str:
    if not rows:
        return ""
    more = f"<p>and {count - MOST_ROWS:,} more: see the JSON report</p>" if count > MOST_ROWS else ""
    return f'<h2>{title}</h2><div class="wide"><table>{head}{rows}</table></div>{more}'
