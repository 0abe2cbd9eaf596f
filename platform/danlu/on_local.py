"""Jobs as their runs under a storage URI tell of them: those of this machine, and what a job left that ran on a cluster which is gone."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, cast

import psutil

from danlu import sdk
from danlu.artifact.merged import let_go
from danlu.artifact.run_logs import LOGS, kept_lines, kept_logs
from danlu.artifact.runs import RECORDS, REPORT, SCORES, SPEC, RunFolder, latest_run
from danlu.artifact.uris import filesystem_of
from danlu.errors import ClusterError
from danlu.k8s.status import ENDED, JobStatus, State, not_there
from danlu.metrics.training import spent
from danlu.spec.files import parse
from danlu.spec.train import TrainJob
from danlu.terminal import TrainingView, step_line

POLL_S = 0.5
LAST_LINES = 3


def connect(storage: str) -> str:
    """The storage URI, whatever folder this process is in."""
    return sdk.absolute(storage)


def jobs(at: str) -> list[JobStatus]:
    """The latest run of every job under the storage."""
    filesystem, path = filesystem_of(f"{at}/runs")
    names = [PurePosixPath(folder).name for folder in filesystem.ls(path, detail=False)] if filesystem.exists(path) else []
    return [_status(at, name, run) for name in sorted(names) if (run := latest_run(at, name)) is not None]


def status(at: str, name: str) -> JobStatus:
    """A job's state, and why; its last lines, which end in its scores; what it cost, and the files that it left."""
    return _status(at, name, _run(at, name), explain=True)


def logs(at: str, name: str, *, follow: bool) -> Iterator[str]:
    """The run's records as lines. With `follow`, until the job has ended."""
    run, told = _run(at, name), 0
    while True:
        ended = _status(at, name, run).state in ENDED  # asked before the records are read: none is missed
        lines = _lines(run)
        yield from lines[told:]
        told = len(lines)
        if ended or not follow:
            return
        time.sleep(POLL_S)


def raw_logs(at: str, name: str) -> Iterator[str]:
    """What the run's driver and workers have written, as far as it is kept."""
    run = _run(at, name)
    if not kept_logs(run.uri):
        raise ClusterError(
            f"the run {run.number} of {name} has kept none of its processes' logs",
            where="jobs logs",
            fix="they are kept at checkpoints and at the end, of processes that write to a file; without --raw its records are shown",
        )
    yield from kept_lines(run.uri)


def wait(at: str, name: str, *, timeout_s: float | None = None) -> JobStatus | None:
    """A job's state once it has ended; None if that took longer than `timeout_s`."""
    ends = None if timeout_s is None else time.monotonic() + timeout_s
    while (found := status(at, name)).state not in ENDED:
        if ends is not None and time.monotonic() >= ends:
            return None
        time.sleep(POLL_S)
    return found


def cancel(at: str, name: str) -> str:
    """Stop a job as Ctrl-C does; what there is to say."""
    run = _run(at, name)
    found = _status(at, name, run)
    if found.state in ENDED:
        return f"{name} has ended already: {found.state}"
    details = run.status()
    process = _process(details, run)
    if process is None or not any("danlu" in word for word in process.cmdline()):
        where = f"process {details.get('pid')} of {details.get('host')}"
        raise ClusterError(f"{name} runs in {where}, which is no danlu command of this machine", where="jobs cancel", fix="stop it there")
    process.send_signal(signal.SIGTERM)
    return f"{name} is cancelled; danlu jobs resume {name} --on local --storage {at} goes on from its last checkpoint"


def resume(at: str, name: str) -> str:
    """Go on with a job that was cancelled, that failed or that has ended, here and now, from its last checkpoint."""
    run = _run(at, name)
    found = _status(at, name, run)
    if found.state not in ENDED:
        raise ClusterError(
            f"{name} is {found.state} already", where="jobs resume", fix=f"danlu jobs logs -f {name} --on local --storage {at}"
        )
    job = parse(TrainJob, run.read(SPEC) or "", source=f"the spec of {name}").model_copy(update={"storage": at})
    prepared = sdk.prepare(job)
    with TrainingView().live() as view:
        trained = sdk.train(job, listener=view, prepared=prepared)
    return f"{name} is finished, and stored as {trained.reference}"


def delete(at: str, name: str) -> str:
    """Delete a job's runs, and merged weights that were needed by nothing else. Its bundles stay."""
    if (found := _status(at, name, _run(at, name))).state not in ENDED:
        raise ClusterError(f"{name} is {found.state}", where="jobs delete", fix=f"danlu jobs cancel {name} --on local --storage {at}")
    filesystem, path = filesystem_of(f"{at}/runs/{name}")
    filesystem.rm(path, recursive=True)
    told = f"the runs of {name} are deleted; its bundles stay"
    return told + (f"; merged weights that nothing needs any more are deleted, too: {', '.join(gone)}" if (gone := let_go(at)) else "")


def _run(at: str, name: str) -> RunFolder:
    run = latest_run(at, name)
    if run is None:
        there = [one.name for one in jobs(at)]
        raise not_there(
            f"there is no run of {name!r}", name, there, where=f"--storage {at}", fix="the storage that the job wrote to: --storage URI"
        )
    return run


def _status(at: str, name: str, run: RunFolder, *, explain: bool = False) -> JobStatus:
    details = run.status()
    state, why = _state(details, run)
    ended = _time(details.get("time")) if state in ENDED else ""
    fix = f"danlu jobs resume {name} --on local --storage {at}" if state in ("cancelled", "failed") else ""
    lines, files = _lines(run)[-LAST_LINES:] if explain else [], _files(run) if explain else []
    if explain and (usd := spent(run.written())):
        lines.append(f"cost {usd:.2f} USD, all its attempts together")
    return JobStatus(name, state, why, fix, ended=ended, log=tuple(lines), files=tuple(files))


def _files(run: RunFolder) -> list[str]:
    """Of a run: its record, scores, report, and what its processes have written."""
    found = [f"{run.uri}/{name}" for name in (RECORDS, SCORES, REPORT) if run.read(name) is not None]
    return found + [f"{run.uri}/{LOGS}/{name}" for name in kept_logs(run.uri)]


def _state(details: dict[str, Any], run: RunFolder) -> tuple[State, str]:
    match details["state"]:
        case "finished":
            return "succeeded", f"stored as {details['bundle']}" if details.get("bundle") else ""
        case "failed" if "KeyboardInterrupt" in str(details.get("reason")):
            return "cancelled", "it was interrupted"
        case "failed":
            return "failed", str(details.get("reason", "")).splitlines()[0] if details.get("reason") else ""
        case "running" if details.get("host") == socket.gethostname() and _process(details, run) is None:
            return "failed", "its process is gone: it was killed, or the machine went down"
        case "running":
            return "running", f"in process {details['pid']} of {details['host']}" if "pid" in details else ""
        case _:
            return "starting", "it has written no status yet"


def _process(details: dict[str, Any], run: RunFolder) -> psutil.Process | None:
    """The process that writes the run, if it is one of this machine and still there."""
    if details.get("host") != socket.gethostname():
        return None
    try:
        process = psutil.Process(int(details["pid"]))
        # A number that was given anew belongs to somebody who came later. After a jump of the clock it looks so too.
        return process if (process.create_time() < details["time"] or run.is_held()) and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _lines(run: RunFolder) -> list[str]:
    found = []
    for line in (run.read(RECORDS) or "").splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # half of it is written yet
            continue
        if told := _line(values):
            found.append(told)
    return found


def _line(values: dict[str, Any]) -> str:
    match values.get("kind"):
        case "step":
            return step_line(cast(Any, SimpleNamespace(**values)))
        case "eval":
            scores = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values["metrics"].items())
            return f"step {values['step']}: dev {scores}{'  (best so far)' if values.get('is_best') else ''}"
        case "event":
            return f"step {values['step']}: {values['event']}{': ' + values['detail'] if values.get('detail') else ''}"
        case "quantized":
            return str(values.get("verdict", ""))
        case _:
            return ""


def _time(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


__all__ = ["cancel", "connect", "delete", "jobs", "logs", "resume", "status", "wait"]
