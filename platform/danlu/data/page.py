"""A self-contained HTML page: no script, no font and no picture from anywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--ink:#1c2230;--soft:#667085;--line:#d8dde6;--page:#fbfbfa;--card:#fff;--a:#b3402a;--b:#1f6f8b;--cell:31,111,139}
@media(prefers-color-scheme:dark){:root{--ink:#e7e9ee;--soft:#9aa3b2;--line:#363d4a;--page:#14171d;--card:#1b1f27;--a:#f08a6c;--b:#6cc0dc;--cell:108,192,220}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,"Noto Sans CJK SC",sans-serif}
main{max-width:980px;margin:0 auto;padding:28px 20px 60px}h1{font-size:26px;margin:0}h2{font-size:17px;margin:36px 0 10px}
.sub{color:var(--soft);margin:2px 0 18px}.tiles{display:flex;flex-wrap:wrap;gap:10px}.tile{background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:10px 16px;min-width:130px}.tile b{display:block;font-size:22px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:14px}figure{margin:0;background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:10px 12px}figcaption{font-size:13px;color:var(--soft)}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:11px}.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
th{font-weight:600;color:var(--soft);font-size:13px}td.text{white-space:normal;text-align:left;min-width:280px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;overflow-x:auto;font-size:12.5px;line-height:1.45}
"""

TEXT = ' class="text"'


def page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """The whole document around parts that are HTML already."""
    body = "\n".join(part for part in parts if part)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    sub = f'<p class="sub">{escape(subtitle)}</p>' if subtitle else ""
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>{escape(title)} · Danlu</title><style>{STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{sub}\n{body}</main></body></html>\n"
    )


def heading(text: str) -> str:
    """A part's heading."""
    return f"<h2>{escape(text)}</h2>"


def tiles(pairs: Sequence[tuple[str, str]]) -> str:
    """(value, what it is) as a row of large figures."""
    return (
        '<div class="tiles">' + "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in pairs) + "</div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = ()) -> str:
    """A table; the columns named in `text` hold sentences."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td{TEXT if i in text else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def bars(pairs: Sequence[tuple[str, float]], format: str = "{:,.0f}") -> str:
    """Names, values and bars as long as they are large."""
    top = max((value for _, value in pairs), default=0) or 1
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td>{format.format(value)}</td><td><svg viewBox="0 0 200 10" style="width:200px" role="img" '
        f'aria-label="{escape(name)}"><rect x="0" y="1" width="{200 * value / top:.1f}" height="8" fill="var(--b)"></rect></svg></td></tr>'
        for name, value in pairs
    )
    return f'<div class="scroll"><table>{rows}</table></div>'
