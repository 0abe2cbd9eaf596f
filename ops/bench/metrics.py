"""What being seen costs a training step: the stopwatch in the worker, the counting where the job was ordered.

Both are timed alone, thousands of times, and set against a measured step of the demo's model: as a difference of whole steps they
would drown in noise.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import MODEL, Row, compare, finish, interleave, options

from danlu.metrics import emit
from danlu.spec.train import TrainJob
from danlu.train.phases import Phases
from danlu.train.run import LocalRun, StepRecord, record_to_dict
from danlu.train.worker import work

STEPS = 2000


def in_the_worker() -> float:
    """Seconds a step: begin, six parts, the comparison of ranks every tenth step."""
    run = LocalRun(torch.device("cpu"))
    phases = Phases(run)
    began = time.perf_counter()
    for step in range(1, STEPS + 1):
        phases.begin(step)
        for name in ("data", "wait", "forward", "backward", "optimizer", "wait"):
            phases.end(name)
        phases.compare(step)
    return (time.perf_counter() - began) / STEPS


def where_it_was_ordered() -> float:
    """Seconds a record: counted, gathered, handed to Ray once a hundred steps."""
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    step = StepRecord(1, 100, 0.1, 1.0, 1e-3, 1.0, 500, 500, 1e3, 0.5, 9.0, 32, dict.fromkeys(("data", "wait", "forward", "backward"), 0.1))
    record = record_to_dict(step)
    with emit.training("bench") as hear:
        began = time.perf_counter()
        for number in range(1, STEPS + 1):
            hear(record | {"step": number})
            if number % 100 == 0:
                emit.flush()
        return (time.perf_counter() - began) / STEPS


def a_step(quick: bool) -> float:
    """Median seconds of a step of the demo's encoder: 32 rows of 64 tokens at most."""
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as name:
        rows = "".join(
            f'{{"text": "{word} {"and so on " * 8}", "label": "{word}"}}\n' for word in ("wheat", "ship", "trade") for _ in range(60)
        )
        (Path(name) / "rows.jsonl").write_text(rows)
        fields: dict[str, Any] = {
            "name": "bench",
            "model": {"model_name_or_path": MODEL, "max_length": 64},
            "data": {"train": f"{name}/rows.jsonl", "cache_dir": f"{name}/cache"},
            "max_steps": 3 if quick else 12,
            "storage": name,
        }
        run = LocalRun(torch.device("cpu"))
        work(TrainJob.model_validate(fields), run, f"{name}/run")
        return statistics.median([record.step_seconds for record in run.records if isinstance(record, StepRecord)][1:])


def main() -> None:
    given = options(__doc__, rounds=3)
    found = interleave({"worker": in_the_worker, "ordered": where_it_was_ordered, "step": lambda: a_step(given.quick)}, given.rounds)
    share = [
        100 * (worker + ordered) / step for worker, ordered, step in zip(found["worker"], found["ordered"], found["step"], strict=True)
    ]
    rows: list[Row] = [
        compare("in the worker, a step", "us", [1e6 * seconds for seconds in found["worker"]]),
        compare("where it was ordered, a record", "us", [1e6 * seconds for seconds in found["ordered"]]),
        compare("a step of MiniLM, 32 rows", "ms", [1e3 * seconds for seconds in found["step"]]),
        compare("both as a share of it", "%", share),
    ]
    finish(
        "metrics", given, rows, ["the two halves run in different processes when there are several workers: the share is an upper bound"]
    )


if __name__ == "__main__":
    main()
