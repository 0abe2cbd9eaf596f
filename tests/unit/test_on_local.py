"""`danlu jobs ... --on local`: jobs as their run folders tell of them, also of jobs whose cluster is gone."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from danlu import on_local
from danlu.artifact.run_logs import LIMIT_BYTES
from danlu.artifact.runs import STATUS, RunFolder, open_run
from danlu.cli import app
from danlu.errors import ClusterError, SpecError
from danlu.places import services_at

STEP = {"kind": "step", "step": 3, "num_steps": 9, "loss": 0.5, "learning_rate": 1e-3, "grad_norm": 1.0}
START = {"kind": "start", "step": 0, "device": "cpu", "world_size": 4, "threads_per_worker": 4}
STEP |= {"tokens_per_second": 100.0, "eta_s": 6.0}


def danlu(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run(storage: Path, name: str, state: str, **details: Any) -> RunFolder:
    made = open_run(str(storage), name, "digest")
    made.record(STEP)
    made.set_status(state, **details)
    return made


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that a `danlu` command could be: it says when it is up."""
    code = "import time; print('up', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, "danlu", "train"], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"up\n"
        yield started
        started.kill()


def test_a_run_says_how_it_ended_and_jobs_wait_says_it_to_scripts(tmp_path: Path) -> None:
    run(tmp_path, "good", "finished", bundle="good@v2")
    run(tmp_path, "bad", "failed", reason="data.train: no such file\n  try: another")
    run(tmp_path, "stopped", "failed", reason="KeyboardInterrupt()")
    run(tmp_path, "killed", "running", host=socket.gethostname(), pid=2**22 + 1)
    run(tmp_path, "elsewhere", "running", host="a-pod", pid=1)
    found = {one.name: (one.state, one.why) for one in on_local.jobs(str(tmp_path))}
    assert found == {
        "good": ("succeeded", "stored as good@v2"),
        "bad": ("failed", "data.train: no such file"),
        "stopped": ("cancelled", "it was interrupted"),
        "killed": ("failed", "its process is gone: it was killed, or the machine went down"),
        "elsewhere": ("running", "in process 1 of a-pod"),
    }
    local = ("--on", "local", "--storage", str(tmp_path))
    codes = {name: danlu("jobs", "wait", name, "--timeout", "0", *local).exit_code for name in found}
    assert codes == {"good": 0, "bad": 1, "stopped": 130, "killed": 1, "elsewhere": 124}
    assert "step 3/9  loss 0.5000" in danlu("jobs", "logs", "good", *local).output
    assert json.loads(danlu("jobs", "show", "bad", "--json", *local).output)["state"] == "failed"
    assert sorted(line.split()[0] for line in danlu("jobs", "list", *local).output.splitlines()) == sorted(found)


def test_a_running_job_is_cancelled_like_ctrl_c_and_only_if_it_is_ours(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    local = ("--on", "local", "--storage", str(tmp_path))
    run(tmp_path, "here", "running", host=socket.gethostname(), pid=process.pid)
    run(tmp_path, "elsewhere", "running", host="a-pod", pid=process.pid)
    for verb in ("resume", "delete"):
        assert isinstance(danlu("jobs", verb, "here", *local).exception, ClusterError)
    refused = danlu("jobs", "cancel", "elsewhere", *local).exception
    assert "which is no danlu command of this machine" in str(refused)
    assert process.poll() is None
    assert "jobs resume here" in danlu("jobs", "cancel", "here", *local).output
    assert process.wait(30) == -signal.SIGTERM
    assert on_local.status(str(tmp_path), "here").state == "failed"
    assert "its bundles stay" in danlu("jobs", "delete", "here", *local).output
    assert [one.name for one in on_local.jobs(str(tmp_path))] == ["elsewhere"]


def test_a_job_runs_on_where_the_clock_was_set_forward_and_a_number_given_anew_is_nobodys(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    one = run(tmp_path, "topics", "running", host=socket.gethostname(), pid=process.pid)
    status = Path(one.uri) / STATUS
    status.write_text(json.dumps(json.loads(status.read_text()) | {"time": 1.0}))
    assert on_local.status(str(tmp_path), "topics").state == "failed", "it began after the run"
    with one.held():
        assert on_local.status(str(tmp_path), "topics").state == "running"
    assert not one.is_held()


def test_where_no_job_has_run_that_is_said(tmp_path: Path) -> None:
    said = danlu("jobs", "list", "--on", "local", "--storage", str(tmp_path))
    assert (said.stdout, said.stderr, said.exit_code) == ("", f"there are none in {tmp_path}\n", 0)
    assert danlu("jobs", "list", "--json", "--on", "local", "--storage", str(tmp_path)).output == ""


def test_a_log_is_followed_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_local, "POLL_S", 0.01)
    one = run(tmp_path, "topics", "running", host="a-pod", pid=1)
    lines = on_local.logs(str(tmp_path), "topics", follow=True)
    assert "step 3/9" in next(lines)
    one.record({"kind": "eval", "step": 9, "metrics": {"accuracy": 0.75}, "is_best": True})
    assert next(lines) == "step 9: dev accuracy 0.7500  (best so far)"
    one.set_status("finished", bundle="topics@v1")
    assert list(lines) == []


def test_what_a_runs_processes_wrote_is_kept_in_its_storage_the_end_of_it(tmp_path: Path) -> None:
    """A process with files for stdout and stderr, as Ray's workers have; killed after its second checkpoint."""
    one = run(tmp_path, "topics", "failed", reason="a training worker was lost (rank 0)")
    one.write("report.html", "<p>")
    one.record(START | {"time": 0})
    for seconds in (1.0, 3600.0):
        one.record(STEP | {"step": 4, "time": seconds})
    code = """if True:
        import os, signal, sys
        from danlu.artifact.run_logs import RunLog
        print("begins", flush=True)
        log = RunLog(sys.argv[1], "rank-0")
        for step in range(2):
            for line in range(40_000):
                print(f"step {step} line {line} " + "x" * 20)
            sys.stdout.flush()
            os.write(2, f"NCCL WARN {step}\\n".encode())
            log.keep()
        print("this is lost", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        died = subprocess.run([sys.executable, "-c", code, one.uri], stdout=out, stderr=err)
    assert died.returncode == -signal.SIGKILL
    local = ("--on", "local", "--storage", str(tmp_path))
    head, cut, *lines = danlu("jobs", "logs", "topics", "--raw", *local).output.splitlines()
    assert re.fullmatch(r"==> \d{8}T\d{6}Z-rank-0.log <==", head)
    assert lines[-3:] == ["step 1 line 39999 " + "x" * 20, "NCCL WARN 0", "NCCL WARN 1"]
    (kept,) = (tmp_path / "runs/topics/0001/logs").iterdir()
    assert LIMIT_BYTES / 2 - 200 < kept.stat().st_size < LIMIT_BYTES / 2, "a half for each stream"
    written = (tmp_path / "out").read_bytes().removesuffix(b"this is lost\n")
    left_out = int(cut.split()[1])
    assert written[left_out:].decode().splitlines() == lines[:-2]
    shown = danlu("jobs", "show", "topics", *local).output
    for told in (f"jobs resume topics --on local --storage {tmp_path}", "cost 0.72 USD", "left: ", "report.html", kept.name):
        assert told in shown, shown
    for options, where in ((["--raw"], "--raw"), (["--raw", "-f", *local], "--follow")):
        refused = danlu("jobs", "logs", "topics", *options).exception
        assert isinstance(refused, SpecError)
        assert refused.where == where
    run(tmp_path, "quiet", "finished")
    assert "has kept none" in str(danlu("jobs", "logs", "quiet", "--raw", *local).exception)


def test_what_is_not_there_or_has_no_effect_is_said(tmp_path: Path) -> None:
    run(tmp_path, "topics", "finished")
    with pytest.raises(ClusterError, match="there is no run of 'topic'; there is: topics"):
        on_local.status(str(tmp_path), "topic")
    with pytest.raises(SpecError, match="lives as long as its `danlu serve`"):
        services_at("local", context=None, namespace=None)
    for options, where in (
        (["--on", "here"], "--on"),
        (["--on", "local", "-n", "team"], "--namespace"),
        (["--on", "k8s", "--storage", "runs"], "--storage"),
        (["--on", "ray://head", "--context", "c"], "--context"),
    ):
        refused = danlu("jobs", "list", *options).exception
        assert isinstance(refused, SpecError)
        assert refused.where == where
