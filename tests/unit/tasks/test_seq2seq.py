"""Sequence to sequence: losses and texts are transformers' own, scores sacrebleu's and the formula's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import translations, write_rows, write_t5
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

from danlu import sdk
from danlu.data.pack import pack_rows
from danlu.errors import DataError
from danlu.spec.data import Data
from danlu.spec.task import Seq2Seq
from danlu.spec.train import TrainJob
from danlu.tasks import seq2seq, text_scores
from danlu.tasks.rows import Splits
from danlu.tasks.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"))


def read(rows: list[dict[str, Any]], model: Path, folder: Path, task: Seq2Seq | None = None, max_length: int = 32) -> Splits:
    data = Data(
        train=write_rows(folder / "train.jsonl", rows), dev=write_rows(folder / "dev.jsonl", rows[:1]), cache_dir=str(folder / "cache")
    )
    return seq2seq.splits(data, task or Seq2Seq(), load_tokenizer(model), max_length=max_length, seed=1)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_batchs_loss_is_transformers_own_on_padded_labels(kind: str, model: Path, tmp_path: Path) -> None:
    rows = translations(6)
    split = read(rows, model, tmp_path).train
    tokenizer = load_tokenizer(model)
    if kind == "t5":
        plain = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    else:
        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0,
            pad_token_id=0, bos_token_id=2, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1,
        )  # fmt: skip
        plain = BartForConditionalGeneration(config).eval()
    batch = tokenizer([row["translation"]["en"] for row in rows], padding=True, return_tensors="pt")
    labels = tokenizer(text_target=[row["translation"]["zh"] for row in rows], padding=True, return_tensors="pt").input_ids
    labels[labels == 0] = -100
    theirs = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    packed = pack_rows(split.encoded, range(6))
    ours = seq2seq.loss(seq2seq.wrap(plain, Seq2Seq()), packed, Seq2Seq())
    number = seq2seq.num_targets(packed)
    assert number == int((labels != -100).sum())
    assert float(ours / number) == pytest.approx(float(theirs.loss), abs=1e-5)
    hits = seq2seq.row_outputs(seq2seq.wrap(plain, Seq2Seq()), packed)[:, 1].sum()
    assert int(hits) == int((theirs.logits.argmax(-1) == labels).sum())


@pytest.mark.parametrize("row", [{"source": "one two", "target": "yi er"}, {"document": "one two", "summary": "yi er"}])
def test_every_form_says_the_same(row: dict[str, str], model: Path, tmp_path: Path) -> None:
    split = read([row] * 3, model, tmp_path).train
    other = read(
        [{"translation": {"zh": "yi er", "en": "one two"}}] * 3, model, tmp_path, Seq2Seq(source_lang="en", target_lang="zh")
    ).train
    assert split.encoded.input_ids.tolist() == other.encoded.input_ids.tolist()
    assert split.texts.pairs == ["yi er"] * 3


def test_a_broken_row_is_dropped_and_what_is_cut_is_counted(model: Path, tmp_path: Path) -> None:
    good = {"source": "one", "target": "yi"}
    found = read(
        [good, {"source": "one", "target": " "}, good, {"source": "one", "target": "yi " * 9}],
        model,
        tmp_path,
        Seq2Seq(max_target_length=4),
    )
    assert found.train.texts.row_numbers == [1, 3, 4]
    assert "the first row 2: target is empty" in found.report.text()
    assert "1 targets cut at task.max_target_length=4 tokens" in found.report.text()
    with pytest.raises(DataError, match="row 1: target is empty"):
        read([{"source": "one", "target": ""}], model, tmp_path)
    with pytest.raises(DataError, match="no translation into 'fr'"):
        read(translations(3), model, tmp_path, Seq2Seq(target_lang="fr"))


def test_it_learns_to_translate_and_what_it_writes_is_what_generate_writes(model: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "name": "numbers",
        "model": {"model_name_or_path": str(model), "max_length": 16},
        "data": {
            "train": write_rows(tmp_path / "train.jsonl", translations(96)),
            "test": write_rows(tmp_path / "test.jsonl", translations(12, 1)),
            "cache_dir": str(tmp_path / "cache"),
        },
        "task": {"kind": "seq2seq", "max_target_length": 8, "num_beams": 2},
        "optim": {"learning_rate": 1e-2},
        "precision": "fp32",
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "max_steps": 60,
        "storage": str(tmp_path / "storage"),
    }
    job = TrainJob.model_validate(fields)
    trained = sdk.train(job)
    found = trained.evaluations["test"].scores.metrics()
    first = next(record for record in trained.run.records() if record["kind"] == "step")
    assert found["loss"] < first["loss"] - 1
    folder = trained.bundle.path / "model"
    plain, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    rows = translations(12, 1)
    written = []
    for row in rows:
        ids = tokenizer(row["translation"]["en"], return_tensors="pt")
        made = plain.generate(input_ids=ids.input_ids, attention_mask=ids.attention_mask, num_beams=2, max_new_tokens=8, do_sample=False)
        written.append(tokenizer.decode(made[0], skip_special_tokens=True))
    answers = sdk.predict(trained.reference, [row["translation"]["en"] for row in rows], storage=job.storage)
    assert [answer.to_dict()["completion"] for answer in answers] == written
    from sacrebleu import corpus_bleu, corpus_chrf

    references = [row["translation"]["zh"] for row in rows]
    assert found["bleu"] == pytest.approx(corpus_bleu(written, [references]).score)
    assert found["chrf"] == pytest.approx(corpus_chrf(written, [references]).score)
    for probe in trained.bundle.meta.probes:
        made = plain.generate(torch.tensor([probe.prompt_token_ids]), max_new_tokens=16, do_sample=False, num_beams=1)[0, 1:]
        assert made.tolist() == probe.completion_token_ids


def test_rouge_is_its_formula_on_words_and_on_chinese_characters() -> None:
    assert text_scores.words("The cat, 猫咪 sat!") == ["the", "cat", "猫", "咪", "sat"]
    one, other = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "lay", "on", "a", "mat"]
    # 4 of 6 and 6 words (the cat on mat; the second "the" has no partner); 1 of 5 and 5 pairs; the cat on mat in order.
    assert text_scores.rouge_n(one, other, 1) == pytest.approx(4 / 6)
    assert text_scores.rouge_n(one, other, 2) == pytest.approx(1 / 5)
    assert text_scores.rouge_l(one, other) == pytest.approx(4 / 6)
    assert text_scores.rouge_l([], other) == 0.0
    chinese = text_scores.text_scores(["今天天气很好"], ["今天天气不好"])
    assert chinese["rouge1"] == pytest.approx(5 / 6)
    assert chinese["rouge2"] == pytest.approx(3 / 5)
    assert chinese["bleu"] > 0


def test_its_rows_keep_sources_out_of_the_loss(model: Path, tmp_path: Path) -> None:
    split = read(translations(4), model, tmp_path).train
    for index in range(4):
        learned = split.encoded.row_labels(index) != -100
        assert np.array_equal(learned, split.encoded.token_types(index) == 1)
