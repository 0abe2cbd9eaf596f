"""The commands as a person meets them: help, answers, refusals, exit codes, and nothing started that will not be used."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_rows
from typer.testing import CliRunner, Result

from danlu import __version__, sdk
from danlu.cli import app
from danlu.errors import DataError, ModelError, ResourceError, SpecError
from danlu.spec.files import load, parse
from danlu.spec.schema import schema
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

DANLU = str(Path(sys.executable).parent / "danlu")
OF_A_SPEC = ("plan", "train", "evaluate", "quantize", "serve", "predict", "run")
COMMANDS = (
    *OF_A_SPEC,
    "monitor",
    "top",
    "chat",
    "keys",
    "bench",
    "compare",
    "suite",
    "data",
    "render",
    "doctor",
    "jobs",
    "services",
    "schema",
)


def danlu(*arguments: str, stdin: bytes = b"", cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, as a process."""
    done = subprocess.run(
        [DANLU, *arguments], input=stdin, capture_output=True, timeout=120, cwd=cwd, env={**os.environ, "COLUMNS": "100", **environment}
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def invoke(*arguments: str, stdin: bytes = b"") -> Result:
    """The same commands, in this process."""
    return CliRunner().invoke(app, list(arguments), input=stdin)


def refusal(result: Result, kind: type[Exception]) -> str:
    assert isinstance(result.exception, kind), result.exception
    return str(result.exception)


@pytest.fixture(scope="module")
def job_file(tiny_model: Path, topic_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job that trains in a second."""
    folder = tmp_path_factory.mktemp("cli")
    document = {
        "kind": "train",
        "name": "topics",
        "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
        "data": {**topic_files, "cache_dir": str(folder / "cache")},
        "optim": {"learning_rate": 5e-3},
        "precision": "fp32",
        "max_steps": 12,
        "storage": str(folder / "runs"),
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return str(folder / "job.yaml")


@pytest.fixture(scope="module")
def trained(job_file: str) -> str:
    """The job's file, once there is a bundle of it."""
    result = invoke("train", job_file)
    assert result.exit_code == 0, result.output
    assert "stored as topics@v1" in result.output
    return job_file


# What needs no job.


def test_every_command_has_help_that_says_what_it_is_for() -> None:
    overview = invoke("--help").output
    for command in COMMANDS:
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert "Usage: " in result.output
        assert command in result.output.splitlines()[0]
        found = re.search(rf"^  {command} +(\S.*)$", overview, re.MULTILINE)
        assert found, f"{command} is not listed"
        assert found[1].endswith("."), "the list shows whole sentences"
        assert not found[1].endswith("..."), f"{command}'s first sentence does not fit a line"
        assert not re.search(r"^  [a-z]+ +[A-Z].*\.\.\.$", result.output, re.MULTILINE), f"nor do all of its commands: {result.output}"


def test_the_version_is_the_packages() -> None:
    assert danlu("--version").stdout == f"danlu {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "danlu", "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"danlu {__version__}\n"


def test_a_shell_completes_commands_and_options() -> None:
    for typed, offered in (("danlu tr", "train"), ("danlu jobs c", "cancel"), ("danlu serve a.yaml --bu", "--bundle")):
        done = danlu(_DANLU_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(typed.count(" ")))
        assert done.stdout.split() == [offered]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian", "job.yaml"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "job.yaml", "--sett", "a=b"], "No such option: --sett"),
        (["train"], "Missing argument 'spec'"),
        (["train", "job.yaml", "--set"], "Option '--set' requires an argument"),
        (["plan", "job.yaml", "other.yaml"], "unexpected extra argument"),
        (["plan", "nosuch.yaml"], "error: spec: nosuch.yaml does not exist\n  try: "),
        (["schema", "nosuch"], "error: danlu schema: there is no schema named 'nosuch'\n  try: train or serve\n"),
    ],
)
def test_a_typo_is_a_message_on_stderr_and_exit_code_2(arguments: list[str], told: str) -> None:
    done = danlu(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", OF_A_SPEC)
def test_every_command_says_what_is_wrong_with_its_file(command: str, tmp_path: Path) -> None:
    for name, content, told in (
        ("open.yaml", b"data: [", "open.yaml, line 1, column 8: not YAML"),
        ("latin.yaml", "name: café".encode("latin-1"), "latin.yaml: byte 9 is not UTF-8"),
        ("empty.yaml", b"", "empty.yaml: the file is empty"),
        ("list.yaml", b"- a", "a mapping of fields is needed at the top, not a list"),
        ("typo.yaml", b"kind: train\nname: a\nmodel: {model_name_or_path: m}\ndata: {trian: a}", "did you mean data.train?"),
    ):
        (tmp_path / name).write_bytes(content)
        assert told in refusal(invoke(command, str(tmp_path / name)), SpecError)
    assert "does not exist" in refusal(invoke(command, str(tmp_path / "other.yaml")), SpecError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_says_so_and_exits_as_shells_expect(stop: signal.Signals, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.yaml")
    process = subprocess.Popen([DANLU, "plan", str(tmp_path / "job.yaml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with (tmp_path / "job.yaml").open("w"):  # open once the command reads it
        process.send_signal(stop)
        out, told = process.communicate(timeout=60)
    assert (process.returncode, out, told) == (130, "", "\nstopped\n")


@pytest.mark.parametrize(("name", "kind"), [("train", TrainJob), ("serve", Service)])
def test_schema_prints_the_schema(name: str, kind: type[TrainJob] | type[Service]) -> None:
    assert json.loads(invoke("schema", name).output) == schema(kind)


# plan and train.


def test_plan_prints_the_plan_and_the_rows_report_and_starts_nothing(job_file: str) -> None:
    result = invoke("plan", job_file)
    assert result.exit_code == 0, result.output
    for told in ("Plan", "parameters", "memory a worker", "32 = 8 x 4 accumulation x 1 workers", "Data", "rows", "grain"):
        assert told in result.output
    storage = Path(load(TrainJob, job_file).storage)
    assert not [path for path in storage.rglob("*") if path.is_file()] or (storage / "bundles").exists()


def test_plan_as_json_is_one_document(job_file: str, tiny_model: Path) -> None:
    from transformers import BertForSequenceClassification

    found = json.loads(invoke("plan", job_file, "--json", "--set", "global_batch_size=16").output)
    assert set(found) == {"plan", "data"}
    assert found["plan"]["num_steps"] == 12
    model = BertForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    assert found["plan"]["num_parameters"] == sum(weights.numel() for weights in model.parameters())


def test_more_workers_than_the_machine_has_are_refused_with_a_number_that_works(job_file: str) -> None:
    said = refusal(invoke("train", job_file, "--set", "workers.num_workers=999"), SpecError)
    batch, workers = re.search(r"nearest that works: (\d+)", said), re.search(r"or workers.num_workers: ([\d, ]+)", said)
    assert batch
    assert workers
    text = Path(job_file).read_text()
    assert parse(TrainJob, text, ["workers.num_workers=999", f"global_batch_size={batch[1]}"])
    for number in workers[1].split(", "):
        assert parse(TrainJob, text, [f"workers.num_workers={number}"])

    # A batch that divides by 999 workers of one row each gets as far as the machine, and no further.
    sets = ["--set", "micro_batch_size=1", "--set", "global_batch_size=999", "--set", "workers.num_workers=999"]
    done = danlu("train", job_file, *sets)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "999 workers with 1 cores each need 999 cores" in done.stderr
    found = re.search(r"--set (workers.num_workers=\d+)", done.stderr)
    assert found
    assert invoke("plan", job_file, *sets, "--set", found[1]).exit_code == 0

    sets = ["--set", "workers.cpus_per_worker=999"]
    said = refusal(invoke("plan", job_file, *sets), ResourceError)
    fixes = [part for fix in re.findall(r"--set (\S+=\d+)", said) for part in ("--set", fix)]
    assert invoke("plan", job_file, *sets, *fixes).exit_code == 0


def test_rows_that_are_not_there_are_said_with_their_field(job_file: str) -> None:
    result = invoke("train", job_file, "--set", "data.train=nowhere.csv")
    said = refusal(result, DataError)
    assert said.startswith("data.train: ")
    assert "nowhere.csv" in said
    assert DataError.exit_code == 2


# serve.


def write_service(folder: Path, **fields: object) -> str:
    path = folder / "service.yaml"
    path.write_text(yaml.safe_dump({"kind": "service", "name": "echo", "storage": str(folder / "runs"), **fields}))
    return str(path)


def test_a_port_that_is_taken_is_said_before_ray_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        spec = write_service(tmp_path, engine={"kind": "echo"}, http={"port": port})
        done = danlu("serve", spec, RAY_TMPDIR=str(tmp_path / "ray"))
    assert done.returncode == 3
    assert f"error: http.port: 127.0.0.1:{port} cannot be listened on" in done.stderr
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ray").exists(), "a Ray that starts writes its session there"


def test_a_bundle_on_the_command_line_is_checked_like_one_in_the_file(tmp_path: Path) -> None:
    spec = write_service(tmp_path, engine={"kind": "encoder"}, http={"port": 0})
    assert "bundle is needed by engine.kind=encoder" in refusal(invoke("serve", spec), SpecError)
    assert "has no bundle named 'nosuch'" in refusal(invoke("serve", spec, "--bundle", "nosuch@v1"), ModelError)
    spec = write_service(tmp_path, engine={"kind": "echo"})
    assert "bundle has no effect with engine.kind=echo" in refusal(invoke("serve", spec, "--bundle", "nosuch@v1"), SpecError)


# evaluate and predict.


def test_evaluate_prints_the_scores_that_the_sdk_gives(trained: str) -> None:
    result = invoke("evaluate", trained)
    assert result.exit_code == 0, result.output
    evaluation, _ = sdk.evaluate("topics@latest", storage=load(TrainJob, trained).storage)
    assert f"{evaluation.scores.metrics()['accuracy']:.4f}" in result.output
    for label in ("grain", "ship", "trade"):
        assert label in result.output


def test_an_unknown_bundle_is_answered_with_what_there_is(trained: str) -> None:
    said = refusal(invoke("evaluate", trained, "--bundle", "topic@latest"), ModelError)
    assert "has no bundle named 'topic'; it has: topics" in said
    assert "did you mean topics?" in said
    said = refusal(invoke("evaluate", trained, "--bundle", "topics@v7"), ModelError)
    assert "'topics' has no 'v7'" in said
    for there in ("v1", "latest", "production"):
        assert there in said
    assert "it has: topics" in refusal(invoke("predict", trained, "wheat", "--bundle", "nosuch"), ModelError)


def test_predict_answers_one_json_object_a_text(trained: str) -> None:
    texts = [row["text"] for row in make_rows(6, 4)]
    expected = sdk.predict("topics@production", texts, storage=load(TrainJob, trained).storage)
    for result in (invoke("predict", trained, *texts), invoke("predict", trained, stdin="".join(f"{text}\r\n" for text in texts).encode())):
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert [line["text"] for line in lines] == texts
        assert [line["label"] for line in lines] == [found.label for found in expected]
        assert [line["probability"] for line in lines] == [round(max(found.probabilities), 4) for found in expected]


def test_predict_gives_every_text_back_as_it_was(trained: str) -> None:
    texts = ["wheat :smile: [bold]corn[/bold]", "谷物 \t 价格", 'a "quoted" \\ text', "wheat " * 300]
    result = invoke("predict", trained, *texts)
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == texts


NO_TEXT = {
    "an empty input": ([], b"", "standard input is empty", "one a line on standard input"),
    "only a line end": ([], b"\n", "standard input is empty", ""),
    "an empty line": ([], b"wheat\n\ncorn\n \n", "line 2, 4 of 4 is empty", "leave it out"),
    "an empty text": (["wheat", " "], b"", "text 2 of 2 is empty", "leave it out"),
    "bytes": ([], b"wheat\n\xff\xfe\n", "line 2 of standard input is not UTF-8", "iconv"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_predict_without_a_text_says_which_one(name: str, trained: str) -> None:
    texts, stdin, problem, fix = NO_TEXT[name]
    said = refusal(invoke("predict", trained, *texts, stdin=stdin), DataError)
    assert problem in said
    assert fix in said


def test_predict_as_a_process_keeps_stdout_for_the_answers(trained: str) -> None:
    done = danlu("predict", trained, stdin="谷物 wheat corn\n".encode(), LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "谷物 wheat corn"
    done = danlu("predict", trained, stdin=b"")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: texts: standard input is empty")


# data, compare and what stands beside a score.


def test_data_report_says_what_a_file_holds_and_writes_it(job_file: str, tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in [*make_rows(6, 1), make_rows(6, 1)[0]]]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{broken", '{"text": "call 13812345678", "label": "ship"}']) + "\n")
    result = invoke("data", "report", str(tmp_path / "rows.jsonl"), "--spec", job_file, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    for told in ("exact duplicates in line 7", "broken rows in line 8 (not JSON", "suspected phone in line 9", "[CLS]", "target: grain"):
        assert told in result.output
    assert "13812345678" not in result.output
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["splits"]["train"]["rows"] == 8
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads(invoke("data", "report", str(tmp_path / "rows.jsonl"), "--json").output)["splits"]["train"]["tokens"] is None
    assert "there is nothing to report on" in refusal(invoke("data", "report"), SpecError)
    assert "does not exist" in refusal(invoke("data", "report", str(tmp_path / "nosuch.csv")), DataError)


def test_data_clean_prints_what_went_and_where_the_rows_are(job_file: str, tmp_path: Path) -> None:
    sets = ["--set", "data.clean=[{kind: deduplicate_exact}]", "--set", "data.split={kind: ratio, dev_size: 0.2}"]
    result = invoke("data", "clean", job_file, *sets, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "180 rows in the files" in result.output
    shards = re.findall(r"\S+split-\w+-00000.jsonl", result.output)
    assert sum(len(Path(shard).read_text().splitlines()) for shard in shards) <= 180
    assert "no steps" in refusal(invoke("data", "clean", job_file), SpecError)


def test_evaluate_says_how_sure_it_is_and_writes_it(trained: str, tmp_path: Path) -> None:
    result = invoke("evaluate", trained, "--by", "label", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for told in ("95 % intervals", "ECE", "by length in tokens", "fitted on dev"):
        assert told in result.output
    document = json.loads((tmp_path / "scores.json").read_text())
    evaluation, _ = sdk.evaluate("topics@latest", storage=load(TrainJob, trained).storage)
    assert document["scores"] == evaluation.scores.metrics()
    found = document["analysis"]["metrics"]["accuracy"]
    assert found["value"] == document["scores"]["accuracy"]
    assert found["low"] <= found["value"] <= found["high"]
    assert "no column 'nosuch'" in refusal(invoke("evaluate", trained, "--by", "nosuch"), DataError)


def test_compare_shows_two_bundles_on_the_same_rows(trained: str, tmp_path: Path) -> None:
    storage = load(TrainJob, trained).storage
    result = invoke("compare", "topics@v1", "topics@latest", "--storage", storage, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "same answer 100.00%" in result.output
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["differences"]["accuracy"]["change"] == 0
    assert document["mcnemar"]["p_value"] == 1
    assert "both are endpoints" in refusal(invoke("compare", "http://127.0.0.1:1", "http://127.0.0.1:2"), SpecError)


def test_a_jobs_own_spec_is_gone_on_with_from_its_storage(trained: str) -> None:
    storage = load(TrainJob, trained).storage
    local = ("--on", "local", "--storage", storage)
    before = len(invoke("jobs", "logs", "topics", *local).output.splitlines())
    result = invoke("jobs", "resume", "topics", *local)
    assert "topics is finished, and stored as topics@v2" in result.output
    shown = invoke("jobs", "show", "topics", *local).output
    assert shown.startswith("topics: succeeded, stored as topics@v2\n"), shown
    assert len(invoke("jobs", "logs", "topics", *local).output.splitlines()) == before


def test_lm_evaluation_harness_is_for_language_models_and_an_extra(job_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "asks a causal language model, and classification is none" in refusal(
        invoke("evaluate", job_file, "--lm-eval", "hellaswag"), SpecError
    )
    assert "have no effect" in refusal(invoke("evaluate", job_file, "--limit", "3"), SpecError)
    assert "bring their own rows" in refusal(invoke("evaluate", job_file, "--lm-eval", "hellaswag", "--by", "label"), SpecError)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    chat = str(Path(__file__).parents[2] / "k8s" / "examples" / "chat.yaml")
    assert "pip install 'danlu[lm-eval]'" in refusal(invoke("evaluate", chat, "--lm-eval", "hellaswag"), ResourceError)
