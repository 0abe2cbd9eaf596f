"""Specs in and out of files: YAML 1.2, what is no YAML, what is no spec, and `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from danlu.errors import SpecError
from danlu.spec import yaml12
from danlu.spec.files import dump, load, parse, which
from danlu.spec.serve import Echo, Service
from danlu.spec.train import TrainJob
from danlu.spec.tuning import Lora

ROOT = Path(__file__).parents[3]
JOB = "kind: train\nname: topics\nmodel: {model_name_or_path: m}\ndata: {train: t.csv}\n"
SERVICE = "kind: service\nname: topics\nbundle: topics@v1\n"


def refusal(text: str, *overrides: str, kind: type[TrainJob] | type[Service] = TrainJob) -> str:
    with pytest.raises(SpecError) as caught:
        parse(kind, text, overrides, source="job.yaml")
    return str(caught.value)


def scalar(text: str) -> object:
    return yaml12.read(f"a: {text}", "f")[0]["a"]


def test_every_example_loads() -> None:
    examples = sorted((ROOT / "k8s" / "examples").glob("*.yaml"))
    assert examples
    for path in examples:
        kind = which((TrainJob, Service), path.read_text(encoding="utf-8"))
        spec = load(kind, path)
        assert parse(kind, dump(spec)) == spec


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("2e-4", 2e-4), ("1E5", 1e5), ("+1.5e+3", 1500.0), ("1.", 1.0), (".5", 0.5), ("-7", -7), ("010", 10), ("0o17", 15), ("0x1F", 31)],
        *[("true", True), ("FALSE", False), ("~", None), ("", None), ("Null", None), (".inf", float("inf"))],
        *[(odd, odd) for odd in ("yes", "no", "on", "y", "1_000", "1:30", "0b1", "=", "2024-01-01", "1e", "TrUe", "12e4567x")],
    ],
)
def test_a_scalar_is_what_yaml_1_2_says(text: str, value: object) -> None:
    found = scalar(text)
    assert (type(found), found) == (type(value), value)


def test_a_learning_rate_needs_no_point_and_a_label_called_yes_is_a_text() -> None:
    job = parse(TrainJob, JOB + "optim: {learning_rate: 2e-4}\ntask: {kind: classification, labels: [yes, no]}\n")
    assert (job.optim.learning_rate, job.task.labels) == (0.0002, ["yes", "no"])


def test_merged_fields_may_be_overridden_and_a_byte_order_mark_is_no_field() -> None:
    text = "\ufeffkind: service\nname: a\nengine: &slow {kind: echo, latency_ms: 5}\n"
    assert parse(Service, text).engine == Echo(latency_ms=5)
    merged = "kind: service\nname: a\nlimits: {<<: {max_inputs: 3, max_body_bytes: 9}, max_inputs: 4}\nengine: {kind: echo}\n"
    assert (parse(Service, merged).limits.max_inputs, parse(Service, merged).limits.max_body_bytes) == (4, 9)


NO_SPEC = {
    "nothing": ("", "job.yaml: the file is empty", "kind: train"),
    "only a comment": ("# later\n", "the file is empty", "danlu schema"),
    "a list": ("- a\n", "a mapping of fields is needed at the top, not a list", ""),
    "a text": ("just words", "a mapping of fields is needed at the top, not 'just words'", ""),
    "an open bracket": ("name: a\ndata: [", "job.yaml, line 2, column 8: not YAML: ", "found '<stream end>'"),
    "a colon in a value": (
        "name: a: b",
        "job.yaml, line 1, column 8: not YAML: mapping values are not allowed",
        'quote a value that has ": "',
    ),
    "a tab": ("data:\n\t- b", "job.yaml, line 2, column 1: not YAML", "indent with spaces"),
    "a control character": ("name: a\nseed: \x01", "job.yaml, line 2: not YAML: a control character (#x0001)", ""),
    "two documents": ("name: a\n---\nname: b", "line 2, column 1: not YAML: found another document", "no second `---`"),
    "a key twice": ("seed: 1\nname: a\nseed: 2", "job.yaml, line 3: 'seed' stands twice, in lines 1 and 3", "keep one"),
    "a key twice inside": ("model:\n  a: 1\n  a: 2", "line 3: 'a' stands twice, in lines 2 and 3", ""),
    "a template": (
        "name: {{ name }}",
        "job.yaml, line 1: a mapping or a list stands where a name should",
        'quote a template: "{{ name }}"',
    ),
    "a number as a name": ("1: 2", "job.yaml, line 1: 1 stands where a name should", 'in quotes: "1"'),
    "a tag with another value": ("seed: !!int x", "line 1, column 7: not YAML: 'x' is no int", ""),
    "a Python object": ("name: !!python/name:os.system x", "line 1, column 7: not YAML: could not determine a constructor", ""),
    "an anchor inside itself": ("data: &a [*a]", "line 1, column 7: not YAML: found unconstructable recursive node", ""),
    "a deep nest": ("[" * 5000, "job.yaml: not a spec", ""),
    "another kind": ("kind: service", "kind: 'service', but this takes kind: train", "`danlu serve` takes it"),
    "a kind that is none": ("kind: Train", "kind: 'Train', but this takes kind: train", "try: kind: train"),
    "a kind that is a list": ("kind: [train]", "kind: ['train'], but this takes kind: train", ""),
}


@pytest.mark.parametrize("name", NO_SPEC)
def test_what_is_no_spec_is_said_with_its_place(name: str) -> None:
    text, problem, fix = NO_SPEC[name]
    said = refusal(text)
    assert problem in said
    assert fix in said
    assert said.startswith("job.yaml")


def test_a_training_job_given_to_a_service_names_the_commands_that_take_it() -> None:
    assert "`danlu train`, `plan`, `evaluate`, `predict`, `run` and `serve` take it" in refusal("kind: train", kind=Service)


def test_a_spec_without_its_kind_is_told_by_its_fields() -> None:
    kinds = (TrainJob, Service)
    assert which(kinds, JOB.replace("kind: train\n", "")) is TrainJob
    assert which(kinds, SERVICE.replace("kind: service\n", "")) is Service
    with pytest.raises(SpecError, match="kind: 'deploy', but this takes kind: train or kind: service"):
        which(kinds, "kind: deploy")


def test_a_file_that_cannot_be_read_is_said_with_what_would_work(tmp_path: Path) -> None:
    def said(name: str) -> str:
        with pytest.raises(SpecError) as caught:
            load(TrainJob, tmp_path / name)
        return str(caught.value)

    (tmp_path / ".pre-commit-config.yaml").touch()  # no job of anybody's
    assert said("job.yaml").endswith("try: the path of a YAML file; `danlu schema train` says what may stand in one")
    (tmp_path / "topics.yaml").write_text(JOB)
    (tmp_path / "latin.yml").write_bytes("name: café".encode("latin-1"))
    assert "topic.yaml does not exist" in said("topic.yaml")
    for name in ("topic.yaml", "topics.yml", "topics"):
        assert said(name).endswith(f"did you mean {tmp_path / 'topics.yaml'}?")
    assert f"YAML files there: {tmp_path / 'latin.yml'}, {tmp_path / 'topics.yaml'}" in said("zzz.yaml")
    assert f"there is no folder {tmp_path / 'nowhere'}" in said("nowhere/job.yaml")
    assert "is a folder" in said("")
    assert "latin.yml: byte 9 is not UTF-8" in said("latin.yml")
    assert "save the file as UTF-8" in said("latin.yml")
    assert "cannot be read: Not a directory" in said("topics.yaml/job.yaml")


SETS: dict[str, tuple[list[str], str, Any]] = {
    "a field": (["name=other"], "name", "other"),
    "a number": (["optim.learning_rate=1e-3"], "optim.learning_rate", 0.001),
    "a field of a parent that is not there": (["serve.http.port=0"], "serve.http.port", 0),
    "a parent that is empty": (["serve=", "serve.http.port=0"], "serve.http.port", 0),
    "nothing": (["optim.max_grad_norm="], "optim.max_grad_norm", None),
    "null": (["optim.max_grad_norm=null"], "optim.max_grad_norm", None),
    "a list": (["task.kind=classification", "task.labels=[a, yes]"], "task.labels", ["a", "yes"]),
    "an item of a list": (["data.train=[a, b]", "data.train.1=c"], "data.train", ["a", "c"]),
    "a variant": (["tuning={kind: lora, r: 4}"], "tuning", Lora(r=4)),
    "a variant by its tag": (["tuning.kind=lora", "tuning.r=4"], "tuning", Lora(r=4)),
    "a text with an equals sign": (["data.train=a=b.csv"], "data.train", "a=b.csv"),
    "a text with a colon": (["data.train='s3://a: b'"], "data.train", "s3://a: b"),
    "the last of two": (["seed=1", "seed=2"], "seed", 2),
    "spaces around": ([" seed = 3 "], "seed", 3),
}


@pytest.mark.parametrize("name", SETS)
def test_set_changes_one_field(name: str) -> None:
    overrides, path, value = SETS[name]
    found: Any = parse(TrainJob, JOB, overrides)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_set_changes_a_field_of_an_item_of_a_list() -> None:
    """No spec has such a list yet, so the refusal shows what was reached."""
    said = refusal(JOB, "data.train=[{a: 1}]", "data.train.0.b=2", "data.train.0.b.c=3")
    assert "data.train.0.b is 2, which has no fields" in said


BAD_SETS = {
    "no equals sign": ("name", "'name' is not of the form a.b=c", "--set optim.learning_rate=1e-4"),
    "no name": ("=3", "'=3' is not of the form a.b=c", ""),
    "an empty part": ("optim..learning_rate=1", "is not of the form a.b=c", ""),
    "a field of a text": ("name.x=1", "name is 'topics', which has no fields", "--set name=..."),
    "a field of an item": ("data.test.0.x=1", "data.test.0 is 'a', which has no fields", "--set data.test.0=..."),
    "an item that is not there": ("data.test.2=c", "the list has 2 items, and '2' is none of them", "a number from 0 to 1"),
    "a name for an item": ("data.test.last=c", "the list has 2 items, and 'last' is none of them", ""),
    "an item of an empty list": ("data.dev.0=c", "the list has 0 items", "set the whole list"),
    "a value that is no YAML": ("name=a: b: c", "mapping values are not allowed", 'quote a value that has ": "'),
    "a value with a key twice": ("model={a: 1, a: 2}", "'a' stands twice", "keep one"),
    "a bare bracket": ("name=[", "'name=[': not YAML", "quote it: --set 'name=\"[\"'"),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_a_set_that_cannot_be_applied_is_said(name: str) -> None:
    override, problem, fix = BAD_SETS[name]
    said = refusal(JOB.replace("t.csv}", "t.csv, test: [a, b], dev: []}"), override)
    assert said.startswith("--set: ")
    assert problem in said
    assert fix in said


def test_what_is_wrong_with_a_set_value_is_said_of_the_set_and_not_of_a_line_in_the_file() -> None:
    text = JOB + "optim:\n  learning_rate: 1e-4\n"
    assert "optim.learning_rate (line 6)" in refusal(text.replace("1e-4", "abc"))
    assert "optim.learning_rate (--set): 'abc': a number is needed" in refusal(text, "optim.learning_rate=abc")
    assert "optim.learning_rat (--set): there is no such field here\n  try: did you mean optim.learning_rate?" in refusal(
        text, "optim.learning_rat=1"
    )
    assert "parallel (--set): `kind` is needed\n  try: kind: ddp or deepspeed" in refusal(text, "parallel.zero_stage=3")
    assert "model.revision (--set): 1234: a text is needed\n  try: --set 'model.revision=\"1234\"'" in refusal(text, "model.revision=1234")
    assert parse(TrainJob, text, ['model.revision="1234"']).model.revision == "1234"


ODD_TEXTS = [
    "1e5",
    "12e4567",
    "0o7",
    "0x1f",
    "010",
    "1.",
    "1_000",
    "1:30",
    "2024-01-01",
    ".inf",
    "yes",
    "true",
    "~",
    "null",
    "",
    "=",
    "<<",
    "-",
]
ODD_TEXTS += ["- a", "a: b", "#a", " a ", "!a", "*a", "{a}", "@a", "line\nline\n", "丹炉 é 😀 \u2028", "\x07", "'\"\\"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_that_looks_like_something_else_survives_the_dump(text: str) -> None:
    job = parse(TrainJob, JOB).model_copy(update={"storage": text})
    assert parse(TrainJob, dump(job)) == job
    assert yaml.safe_load(dump(job)).get("storage") == text, "a reader of YAML 1.1 sees the same"


def test_a_dump_says_what_differs_and_no_more() -> None:
    job = parse(TrainJob, JOB + "optim: {learning_rate: 5e-5}\ntuning: {kind: lora}\ncompress: {}\nseed: 17\nparallel: {kind: ddp}\n")
    assert yaml.safe_load(dump(job)) == {
        "kind": "train",
        "name": "topics",
        "model": {"model_name_or_path": "m"},
        "data": {"train": "t.csv"},
        "tuning": {"kind": "lora"},
        "compress": {},
    }
