"""A run's record outlives its process: half a line, half a status and repeated steps do no harm."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from danlu.artifact.runs import RECORDS, STATUS, RunFolder, latest_run, open_run, run_numbers
from danlu.errors import ResourceError, StorageError


def step(number: int, loss: float = 0.0) -> dict[str, object]:
    return {"kind": "step", "step": number, "loss": loss}


def test_records_come_back_in_order_with_the_time(any_storage: str) -> None:
    run = open_run(any_storage, "topics", "digest")
    said = [step(1, 0.5), {"kind": "eval", "step": 1, "metrics": {"accuracy": 0.1}}, step(2), {"kind": "event", "step": 2, "event": "中"}]
    for values in said:
        run.record(values)
    found = run.records()
    assert [{name: value for name, value in values.items() if name != "time"} for values in found] == said
    times = [values["time"] for values in found]
    assert times == sorted(times)


def test_the_last_line_of_a_killed_process_takes_no_other_with_it(tmp_path: Path) -> None:
    run = open_run(str(tmp_path), "topics", "digest")
    for number in (1, 2, 3):
        run.record(step(number))
    path = Path(run.uri) / RECORDS
    path.write_bytes(path.read_bytes()[:-9])
    assert [values["step"] for values in run.records()] == [1, 2]
    resumed = RunFolder(run.uri, run.number, resumed=True)
    for number in (3, 4):
        resumed.record(step(number))
    assert [values["step"] for values in run.records()] == [1, 2, 3, 4]


def test_of_a_repeated_step_the_later_record_stands(any_storage: str) -> None:
    run = open_run(any_storage, "topics", "digest")
    for number in range(1, 6):
        run.record(step(number, loss=1.0))
    run.record({"kind": "event", "step": 5, "event": "killed"})
    resumed = RunFolder(run.uri, run.number, resumed=True)
    resumed.record({"kind": "event", "step": 3, "event": "resumed"})
    for number in range(4, 8):
        resumed.record(step(number, loss=2.0))
    resumed.record({"kind": "event", "step": 7, "event": "checkpoint"})
    records = resumed.records()
    assert [(values["step"], values["loss"]) for values in records if values["kind"] == "step"] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0),
    ]  # fmt: skip
    assert [values["event"] for values in records if values["kind"] == "event"] == ["resumed", "killed", "checkpoint"]


def test_the_status_is_what_was_set_last(any_storage: str) -> None:
    run = open_run(any_storage, "topics", "digest")
    assert run.status() == {"state": "unknown"}
    run.set_status("running", spec_digest="digest")
    run.set_status("failed", spec_digest="digest", reason="it was full")
    status = run.status()
    assert (status["state"], status["reason"]) == ("failed", "it was full")


def test_a_small_file_is_read_as_written_or_not_there(any_storage: str) -> None:
    run = open_run(any_storage, "topics", "digest")
    assert run.read("report.html") is None
    assert run.write("report.html", "<p>炉</p>\r\n") == f"{run.uri}/report.html"
    assert run.read("report.html") == "<p>炉</p>\r\n"


def test_half_a_status_is_no_reason_to_stop(any_storage: str) -> None:
    run = open_run(any_storage, "topics", "digest")
    run.write(STATUS, '{"state": "runn')
    assert run.status() == {"state": "unknown"}
    assert open_run(any_storage, "topics", "digest").number == 2


def test_a_status_is_never_seen_half_written(tmp_path: Path) -> None:
    run = open_run(str(tmp_path), "topics", "digest")
    run.set_status("running", reason="x" * 100_000)
    done, seen = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            seen.append(run.status()["state"])

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(200):
        run.set_status("running", reason="x" * 100_000)
    done.set()
    thread.join(timeout=10)
    assert set(seen) == {"running"}
    assert [path.name for path in Path(run.uri).iterdir()] == [STATUS]


@pytest.mark.parametrize(
    ("state", "digest", "fresh", "number"),
    [
        ("running", "same", False, 1),
        ("failed", "same", False, 1),
        ("finished", "same", False, 2),
        ("running", "other", False, 2),
        ("running", "same", True, 2),
        (None, "same", False, 2),
    ],
)
def test_an_unfinished_run_of_the_same_spec_is_gone_on_with(
    any_storage: str, state: str | None, digest: str, fresh: bool, number: int
) -> None:
    run = open_run(any_storage, "topics", "same")
    assert (run.number, run.resumed) == (1, False)
    run.record(step(1))
    if state is not None:
        run.set_status(state, spec_digest="same")
    again = open_run(any_storage, "topics", digest, fresh=fresh)
    assert (again.number, again.resumed) == (number, number == 1)
    assert (again.uri == run.uri) == (number == 1)


def test_only_the_last_run_is_gone_on_with(any_storage: str) -> None:
    open_run(any_storage, "topics", "a").set_status("failed", spec_digest="a")
    open_run(any_storage, "topics", "b").set_status("finished", spec_digest="b")
    assert open_run(any_storage, "topics", "a").number == 3


def test_runs_are_listed_by_number_and_by_job(any_storage: str) -> None:
    assert run_numbers(any_storage, "topics") == []
    assert latest_run(any_storage, "topics") is None
    for _ in range(11):
        open_run(any_storage, "topics", "digest", fresh=True).set_status("finished")
    open_run(any_storage, "other", "digest").set_status("finished")
    assert run_numbers(any_storage, "topics") == list(range(1, 12))
    latest = latest_run(any_storage, "topics")
    assert latest is not None
    assert latest.number == 11


def test_storage_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = RunFolder(f"{tmp_path}/file/runs/topics/0001", 1)
    for attempt in (lambda: run.record(step(1)), lambda: run.set_status("running"), lambda: run.write("spec.yaml", "")):
        with pytest.raises(StorageError, match="cannot write") as raised:
            attempt()
        assert raised.value.where == run.uri
        assert "storage:" in raised.value.fix


def test_an_object_store_has_every_record_that_is_no_step_at_once(tmp_path: Path) -> None:
    run = open_run(f"memory://{tmp_path.name}", "topics", "digest")
    for number in range(1, 4):
        run.record(step(number))
    run.record({"kind": "eval", "step": 3, "metrics": {}})
    lines = (run.read(RECORDS) or "").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["step", "step", "step", "eval"]


def test_no_two_processes_write_one_run_and_a_dead_one_stands_in_nobodys_way(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from danlu.artifact.runs import open_run\n"
        "with open_run(sys.argv[1], 'topics', 'digest').held():\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    run = open_run(str(tmp_path), "topics", "digest")
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ResourceError, match="trains it already") as raised, run.held():
            pass
        assert "--fresh" in raised.value.fix
        other.kill()
    with run.held():
        pass
    with open_run(f"memory://{tmp_path.name}", "topics", "digest").held():
        pass
