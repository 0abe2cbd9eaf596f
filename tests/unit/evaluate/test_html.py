"""The report is one page that needs nothing else, and shows what it is told as text."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from conftest import split_of

from danlu.evaluate.html import ReportData, render
from danlu.evaluate.score import Delta
from danlu.spec.task import Classification
from danlu.tasks.classification import scores

EVIL = '<script>alert("1")</script>&'
VOID = {"meta", "line", "br", "circle", "polyline"}


class Page(HTMLParser):
    """Elements, attributes and text; every element has to be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.style = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def step(number: int) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "loss": 1 / number, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens_per_second": 10.0,
        "tokens_total": number * 1000,
    }  # fmt: skip


@pytest.fixture
def data() -> ReportData:
    logits = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    found = scores(logits, split_of(np.arange(30) % 3), ["grain", EVIL, "交易"], Classification())
    eval_record = {"kind": "eval", "step": 4, "metrics": found.metrics()}
    delta = Delta(
        f"int8{EVIL}", found.metrics(), found.metrics(), 0.99, 0.01, 100.0, 250.0, 2.5, 2.4, 2.6, 5, 4_000_000, 1_000_000, 30, "test"
    ).to_dict()
    return ReportData(
        title=f"topics {EVIL}",
        records=[
            step(1),
            step(2) | {"grad_norm": math.inf},
            step(3),
            step(4),
            eval_record,
            {"kind": "event", "step": 4, "event": "checkpoint"},
        ],
        plan=f"plan {EVIL}",
        data=f"data {EVIL}",
        scores={"test": found},
        delta=delta,
        delta_verdict=f"kept {EVIL}",
        served=f"served {EVIL}",
        errors=[(f"text {EVIL} " + "x" * 300, "grain", EVIL, 0.99)],
        lineage={"created": f"2026 {EVIL}", "run": "s3://bucket/runs/1"},
        spec=f"name: {EVIL}",
    )


def test_the_ranks_that_adalora_gave_stand_in_the_report() -> None:
    events = [
        {"kind": "event", "step": at, "event": "ranks", "detail": f"{2 * at} in all: layers.0.q_proj {at}, layers.1.q_proj {at}"}
        for at in (9, 7, 5, 3)
    ]
    page = render(ReportData("adalora", [step(1), *events]))
    table = page.split("Ranks that AdaLoRA gave")[1].split("</table>")[0]
    assert [row.split("</td>")[0] for row in table.split("<tr><td>")[1:]] == ["9", "5", "3"]
    assert "<td>6</td><td>3</td><td>3</td><td>layers.0.q_proj 3, layers.1.q_proj 3</td>" in table
    assert "Ranks that" not in render(ReportData("lora", [step(1)]))


def test_it_is_whole_and_needs_nothing_from_elsewhere(data: ReportData) -> None:
    html = render(data)
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?:|//[a-z]", html.replace("s3://bucket/runs/1", ""))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not {name for name in attributes if name in ("src", "href", "srcset", "action", "xlink:href") or name.startswith("on")}, tag
    assert not re.search(r"url\(|@import", page.style)
    assert {"charset": "utf-8"} in [attributes for tag, attributes in page.tags if tag == "meta"]


def test_what_it_is_told_is_shown_as_text(data: ReportData) -> None:
    html = render(data)
    page = Page(html)
    assert "<script" not in html
    text = "".join(page.texts)
    for said in ("topics", "plan", "data", "kept", "served", "text", "2026", "name:"):
        assert f"{said} {EVIL}" in text
    assert page.cells.count(EVIL) == 4  # per class, confusion's row and column, the wrong answer


def test_its_numbers_are_the_scores(data: ReportData) -> None:
    page = Page(render(data))
    found = data.scores["test"]
    for name, row in found.per_class.items():
        at = page.cells.index(name)
        assert page.cells[at + 1 : at + 5] == [f"{row['precision']:.4f}", f"{row['recall']:.4f}", f"{row['f1']:.4f}", str(row["support"])]
    at = page.cells.index("truth \\ answer")
    assert page.cells[at + 4 : at + 8] == ["grain", *map(str, found.confusion[0])]
    assert f"{found.accuracy:.4f}" in page.texts
    assert "2.50x" in page.texts
    charts = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert charts == [
        "Loss (line: training, dots: dev)",
        "Learning rate",
        "Gradient norm before clipping",
        "Tokens a second",
        "Dev accuracy",
        "Dev macro f1",
    ]


def test_curves_stay_inside_their_charts(data: ReportData) -> None:
    page = Page(render(data))
    lines = [attributes["points"] or "" for tag, attributes in page.tags if tag == "polyline"]
    assert len(lines) == 6
    for line in lines:
        for point in line.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 420
            assert 0 <= y <= 190
    assert len(lines[0].split()) == 4


def test_what_there_is_none_of_is_left_out() -> None:
    page = Page(render(ReportData("empty", [])))
    assert [tag for tag, _ in page.tags if tag in ("svg", "table", "h2")] == []
    one = Page(render(ReportData("one step", [step(1)])))
    assert [tag for tag, _ in one.tags if tag == "svg"] == ["svg"] * 4
