"""Causal language modelling: no token of a text is lost, scores are transformers' own, and a run ends in a bundle that scores the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from danlu import sdk
from danlu.compress.load import load_judge, load_predictor
from danlu.data.encode import Encoded
from danlu.errors import DataError, ModelError
from danlu.spec.train import TrainJob
from danlu.tasks import pretrain
from danlu.tasks.judge import DecoderJudge
from danlu.tasks.tokenizer import load_tokenizer


def encoded(lengths: list[int]) -> Encoded:
    rows = [np.arange(10, 10 + n, dtype=np.int32) for n in lengths]
    return Encoded(np.concatenate(rows), np.cumsum([0, *lengths]).astype(np.int64), np.zeros(len(lengths), dtype=bool))


def job_of(model: Path, files: dict[str, str], folder: Path, **overrides: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "name": "words",
        "model": {"model_name_or_path": str(model), "max_length": 12},
        "data": {"train": files["train"], "test": files["test"], "cache_dir": str(folder / "cache")},
        "task": {"kind": "pretrain"},
        "optim": {"learning_rate": 1e-2},
        "precision": "fp32",
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "max_steps": 30,
        "storage": str(folder / "storage"),
    }
    return TrainJob.model_validate(fields | overrides)


def test_long_texts_are_cut_into_pieces_and_no_token_is_lost() -> None:
    pieces = pretrain.cut(encoded([3, 10, 4]), 4, end=3)
    assert pieces.lengths.tolist() == [4, 4, 4, 3, 4]  # 3+end, 10+end in three pieces, 4 and its end alone, which has no next token
    assert pieces.row(0).tolist() == [10, 11, 12, 3]
    assert [int(i) for i in np.concatenate([pieces.row(i) for i in (1, 2, 3)])] == [*range(10, 20), 3]


def test_an_end_that_is_there_already_is_not_put_twice() -> None:
    assert pretrain.cut(encoded([4]), 8, end=13).row(0).tolist() == [10, 11, 12, 13]


def test_it_learns_and_its_scores_are_those_of_transformers_on_each_row(
    tiny_decoder: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    job = job_of(tiny_decoder, topic_files, tmp_path)
    trained = sdk.train(job)
    found = trained.evaluations["test"].scores
    model = AutoModelForCausalLM.from_pretrained(trained.bundle.path / "model").eval()
    split, _ = sdk.evaluate(trained.reference, storage=job.storage)[1], None
    total, tokens = 0.0, 0
    with torch.no_grad():
        for index in range(len(split)):
            ids = torch.from_numpy(split.encoded.row(index).astype(np.int64))[None]
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert found.metrics()["loss"] == pytest.approx(total / tokens, abs=1e-4)
    assert found.num_tokens == tokens
    first = next(record for record in trained.run.records() if record["kind"] == "step")
    assert found.metrics()["loss"] < first["loss"] - 0.5
    assert sdk.report(sdk.prepare(job), trained).endswith("report.html")


def test_the_probes_of_its_bundle_come_out_again(tiny_decoder: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    job = job_of(tiny_decoder, topic_files, tmp_path, max_steps=4)
    bundle = sdk.train(job).bundle
    judge = load_judge(bundle)
    assert isinstance(judge, DecoderJudge)
    probes = bundle.meta.probes
    assert judge.losses([probe.text for probe in probes]) == pytest.approx([probe.loss for probe in probes], abs=1e-5)
    for probe in probes:
        again = judge.continued(probe.text, probe.prompt_token_ids, 16)
        assert list(again.token_ids) == probe.completion_token_ids
        assert list(again.logprobs) == pytest.approx(probe.logprobs, abs=1e-5)
    assert [answer.text for answer in sdk.predict(bundle, ["wheat"], storage=job.storage)] == ["wheat"]
    with pytest.raises(ModelError, match="was trained for pretrain: it gives no answers"):
        load_predictor(bundle)


def test_whole_texts_are_held_out_for_dev(tiny_decoder: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    job = job_of(tiny_decoder, topic_files, tmp_path)
    data = pretrain.splits(job.data, job.task, load_tokenizer(tiny_decoder), max_length=4, seed=1)
    assert not set(data.train.texts.row_numbers) & set(data.dev.texts.row_numbers)
    assert len(data.dev.texts.texts) == 18
    assert len(data.dev) > 18


def test_texts_too_short_to_have_a_next_token_are_refused(tiny_decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.csv").write_text("text\na\n\n")
    tokenizer = load_tokenizer(tiny_decoder)
    tokenizer.eos_token = None
    short = Encoded(np.asarray([5], dtype=np.int32), np.asarray([0, 1]), np.zeros(1, dtype=bool))
    assert len(pretrain.cut(short, 8, end=None)) == 0
    with pytest.raises(DataError, match="leaves no"):
        sdk.prepare(job_of(tiny_decoder, {"train": str(tmp_path / "short.csv"), "test": str(tmp_path / "short.csv")}, tmp_path))


def test_what_it_cannot_do_is_refused_before_anything_starts(tiny_decoder: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"not a metric of task\.kind=pretrain"):
        job_of(tiny_decoder, topic_files, tmp_path, evaluation={"metric_for_best_model": "accuracy"})


def test_an_encoder_which_sees_what_it_should_foretell_is_refused(tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is an encoder, BertLMHeadModel: each token sees those behind it") as raised:
        sdk.prepare(job_of(tiny_model, topic_files, tmp_path))
    assert "masked" in raised.value.fix
