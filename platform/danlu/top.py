"""Jobs and services of this machine as one live table: `danlu top`. Jobs are read from their run folders, services from Ray's metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.table import Table

from danlu.artifact.runs import RECORDS, RunFolder, latest_run
from danlu.artifact.uris import filesystem_of
from danlu.metrics import catalog as c
from danlu.metrics.rules import RAY_TARGETS

TAIL_BYTES = 1 << 16
SILENT_S = 120.0
"""A running job that recorded nothing for so long, and for ten of its steps, is called silent."""

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]
"""Sample name -> labels -> value."""


@dataclass(frozen=True)
class Job:
    """The latest run of a name."""

    name: str
    run: int
    state: str
    step: int
    num_steps: int
    loss: float | None
    dev: dict[str, float]
    tokens_per_second: float
    eta_s: float
    silent_s: float


@dataclass(frozen=True)
class Served:
    """A model between two looks."""

    model: str
    requests_per_second: float
    failed: float
    """Share of 5xx."""
    p95_s: float | None
    in_flight: float
    tokens_per_second: float


def jobs(storage: str, now: float) -> list[Job]:
    """The latest run of every job under a storage URI, those that run first."""
    filesystem, path = filesystem_of(f"{storage.rstrip('/')}/runs")
    names = [PurePosixPath(folder).name for folder in filesystem.ls(path, detail=False)] if filesystem.exists(path) else []
    found = [_job(name, run, now) for name in names if (run := latest_run(storage, name)) is not None]
    return sorted(found, key=lambda job: (job.state not in ("running", "silent"), job.silent_s))


def scrape(targets: str = RAY_TARGETS) -> Samples:
    """What the nodes listed in Ray's discovery file show of us; nothing where there is no Ray."""
    try:
        groups = json.loads(Path(targets).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no Ray yet, or it is just writing
        return {}
    found: Samples = {}
    for target in {target for group in groups for target in group["targets"]}:
        try:
            text = httpx.get(f"http://{target}/metrics", timeout=5).text
        except httpx.HTTPError:
            continue  # a node that has gone
        read_into(found, text)
    return found


def read_into(found: Samples, text: str) -> None:
    """Add our samples of a metrics page, summed over processes."""
    ours = "\n".join(line for line in text.splitlines() if "danlu_" in line)
    own = {metric.exported: (*metric.labels, "le") for metric in c.ALL}
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            base = sample.name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
            names = own.get(sample.name) or own.get(base)
            if names is None:
                continue
            labels = tuple((name, sample.labels[name]) for name in names if name in sample.labels)
            series = found.setdefault(sample.name, {})
            series[labels] = series.get(labels, 0.0) + sample.value


def services(before: Samples, after: Samples, seconds: float) -> list[Served]:
    """What was served between two looks."""
    models = sorted({value for labels in after.get(c.SERVE_REQUESTS.exported, {}) for name, value in labels if name == "model"})
    return [_served(model, before, after, seconds) for model in models]


def screen(some_jobs: Sequence[Job], served: Iterable[Served]) -> RenderableType:
    """Both tables."""
    from danlu.plan import duration

    training = Table("job", "run", "state", "step", "loss", "dev", "tokens/s", "left", title="Training", title_justify="left", expand=True)
    for job in some_jobs:
        going = job.state == "running"
        training.add_row(
            job.name,
            str(job.run),
            f"silent for {duration(job.silent_s)}" if job.state == "silent" else job.state,
            f"{job.step}/{job.num_steps}" if job.num_steps else "-",
            "-" if job.loss is None else f"{job.loss:.4f}",
            "  ".join(f"{name} {value:.4f}" for name, value in job.dev.items() if name != "loss")[:40] or "-",
            f"{job.tokens_per_second:,.0f}" if going else "-",
            duration(job.eta_s) if going else "-",
        )
    serving = Table("model", "requests/s", "failed", "p95", "in flight", "tokens/s", title="Serving", title_justify="left", expand=True)
    for one in served:
        serving.add_row(
            one.model,
            f"{one.requests_per_second:.1f}",
            f"{one.failed:.1%}",
            "-" if one.p95_s is None else f"{one.p95_s * 1000:.0f} ms",
            f"{one.in_flight:.0f}",
            f"{one.tokens_per_second:,.0f}",
        )
    return Group(training, serving)


def _job(name: str, run: RunFolder, now: float) -> Job:
    state = str(run.status()["state"])
    steps, dev, last = {}, {}, None
    for line in _tail(run).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut at the beginning, or half written
        last = record["time"]
        if record["kind"] == "step":
            steps = record
        elif record["kind"] == "eval":
            dev = record["metrics"]
    silent = now - last if last is not None else 0.0
    if state == "running" and silent > max(SILENT_S, 10 * steps.get("step_seconds", 0.0)):
        state = "silent"
    return Job(
        name, run.number, state, steps.get("step", 0), steps.get("num_steps", 0), steps.get("loss"), dev,
        steps.get("tokens_per_second", 0.0), steps.get("eta_s", 0.0), silent,
    )  # fmt: skip


def _tail(run: RunFolder) -> str:
    filesystem, path = filesystem_of(run.uri)
    file = f"{path}/{RECORDS}"
    return filesystem.tail(file, TAIL_BYTES).decode(errors="replace") if filesystem.exists(file) else ""


def _served(model: str, before: Samples, after: Samples, seconds: float) -> Served:
    def grew(name: str, **wanted: str) -> float:
        total = 0.0
        for labels, value in after.get(name, {}).items():
            if {"model": model, **wanted}.items() <= dict(labels).items():
                total += max(0.0, value - before.get(name, {}).get(labels, 0.0))
        return total

    statuses = {value for labels in after.get(c.SERVE_REQUESTS.exported, {}) for name, value in labels if name == "status"}
    requests = grew(c.SERVE_REQUESTS.exported)
    failed = sum(grew(c.SERVE_REQUESTS.exported, status=status) for status in statuses if status.startswith("5"))
    buckets = {value for labels in after.get(f"{c.SERVE_SECONDS.exported}_bucket", {}) for name, value in labels if name == "le"}
    within = sorted((float(le), grew(f"{c.SERVE_SECONDS.exported}_bucket", le=le)) for le in buckets)
    p95 = next((le for le, count in within if requests and count >= 0.95 * within[-1][1] > 0), None)
    in_flight = sum(value for labels, value in after.get(c.SERVE_IN_FLIGHT.exported, {}).items() if ("model", model) in labels)
    return Served(
        model, requests / seconds, failed / requests if requests else 0.0, p95, in_flight, grew(c.SERVE_TOKENS.exported) / seconds
    )


def watch(storage: str, *, targets: str = RAY_TARGETS, every_s: float = 2.0, once: bool = False) -> None:
    """Show the table until Ctrl-C, or once."""
    from rich.live import Live

    from danlu.terminal import console

    before, began = scrape(targets), time.monotonic()
    if once:
        time.sleep(min(every_s, 1.0) if before else 0.0)
        console.print(screen(jobs(storage, time.time()), services(before, scrape(targets), time.monotonic() - began)))
        return
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            after, now = scrape(targets), time.monotonic()
            live.update(screen(jobs(storage, time.time()), services(before, after, max(now - began, 1e-3))), refresh=True)
            before, began = after, now
            time.sleep(every_s)
