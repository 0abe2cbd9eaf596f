"""An analysis and a comparison as parts of a self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from danlu.data.page import heading, page, table, tiles
from danlu.evaluate.analysis import Analysis, Mistake
from danlu.evaluate.bootstrap import Interval
from danlu.evaluate.calibration import Bin, Calibration
from danlu.evaluate.cost import Decided
from danlu.evaluate.versus import Versus


def analysis_page(title: str, analysis: Analysis, facts: Mapping[str, str]) -> str:
    """One page about one evaluation."""
    figures = [(f"{found.value:.4f}", name.replace("_", " ")) for name, found in analysis.metrics.items()]
    parts = [tiles([*figures, (f"{analysis.rows:,}", f"{analysis.split} rows")]), *analysis_parts(analysis)]
    return page(title, "Danlu evaluation", [*parts, heading("What was scored"), table(("what", "value"), list(facts.items()), text=(1,))])


def analysis_parts(analysis: Analysis) -> list[str]:
    """Intervals, calibration, slices and mistakes, each under its heading."""
    split = analysis.split
    parts = [heading(f"How sure the {split} scores are"), _intervals(analysis.metrics)]
    if analysis.calibration is not None:
        found, fix = analysis.calibration, analysis.temperature
        parts.append(heading(f"Calibration on the {split} rows"))
        before = found if fix is None else fix.before
        plots = [reliability("As trained", before.bins)]
        rows = [("as trained", *_errors(before))]
        if fix is not None:
            rows.append((f"logits / {fix.value:.3f}, fitted on {fix.fitted_on}", *_errors(fix.after)))
            plots.append(reliability(f"Logits divided by {fix.value:.3f}", fix.after.bins))
        parts += [table(("probabilities", "ECE", "MCE", "Brier", "loss"), rows), '<div class="charts">' + "".join(plots) + "</div>"]
    if analysis.decision is not None:
        parts += [heading(f"What the answers to the {split} rows cost"), *_decision(analysis.decision)]
    for by in dict.fromkeys(found.by for found in analysis.slices):
        some = [found for found in analysis.slices if found.by == by]
        names = list(some[0].metrics)
        rows_ = [(one.value, f"{one.rows:,}", *(_shown(one.metrics[name]) for name in names)) for one in some]
        parts += [heading(f"{split} scores by {by}"), table((by, "rows", *names), rows_)]
    if analysis.mistakes:
        parts += [heading(f"Surest wrong answers of the {split} rows"), _mistakes(analysis.mistakes)]
    return parts


def versus_page(found: Versus) -> str:
    """One page about two models."""
    rows = [
        (name, f"{one.a:.4f}", f"{one.b:.4f}", f"{one.change:+.4f}", f"[{one.low:+.4f}, {one.high:+.4f}]", f"{one.p_value:.4f}")
        for name, one in found.differences.items()
    ]
    parts = [table(("what", "value"), [("A", found.a), ("B", found.b), ("rows", f"{found.rows:,} of the {found.split} split")])]
    parts += [heading("Metrics"), table(("metric", "A", "B", "B - A", "95 % interval (paired bootstrap)", "p"), rows)]
    if found.mcnemar is not None:
        test = found.mcnemar
        head = ("", "B right", "B wrong")
        cells = [("A right", str(test.both_right), str(test.only_a_right)), ("A wrong", str(test.only_b_right), str(test.both_wrong))]
        parts += [heading("Right and wrong"), table(head, cells), f"<p>McNemar's exact two-sided p: {test.p_value:.4f}</p>"]
    for by, values in found.swings.items():
        rows_ = [(value, str(one), str(two)) for value, (one, two) in values.items()]
        parts += [heading(f"By {by}"), table((by, "only A right", "only B right"), rows_)]
    if found.disagreements:
        answers = [
            (str(row.row), row.text, row.truth, f"{row.a} ({row.a_probability:.2f})", f"{row.b} ({row.b_probability:.2f})")
            for row in found.disagreements
        ]
        parts += [heading("Where they disagree"), table(("row", "text", "truth", "A", "B"), answers, text=(1,))]
    return page(f"{found.a} beside {found.b}", "Danlu comparison", parts)


def _shown(found: Interval) -> str:
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def _intervals(metrics: Mapping[str, Interval]) -> str:
    rows = [(name, f"{one.value:.4f}", f"{one.low:.4f}", f"{one.high:.4f}") for name, one in metrics.items()]
    return table(("metric", "value", "95 % from", "to"), rows)


def _errors(found: Calibration) -> tuple[str, str, str, str]:
    return f"{found.ece:.4f}", f"{found.mce:.4f}", f"{found.brier:.4f}", f"{found.loss:.4f}"


def _decision(found: Decided) -> list[str]:
    rows = [(name, _shown(one), f"{accuracy:.4f}") for name, one, accuracy in found.rows()]
    told = [table(("answers", "cost a row [95 % interval]", "accuracy"), rows)]
    for title, counts in (("the likeliest label", found.confusion_of_likeliest), ("what costs least", found.confusion)):
        cells = [(name, *(str(count) for count in line)) for name, line in zip(found.labels, counts, strict=True)]
        told.append(table((f"truth / {title}", *found.labels), cells))
    return told


def _mistakes(rows: Sequence[Mistake]) -> str:
    cells = [
        (
            str(one.row),
            one.text if one.text_pair is None else f"{one.text} | {one.text_pair}",
            one.truth,
            one.answer,
            f"{one.probability:.3f}",
        )
        for one in rows
    ]
    return table(("row", "text", "truth", "answer", "probability"), cells, text=(1,))


def reliability(title: str, bins: Sequence[Bin]) -> str:
    """Accuracy over confidence; the diagonal is what probabilities should be, a bar's strength how many rows it stands for."""
    size, left, bottom = 220, 34, 20
    top = max((one.rows for one in bins), default=0) or 1

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * (size - left - 8), size - bottom - y * (size - bottom - 8)

    marks = ""
    for one in bins:
        if one.rows:
            (x0, y1), (x1, y0) = at(one.low, one.accuracy), at(one.high, 0)
            marks += (
                f'<rect x="{x0:.1f}" y="{y1:.1f}" width="{x1 - x0:.1f}" height="{max(y0 - y1, 0):.1f}" fill="var(--b)" '
                f'fill-opacity="{0.25 + 0.75 * one.rows / top:.2f}"></rect>'
            )
    (x0, y0), (x1, y1) = at(0, 0), at(1, 1)
    marks += f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="var(--a)" stroke-dasharray="4 3"/>'
    for value in (0.0, 0.5, 1.0):
        (x, _), (_, y) = at(value, 0), at(0, value)
        marks += f'<text x="{x:.1f}" y="{size - 5}" text-anchor="middle">{value:g}</text>'
        marks += f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    label = escape(f"Reliability: {title}")
    return (
        f"<figure><figcaption>{label}: accuracy over confidence</figcaption>"
        f'<svg viewBox="0 0 {size} {size}" role="img" aria-label="{label}" style="max-width:300px">{marks}</svg></figure>'
    )
