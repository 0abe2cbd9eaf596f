"""Rows that stay on disk: the same as those in memory, made shard by shard, also after a stop, and trained on to the same losses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_rows
from language import talks, write_chat_model, write_rows
from pydantic import ValidationError

from danlu.artifact.runs import RunFolder
from danlu.data import prepare
from danlu.data.pack import Batches
from danlu.errors import DataError
from danlu.handover import make_lineage
from danlu.spec.data import DropBroken
from danlu.spec.train import TrainJob
from danlu.tasks import streamed
from danlu.tasks.chat import end_of_turn_ids
from danlu.tasks.from_scratch import start_folder
from danlu.tasks.rows import Splits
from danlu.tasks.task import read_given, read_splits
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train.loop import train
from danlu.train.run import LocalRun, StepRecord

ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": [*make_rows(150, 1), {"text": " ", "label": "ship"}, {"text": "wheat", "label": ""}],
    "causal": [{"text": " ".join(row["text"] for row in make_rows(150, seed)[seed::40])} for seed in range(40)],
    "masked": [{"text": row["text"]} for row in make_rows(150, 2)],
    "chat": [*talks(150), {"messages": [{"role": "user", "content": "nobody answers"}]}],
}
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"kind": "classification"},
    "causal": {"kind": "pretrain"},
    "masked": {"kind": "pretrain", "objective": {"kind": "masked"}},
    "chat": {"kind": "chat"},
}


@pytest.fixture(scope="module")
def models(tiny_model: Path, tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    chat = write_chat_model(tmp_path_factory.mktemp("chat"))
    return {"classification": tiny_model, "masked": tiny_model, "causal": tiny_decoder, "chat": chat}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SHARD_ROWS", 30)


def job_of(name: str, models: dict[str, Path], folder: Path, *, streaming: bool, **data: Any) -> TrainJob:
    fields = {"train": write_rows(folder / "rows.jsonl", ROWS[name]), "cache_dir": str(folder / "cache"), "streaming": streaming}
    return TrainJob.model_validate(
        {
            "name": "streamed",
            "model": {"model_name_or_path": str(models[name]), "max_length": 24 if name != "chat" else 64},
            "data": fields | {"split": {"kind": "ratio", "dev_size": 0.2}} | data,
            "task": TASKS[name],
            "optim": {"learning_rate": 3e-3, "schedule": {"kind": "constant"}},
            "precision": "fp32",
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "max_steps": 8,
            "checkpoint": {"save_steps": 2},
            "storage": str(folder / "storage"),
        }
    )


def read(job: TrainJob) -> Splits:
    return read_splits(job, load_tokenizer(Path(job.model.model_name_or_path)), max_length=job.model.max_length)


@pytest.mark.parametrize("name", TASKS)
def test_streamed_rows_are_the_rows_in_memory(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    held, streamed_ = (read(job_of(name, models, tmp_path, streaming=streaming)) for streaming in (False, True))
    one, other = held.train.encoded, streamed_.train.encoded
    assert len(list((tmp_path / "cache" / "clean").glob("*/split-train-*.jsonl"))) >= 2, "there are several shards"
    for field in ("input_ids", "offsets", "truncated", "token_type_ids", "token_labels"):
        assert np.array_equal(getattr(one, field), getattr(other, field)), field
    assert isinstance(other.input_ids.base, np.memmap), "they stay in their file"
    assert np.array_equal(held.train.labels, streamed_.train.labels)
    assert held.label_names == streamed_.label_names
    assert held.dev.encoded.input_ids.shape == streamed_.dev.encoded.input_ids.shape
    assert held.dev.texts.texts == streamed_.dev.texts.texts
    told, expected = streamed_.report.splits["train"], held.report.splits["train"]
    assert told.rows == len(one)
    assert told.labels == expected.labels
    if name == "classification":
        assert sum(told.dropped.values()) == expected.dropped_empty + expected.dropped_unlabelled
    assert "not counted" in streamed_.report.text()
    if name == "chat":
        tokenizer = load_tokenizer(models[name])
        assert end_of_turn_ids(other, tokenizer) == end_of_turn_ids(one, tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


class Stopped(Exception):
    pass


def test_tokenising_goes_on_at_the_shard_where_it_was_stopped(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of("classification", models, tmp_path, streaming=True)
    whole = read(job.model_copy(update={"data": job.data.model_copy(update={"cache_dir": str(tmp_path / "other")})}))
    write, made = streamed.write_shard, []

    def stopping(path: Path, rows: Any) -> None:
        if len(made) == 2:
            raise Stopped
        made.append(path.name)
        write(path, rows)

    monkeypatch.setattr(streamed, "write_shard", stopping)
    with pytest.raises(Stopped):
        read(job)
    (folder,) = (path for path in (tmp_path / "cache" / "packed").iterdir() if path.is_dir())
    assert sorted(path.name for path in folder.iterdir()) == made == ["00000.npz", "00001.npz"]
    (folder / "00001.npz").write_bytes((folder / "00001.npz").read_bytes()[:100])  # a machine that went down while writing

    def counting(path: Path, rows: Any) -> None:
        made.append(path.name)
        write(path, rows)

    monkeypatch.setattr(streamed, "write_shard", counting)
    again = read(job)
    assert made[2:] == ["00001.npz", "00002.npz", "00003.npz", "00004.npz"]
    assert np.array_equal(again.train.encoded.input_ids, whole.train.encoded.input_ids)
    assert np.array_equal(again.train.labels, whole.train.labels)
    assert again.train.digest == whole.train.digest
    assert not list(folder.glob("*.npz")), "the shards are in the joined files"
    read(job)
    assert len(made) == 6, "what is done is not done again"
    run = RunFolder(f"file://{tmp_path}/storage", 1)
    assert make_lineage(job, again, run, "d").data_digests["train"] == whole.train.digest
    other = read(job_of("classification", models, tmp_path, streaming=True, clean=[{"kind": "filter_length", "min_characters": 40}]))
    assert other.train.digest != whole.train.digest


@pytest.mark.parametrize("name", ["classification", "masked"])
def test_a_streamed_run_that_is_stopped_goes_on_to_the_losses_and_rows_of_one_in_memory(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    def run(streaming: bool, folder: str, stop_at: int | None = None) -> dict[int, float]:
        def listener(record: object) -> None:
            if isinstance(record, StepRecord) and record.step == stop_at:
                raise Stopped

        job, here = job_of(name, models, tmp_path, streaming=streaming), LocalRun(torch.device("cpu"), listener)
        start = Path(job.model.model_name_or_path)
        try:
            train(job, read(job), start, load_tokenizer(start), here, str(tmp_path / folder))
        except Stopped:
            assert stop_at is not None
        return {record.step: record.loss for record in here.records if isinstance(record, StepRecord)}

    held, stopped = run(False, "held"), run(True, "streamed", stop_at=5)
    resumed = run(True, "streamed")
    assert min(resumed) == 5, "it goes on from the checkpoint of step 4"
    assert stopped | resumed == pytest.approx(held, abs=1e-6)

    rows = read(job_of(name, models, tmp_path, streaming=True)).train
    both = [
        Batches(split.encoded, split.labels, global_batch_size=8, micro_batch_size=4, rank=0, world_size=1, seed=17)
        for split in (rows, read(job_of(name, models, tmp_path, streaming=False)).train)
    ]
    for step in range(4):
        for one, other in zip(both[0].at(step), both[1].at(step), strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
    epochs = Counter(int(row) for step in range(len(rows)) for row in both[0].rows_of(step))
    assert epochs == Counter(dict.fromkeys(range(len(rows)), 8)), "each row once an epoch"


def test_a_model_from_scratch_has_the_tokenizer_of_all_streamed_texts(models: dict[str, Path], tmp_path: Path) -> None:
    task = {"kind": "pretrain", "from_scratch": {"vocab_size": 300}}
    made = []
    for streaming in (False, True):
        job = TrainJob.model_validate(job_of("causal", models, tmp_path, streaming=streaming).model_dump(mode="json") | {"task": task})
        made.append(start_folder(job.model, job.data, job.task, seed=job.seed))
    assert made[0] == made[1], "its name is the digest of the texts"


def test_a_broken_row_stops_a_streamed_job_before_it_is_tokenised_unless_it_is_dropped(models: dict[str, Path], tmp_path: Path) -> None:
    job = job_of("chat", models, tmp_path, streaming=True)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"messages": [\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 152: not JSON"):
        read(job)
    tolerant = read(job.model_copy(update={"data": job.data.model_copy(update={"clean": [DropBroken()]})}))
    assert tolerant.report.cleaned is not None
    assert tolerant.report.cleaned.removed["train"]["drop_broken"] == 1


def test_other_files_than_a_streamed_jobs_are_scored_whole(models: dict[str, Path], tmp_path: Path) -> None:
    job = job_of("causal", models, tmp_path, streaming=True, split=None, dev_size=0.5, clean=[{"kind": "normalize"}])
    tokenizer = load_tokenizer(models["causal"])
    split = read_given(str(tmp_path / "rows.jsonl"), job, tokenizer, (), max_length=24)
    assert len(split.texts.texts) == len(ROWS["causal"])
    drawn = read(job)
    assert len(drawn.dev.texts.texts) == len(ROWS["causal"]) // 2, "without a split rule, dev_size of the rows is drawn"


def test_rows_that_no_shard_can_learn_from_are_refused_with_the_split(models: dict[str, Path], tmp_path: Path) -> None:
    job = job_of("chat", models, tmp_path, streaming=True)
    rows = [{"messages": [{"role": "user", "content": f"nobody answers {i}"}]} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"^data\.train: 30 of 30 rows cannot be learned from"):
        read(job)


def test_tasks_that_hold_their_rows_refuse_to_stream(models: dict[str, Path], tmp_path: Path) -> None:
    job = job_of("classification", models, tmp_path, streaming=True).model_dump(mode="json")
    with pytest.raises(
        ValidationError, match=r"data\.streaming goes with task\.kind: classification, pretrain, chat; task\.kind=regression"
    ):
        TrainJob.model_validate(job | {"task": {"kind": "regression"}})
