"""The report of a run as one self-contained HTML page: no script, no font and no picture from anywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from danlu.data.page import STYLE
from danlu.evaluate.analysis import Analysis
from danlu.evaluate.analysis_html import analysis_parts
from danlu.evaluate.explain import Word
from danlu.tasks.classification import Scores
from danlu.tasks.rows import Scored


@dataclass(frozen=True)
class ReportData:
    """What a page is made of; parts that there are none of are left out of it."""

    title: str
    records: Sequence[Mapping[str, Any]]
    plan: str = ""
    data: str = ""
    scores: Mapping[str, Scored] = field(default_factory=dict)
    delta: Mapping[str, Any] | None = None
    delta_verdict: str = ""
    served: str = ""
    endpoint: Mapping[str, str] = field(default_factory=dict)
    """Where to look while it was served."""
    exchanges: Sequence[tuple[str, str, str]] = ()
    """Of a language model: what the endpoint was asked, what it answered, what the row says."""
    example: str = ""
    """Of a language model: the first row as it reads it, what it learns between ⟦ and ⟧."""
    errors: Sequence[tuple[str, str, str, float]] = ()
    """Wrong answers of the test split: text, truth, answer, its probability; the surest first."""
    explanations: Sequence[Sequence[Word]] = ()
    """Of a classifier: what each word did to each of these answers."""
    lineage: Mapping[str, str] = field(default_factory=dict)
    spec: str = ""
    analyses: Mapping[str, Analysis] = field(default_factory=dict)
    """Split -> intervals, slices, calibration."""


def render(data: ReportData) -> str:
    """The page."""
    parts = [f"<h1>{escape(data.title)}</h1>", _subtitle(data), _tiles(data), curves(data.records)]
    if ranks := _adapter_ranks(data.records):
        parts.append(f"<h2>Ranks that AdaLoRA gave</h2>{_table(('step', 'in all', 'smallest', 'largest', 'each module'), ranks)}")
    for split, found in data.scores.items():
        if not isinstance(found, Scores):
            rows = [(name, f"{value:.4f}") for name, value in found.metrics().items()]
            parts.append(f"<h2>Scores on the {escape(split)} split</h2>{_table(('metric', 'value'), rows)}")
            if per_class := getattr(found, "per_class", None):
                parts.append(_class_table(_class_rows(per_class)))
            continue
        parts.append(
            f"<h2>Scores on the {escape(split)} split</h2>{_per_class(found)}<h2>Confusion matrix, {escape(split)}</h2>{confusion(found)}"
        )
    for found_ in data.analyses.values():
        parts += analysis_parts(replace(found_, mistakes=()))  # the wrong answers have a part of their own
    if data.delta is not None:
        parts.append(f"<h2>Compressed beside the original</h2>{_delta(data.delta)}<p>{escape(data.delta_verdict)}</p>")
    if data.served:
        parts.append(f"<h2>Served beside evaluated</h2><p>{escape(data.served)}</p>")
    if data.exchanges:
        parts.append(f"<h2>Asked and answered</h2>{_table(('asked', 'answer, greedy', 'in the row'), data.exchanges)}")
    if data.endpoint:
        parts.append(f"<h2>Where to look</h2>{_table(('what', 'where'), list(data.endpoint.items()))}")
    if data.example:
        parts.append(
            f"<h2>The first row as the model reads it</h2><p>It learns what stands between ⟦ and ⟧.</p><pre>{escape(data.example)}</pre>"
        )
    if data.errors:
        parts.append(f"<h2>Surest wrong answers</h2>{_errors(data.errors, data.explanations)}")
    for heading, text in (("Plan", data.plan), ("Data", data.data)):
        if text:
            parts.append(f"<h2>{heading}</h2><pre>{escape(text)}</pre>")
    if data.lineage:
        rows = [(name, value) for name, value in data.lineage.items()]
        parts.append("<h2>Lineage</h2>" + _table(("what", "value"), rows))
    if data.spec:
        parts.append(f"<h2>Spec</h2><pre>{escape(data.spec)}</pre>")
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(data.title)} · Danlu</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _adapter_ranks(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The first decision on ranks, the middle one and the last."""
    decided = [record for record in records if record["kind"] == "event" and record["event"] == "ranks"]
    rows: list[tuple[str, ...]] = []
    for index in sorted({0, len(decided) // 2, len(decided) - 1} if decided else ()):
        total, _, modules = decided[index]["detail"].partition(" in all: ")
        found = [int(module.rpartition(" ")[2]) for module in modules.split(", ")]
        rows.append((str(decided[index]["step"]), total, str(min(found)), str(max(found)), modules))
    return rows


def _subtitle(data: ReportData) -> str:
    created = data.lineage.get("created", "")
    return f'<p class="sub">Danlu run report{" · " + escape(created) if created else ""}</p>'


def _tiles(data: ReportData) -> str:
    tiles = []
    for split, found in data.scores.items():
        tiles += [(f"{value:.4f}", f"{name.replace('_', ' ')}, {split}") for name, value in list(found.metrics().items())[:3]]
    steps = [record for record in data.records if record["kind"] == "step"]
    if steps:
        tiles.append((f"{steps[-1]['step']:,}", "optimizer steps"))
        tiles.append((f"{steps[-1]['tokens_total']:,}", "training tokens"))
    if data.delta is not None:
        tiles.append((f"{data.delta['speedup']:.2f}x", f"{data.delta['name']} speed"))
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{a}</b><span>{escape(b)}</span></div>' for a, b in tiles) + "</div>"


def curves(records: Sequence[Mapping[str, Any]]) -> str:
    """How training went, step by step; empty before the first."""
    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]
    if not steps:
        return ""
    dev_loss = [(record["step"], record["metrics"]["loss"]) for record in evals if "loss" in record["metrics"]]
    charts = [
        _chart("Loss (line: training, dots: dev)", [(r["step"], r["loss"]) for r in steps], dev_loss),
        _chart("Learning rate", [(r["step"], r["learning_rate"]) for r in steps]),
        _chart("Gradient norm before clipping", [(r["step"], r["grad_norm"]) for r in steps]),
        _chart("Tokens a second", [(r["step"], r["tokens_per_second"]) for r in steps]),
    ]
    names = dict.fromkeys(name for record in evals for name in record["metrics"] if name not in ("loss", "perplexity"))
    for name in list(names)[:2]:
        points = [(record["step"], record["metrics"][name]) for record in evals if name in record["metrics"]]
        if points:
            charts.append(_chart(f"Dev {name.replace('_', ' ')}", points, points))
    return '<h2>Curves</h2><div class="charts">' + "".join(charts) + "</div>"


def _chart(title: str, line: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float]] = ()) -> str:
    """One line, and dots on the same axes, as SVG."""
    line = [(x, y) for x, y in line if math.isfinite(y)]  # a step skipped in float16 has no gradient norm
    points = [*line, *dots]
    if not points:
        return ""
    (x0, x1), (y0, y1) = _span([x for x, _ in points]), _span([y for _, y in points])
    width, height, left, bottom, top, right = 420, 190, 54, 22, 8, 10

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top),
        )

    grid = ""
    for share in (0.0, 0.5, 1.0):
        value = y0 + share * (y1 - y0)
        _, y = at(x0, value)
        grid += f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        grid += f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    for value, anchor in ((x0, "start"), (x1, "end")):
        grid += f'<text x="{at(value, y0)[0]:.1f}" y="{height - 6}" text-anchor="{anchor}">{value:,.0f}</text>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--b)"/>' for x, y in (at(*point) for point in dots))
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{grid}'
        f'<polyline points="{path}" fill="none" stroke="var(--a)" stroke-width="1.6" stroke-linejoin="round"/>{marks}</svg></figure>'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _per_class(found: Scores) -> str:
    rows = [*_class_rows(found.per_class), ("all (macro F1, accuracy)", "", "", f"{found.macro_f1:.4f}", f"{found.accuracy:.4f}")]
    return _class_table(rows)


def _class_rows(per_class: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    return [
        (name, f"{row['precision']:.4f}", f"{row['recall']:.4f}", f"{row['f1']:.4f}", f"{int(row['support'])}")
        for name, row in per_class.items()
    ]


def _class_table(rows: Sequence[Sequence[str]]) -> str:
    return _table(("label", "precision", "recall", "f1", "rows"), rows)


def confusion(found: Scores) -> str:
    """Truths down, answers across; a cell is as dark as its share of the truth."""
    names = list(found.per_class)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = ""
    for name, counts in zip(names, found.confusion, strict=True):
        total = sum(counts) or 1
        cells = "".join(f'<td style="background:rgba(var(--cell),{0.75 * count / total:.3f})">{count}</td>' for count in counts)
        body += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return f'<div class="scroll"><table><tr><th>truth \\ answer</th>{head}</tr>{body}</table></div>'


def _delta(delta: Mapping[str, Any]) -> str:
    rows = [
        (metric, f"{before:.4f}", f"{delta['compressed'][metric]:.4f}", f"{delta['compressed'][metric] - before:+.4f}")
        for metric, before in delta["original"].items()
    ]
    spread = f"{delta['speedup_min']:.2f}-{delta['speedup_max']:.2f} over {delta['runs']} interleaved runs"
    before, after = delta["rate_original"], delta["rate"]
    rows += [
        (delta["unit"], f"{before:.0f}", f"{after:.0f}", f"{delta['speedup']:.2f}x ({spread})"),
        (
            "MB of weights",
            f"{delta['bytes_original'] / 1e6:.1f}",
            f"{delta['bytes'] / 1e6:.1f}",
            f"{delta['bytes_original'] / delta['bytes']:.2f}x",
        ),
        *([] if delta["agreement"] is None else [("same answer", "", f"{delta['agreement']:.2%}", "")]),
        ("largest probability change", "", f"{delta['largest_probability_change']:.4f}", ""),
    ]
    return _table((f"on the {delta['split']} split", "original", str(delta["name"]), "change"), rows)


def _errors(errors: Sequence[tuple[str, str, str, float]], explanations: Sequence[Sequence[Word]] = ()) -> str:
    words = explanations or [()] * len(errors)
    rows = "".join(
        f'<tr><td class="text">{marked(text, some)}</td><td>{escape(truth)}</td><td>{escape(answer)}</td><td>{p:.3f}</td></tr>'
        for (text, truth, answer, p), some in zip(errors, words, strict=True)
    )
    told = "<p>Marked: words that speak for the answer; underlined: those that speak against it.</p>" if explanations else ""
    return told + f'<div class="scroll"><table><tr><th>text</th><th>truth</th><th>answer</th><th>probability</th></tr>{rows}</table></div>'


def marked(text: str, words: Sequence[Word], length: int = 240) -> str:
    """The beginning of a text as HTML, its words as strongly marked as they changed the answer."""
    most = max((abs(word.effect) for word in words), default=0.0) or 1.0
    parts, at = [], 0
    for word in words:
        strength = abs(word.effect) / most
        if word.in_pair or word.end > length or strength < 0.2:
            continue
        how = f"background:rgba(var(--cell),{0.75 * strength:.2f})" if word.effect > 0 else "background:none;text-decoration:underline"
        inner = f'<mark style="color:inherit;{how}" title="{word.effect:+.2f}">{escape(text[word.start : word.end])}</mark>'
        parts.append(escape(text[at : word.start]) + inner)
        at = word.end
    return "".join(parts) + escape(text[at:length]) + ("…" if len(text) > length else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'
