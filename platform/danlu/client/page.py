"""The report of a load as one HTML file, without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from danlu.client.load import PERCENTILES, Report, Seen

WIDTH, HEIGHT = 640, 220


def page(report: Report, seen: Sequence[Seen]) -> str:
    """Figures, percentiles, and how the times are spread."""
    names = [f"p{p}" for p in PERCENTILES] + ["mean", "max"]
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{title}</th>{''.join(f'<td>{found[name]:.1f}</td>' for name in names)}</tr>" for title, found in report.tables().items()
    )
    load = "".join(f"<tr><th>{name}</th><td>{escape(str(value))}</td></tr>" for name, value in report.load.items() if value is not None)
    refused = "".join(f"<p class=bad>{number} not answered: {escape(why)}</p>" for why, number in report.refused.items())
    curves = [("time to first token", [one.first for one in seen]), ("end to end", [one.whole for one in seen])]
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Load on {escape(report.load["model"])}</title><style>
:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;max-width:760px;margin:40px auto;padding:0 20px}}
table{{border-collapse:collapse}}th{{text-align:left;font-weight:500}}td,th{{padding:3px 14px 3px 0}}
td{{text-align:right}}.bad{{color:#c22}}
figure{{margin:24px 0}}polyline{{fill:none;stroke:#27c;stroke-width:2}}line{{stroke:#8886}}text{{font-size:12px;fill:currentColor}}
</style></head><body><h1>Load on {escape(report.load["model"])}</h1>
<p>{report.num_answered} answered in {report.seconds:.1f} s: {report.requests_per_second:.1f} requests/s,
{report.tokens_per_second:,.0f} tokens/s ({report.prompt_tokens:,} tokens read, {report.completion_tokens:,} made)</p>{refused}
<table><tr><th>ms</th>{head}</tr>{rows}</table>{"".join(_curve(title, values) for title, values in curves)}
<h2>What was asked</h2><table>{load}</table></body></html>"""


def _curve(title: str, seconds: Sequence[float]) -> str:
    """Share of the requests that were answered within a time."""
    found = sorted(value * 1000 for value in seconds)
    largest = found[-1] or 1.0
    points = " ".join(f"{WIDTH * value / largest:.1f},{HEIGHT - HEIGHT * (i + 1) / len(found):.1f}" for i, value in enumerate(found))
    return (
        f'<figure><figcaption>{title}: share of the requests within a time</figcaption><svg viewBox="-2 -4 {WIDTH + 8} {HEIGHT + 24}">'
        f'<line x1="0" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}"/><line x1="0" y1="{HEIGHT / 2}" x2="{WIDTH}" y2="{HEIGHT / 2}"/>'
        f'<polyline points="0,{HEIGHT} {points}"/><text x="0" y="{HEIGHT + 16}">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 16}" text-anchor="end">{largest:.0f} ms</text>'
        f'<text x="4" y="{HEIGHT / 2 - 4}">half</text></svg></figure>'
    )
