"""Seconds from `danlu train` to the first optimizer step, and where they go, against a bare ZeRO-2 script with two processes.

Reuters R8 with the example's spec: two workers on a Ray that the command starts. The rows are read and tokenised anew every time
(an empty cache), which the bare script does not do: it is the floor, not a competitor.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import MODEL, ROOT, SPEC, Row, compare, cores, finish, interleave, options, stop

from danlu.artifact.pretrained import model_folder
from danlu.spec.model import Model

BENCH = Path(__file__).parent
TIMEOUT_S = 300.0
Stages = dict[str, float]
"""Seconds of each part of a start, in order; `all` is their sum."""

STAGES = {
    "interpreter and command line": "prepare begins",
    "imports of the command": "splits begins",
    "rows read, checked, tokenised": "splits ends",
    "plan (a matmul is timed)": "prepare ends",
    "import of Ray": "start_ray begins",
    "Ray starts": "start_ray ends",
    "workers start": "_worker begins",
    "imports of a worker": "work begins",
    "rows again, from the cache": "train begins",
    "model and strategy": "DeepSpeedStrategy.prepare ends",
    "first step": "DeepSpeedStrategy.step ends",
}
"""Each part ends with its stamp (see stamps.py)."""

ON_RAY = ("import of Ray", "Ray starts", "workers start")
"""Parts that one worker does without: it trains in the command's own process."""
IN_A_WORKER = ("workers start", "imports of a worker", "rows again, from the cache", "model and strategy", "first step")


def danlu_train(folder: Path, workers: int) -> Stages:
    """Run the command until each worker has made a step; then stop it."""
    run = Path(tempfile.mkdtemp(dir=folder))
    stamps = run / "stamps.jsonl"
    stamps.touch()
    (run / "hook").mkdir()
    (run / "hook/sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(BENCH)!r})\nimport stamps\nstamps.install({str(stamps)!r})\n"
    )
    sets = {"storage": run, "data.cache_dir": run / "cache", "max_steps": 2, "workers.num_workers": workers}
    command = [sys.executable, "-m", "danlu.cli", "train", str(SPEC), *(part for k, v in sets.items() for part in ("--set", f"{k}={v}"))]
    log = run / "log"
    began = time.time()
    with log.open("w") as out:
        environment = os.environ | {"PYTHONPATH": str(run / "hook")}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        found = _await_steps(process, stamps, log, workers)
    finally:
        stop(process)
    return _stages(began, found, process.pid, [part for part in STAGES if workers > 1 or part not in ON_RAY])


def _await_steps(process: subprocess.Popen[bytes], stamps: Path, log: Path, workers: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        lines = stamps.read_text().splitlines(keepends=True)
        found: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("\n")]
        if len({stamp["pid"] for stamp in found if stamp["event"] == "DeepSpeedStrategy.step ends"}) == workers:
            return found
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"danlu train made no step; it said:\n{log.read_text()[-3000:]}")


def _stages(began: float, stamps: list[dict[str, Any]], command: int, parts: Sequence[str]) -> Stages:
    """The command's stamps and those of the worker whose step came last; only the first stamp of a name counts."""
    times: dict[tuple[int, str], float] = {}
    for stamp in stamps:
        times.setdefault((stamp["pid"], stamp["event"]), stamp["time"])
    worker = max((pid for pid, event in times if event == STAGES["first step"]), key=lambda pid: times[pid, STAGES["first step"]])
    stages: Stages = {}
    then = began
    for part in parts:
        now = times[worker if part in IN_A_WORKER else command, STAGES[part]]
        stages[part], then = now - then, now
    return stages | {"all": then - began}


def bare(folder: Path, workers: int) -> Stages:
    """floor.py on as many processes, until the step of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    model = str(model_folder(Model(model_name_or_path=MODEL)))
    began = time.time()
    ranks = []
    for rank in range(workers):
        environment = {"RANK": rank, "WORLD_SIZE": workers, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(BENCH / "floor.py"), model, "1", "40"]
        with (folder / f"floor-{rank}.log").open("w") as log:
            settings = os.environ | {name: str(value) for name, value in environment.items()}
            ranks.append(subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=log, text=True))
    try:
        out, _ = ranks[0].communicate(timeout=TIMEOUT_S)
    finally:
        for process in ranks:
            stop(process)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"the bare script made no step:\n{(folder / 'floor-0.log').read_text()[-3000:]}")
    stamps = json.loads(lines[-1])
    return {
        "imports of the command": stamps["imported"] - began,
        "model and strategy": stamps["prepared"] - stamps["imported"],
        "first step": stamps["stepped"] - stamps["prepared"],
        "all": stamps["stepped"] - began,
    }


def main() -> None:
    given = options(__doc__, rounds=3)
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        two = 2 if cores() > 1 else 1
        contestants = {"danlu train": lambda: danlu_train(folder, two), "bare script": lambda: bare(folder, two)}
        if two > 1 and not given.quick:
            contestants |= {"danlu train, one worker": lambda: danlu_train(folder, 1), "bare script, one process": lambda: bare(folder, 1)}
        found = interleave(contestants, given.rounds)
    finish("startup", given, _rows(found), ["the bare script's imports have its interpreter's start in them"])


def _rows(found: dict[str, list[Stages]]) -> list[Row]:
    rows = []
    for ours, theirs in (("danlu train", "bare script"), ("danlu train, one worker", "bare script, one process")):
        if ours not in found:
            continue
        for stage in ["all", *(name for name in found[ours][0] if name != "all")]:
            mine = [stages[stage] for stages in found[ours]]
            metric = f"{ours}: {'to the first step' if stage == 'all' else stage}"
            # With workers the command's imports are not what the bare script's stand for: each worker has its own.
            same = stage in found[theirs][0] and (stage != "imports of the command" or "one worker" in ours)
            other = [stages[stage] for stages in found[theirs]] if same else None
            rows.append(compare(metric, "s", mine, other, other and theirs, less_is_better=True))
    return rows


if __name__ == "__main__":
    main()
