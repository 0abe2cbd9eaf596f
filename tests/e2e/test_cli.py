"""The program as a person runs it: the whole walk, Ctrl-C on the way and at the end of it, and going on afterwards."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from danlu import walk


class Links(HTMLParser):
    """Everything a page would fetch from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            inside = value is None or value.startswith(("#", "data:"))
            if (name in ("src", "href", "srcset", "data", "action") and not inside) or (name == "style" and "url(" in (value or "")):
                self.found.append(f"<{tag} {name}={value}>")

    def handle_data(self, data: str) -> None:
        self.text += data
        if "@import" in data or "url(http" in data:
            self.found.append(data)


def test_a_walk_is_stopped_by_ctrl_c_goes_on_to_its_end_and_serves_until_ctrl_c(
    danlu: Callable[..., Any], write_spec: Callable[..., Path], tmp_path: Path
) -> None:
    write_spec(tmp_path / "job.yaml", max_steps=300, checkpoint={"save_steps": 25}, evaluation={"eval_steps": 150})
    with danlu("run", "job.yaml") as run:
        run.wait_for("checkpoint: step 25")
        run.press_ctrl_c()
        assert run.exit_code() == 130, run.output
        assert run.left_behind() == []
    assert run.output.rstrip().endswith("stopped")
    assert "Traceback" not in run.output
    folder = tmp_path / "runs" / "runs" / "topics" / "0001"
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"

    with danlu("run", "job.yaml", "--keep") as run:
        run.wait_for("still serving; Ctrl-C stops it")
        started = " ".join(run.look())
        assert "raylet" in started
        assert "gcs_server" in started
        os.kill(run.process.pid, signal.SIGINT)
        assert run.exit_code() == 130, run.output
        assert run.left_behind() == []
    told = run.output
    for heading in (
        "Plan",
        "Data",
        "Training on 2 workers",
        "Scores on the test split",
        "Compressing",
        "Serving topics@v2",
        "Where to look",
    ):
        assert f"\n{heading}\n" in told, told
    for text in (
        "DeepSpeed ZeRO-2",
        "read as csv; text = 'text', label = 'label'",
        "step 300/300  loss ",
        "dev accuracy ",
        "checkpoint: step 300",
        "stored as topics@v1",
        "truth / answer",
        "same answer",
        "kept: accuracy ",
        "checked: 60 test rows and 8 probes over HTTP: every answer is the evaluation's",
        "endpoint      http://127.0.0.1:",
        "metrics       http://",
        "the whole walk took ",
    ):
        assert text in told, told
    assert told.endswith("\nstopped\n")
    assert "Traceback" not in told
    assert "raylet" not in told

    resumed = run.wait_for("resumed: from the checkpoint of step ")
    assert int(resumed.split()[-1]) % 25 == 0
    assert sorted(path.name for path in folder.parent.iterdir()) == ["0001"]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["bundle"]) == ("finished", "topics@v1")
    steps = [record["step"] for record in map(json.loads, (folder / "records.jsonl").read_text().splitlines()) if record["kind"] == "step"]
    assert set(steps) == set(range(1, 301))
    report = Path(next(line for line in run.lines if line.startswith("  report  ")).split()[1])
    assert report.parent == folder
    page = Links(report.read_text())
    assert page.found == []
    for text in ("topics", "accuracy", "int8", "60 test rows and 8 probes over HTTP"):
        assert text in page.text


@pytest.mark.soak
def test_a_walk_that_keeps_nothing_ends_by_itself_and_its_bundle_is_served_until_ctrl_c(
    danlu: Callable[..., Any], write_spec: Callable[..., Path], tmp_path: Path
) -> None:
    write_spec(tmp_path / "job.yaml")
    with danlu("run", "job.yaml", "--no-keep") as run:
        assert run.exit_code() == 0, run.output
        assert run.left_behind() == []
    with danlu("serve", "job.yaml") as run:
        run.wait_for("Ctrl-C stops it")
        run.press_ctrl_c()
        assert run.exit_code() == 130, run.output
        assert run.left_behind() == []
    assert "Starting topics" in run.output
    assert run.output.endswith("\nstopped\n")
    assert "Traceback" not in run.output


def test_training_a_finished_spec_again_is_a_new_run_with_the_same_numbers(
    write_spec: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(
        tmp_path / "job.yaml", workers={"num_workers": 1}, parallel={"kind": "ddp"}, max_steps=10, storage=str(tmp_path / "runs")
    )
    first, second = (walk.train(spec, [], fresh=False) for _ in range(2))
    assert (first.run.number, second.run.number) == (1, 2)
    assert second.run.status()["state"] == "finished"
    curves = [{r["step"]: r["loss"] for r in trained.run.records() if r["kind"] == "step"} for trained in (first, second)]
    assert len(curves[0]) == 10
    assert curves[0] == curves[1]
    assert first.evaluations["test"].scores == second.evaluations["test"].scores
    assert "resumed" not in capsys.readouterr().out
