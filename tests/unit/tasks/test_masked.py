"""Masked language modelling, and models from scratch: BERT's masking, transformers' losses, one start for every process."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, ModernBertConfig, Qwen3Config, RobertaConfig, RobertaForMaskedLM

from danlu import sdk
from danlu.data.encode import NO_TARGET
from danlu.data.pack import Batches, pack_rows
from danlu.errors import DataError, ModelError
from danlu.spec.task import FromScratch, MaskedLm, Pretrain
from danlu.spec.train import TrainJob
from danlu.tasks import masked
from danlu.tasks.from_scratch import start_folder, train_tokenizer
from danlu.tasks.tokenizer import load_tokenizer


def test_the_masking_is_berts_and_never_hides_a_special_token() -> None:
    ids = np.concatenate([[2], np.arange(10, 4010), [3]]).astype(np.int32)
    found, targets = masked.mask(ids, np.random.default_rng(0), special=np.asarray([0, 2, 3, 4]), share=0.15, mask_id=4, vocabulary=5000)
    chosen = targets != NO_TARGET
    assert np.array_equal(targets[chosen], ids[chosen])
    assert not chosen[[0, -1]].any()
    assert np.array_equal(found[~chosen], ids[~chosen])
    assert chosen.mean() == pytest.approx(0.15, abs=0.02)
    assert (found[chosen] == 4).mean() == pytest.approx(0.8, abs=0.05)
    assert (found[chosen] == ids[chosen]).mean() == pytest.approx(0.1, abs=0.04)
    one, aims = masked.mask(
        np.asarray([2, 9, 3]), np.random.default_rng(0), special=np.asarray([2, 3, 4]), share=0.001, mask_id=4, vocabulary=9
    )
    assert (aims != NO_TARGET).sum() == 1
    assert len(one) == 3


def words_told(tokenizer: Any, text: str) -> list[list[int]]:
    """The places of each word's tokens, by the tokenizer itself."""
    places: dict[int, list[int]] = {}
    for place, word in enumerate(tokenizer(text).encodings[0].word_ids):
        if word is not None:
            places.setdefault(word, []).append(place)
    return list(places.values())


def words_found(tokenizer: Any, text: str) -> list[list[int]]:
    ids = np.asarray(tokenizer(text).input_ids)
    free = np.flatnonzero(~np.isin(ids, tokenizer.all_special_ids))
    words = masked.words_of(ids, masked.word_pieces(tokenizer), free)
    return [free[words == word].tolist() for word in range(words.max() + 1)]


def test_words_are_the_tokenizers_own_and_a_chinese_character_is_one(tokenizer_folder: Path) -> None:
    wordpiece = load_tokenizer(tokenizer_folder)
    for text in ("the unseen harvest said a tankers group", "xylophone zither", "wheat"):
        assert words_found(wordpiece, text) == words_told(wordpiece, text)
    assert len(wordpiece("xylophone").input_ids) > 5, "a word of many pieces"
    assert words_found(wordpiece, "小明在北京") == [[i] for i in range(1, 6)]
    assert max(wordpiece.get_vocab().values()) >= len(wordpiece), "this vocabulary has holes"
    assert words_found(wordpiece, "谁在哪里") == [[i] for i in range(1, 5)]
    corpus = ["the unseen harvest said the tanker", "smaller harvests in the unseen year"] * 9
    byte_level = train_tokenizer(corpus, 300, masked=True, max_length=64)
    for text in ("the unseen harvest, said smaller tankers.", "in 1987 xylophone"):
        assert words_found(byte_level, text) == words_told(byte_level, text)
    assert [len(word) for word in words_found(byte_level, "小明在")] == [3, 3, 3], "the bytes of a character belong together"


def test_whole_words_are_masked_at_the_same_share(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    masking = masked.masking(Pretrain(objective=MaskedLm(mlm_probability=0.2, whole_word_mask=True)), tokenizer)
    text = "xylophone wheat zither the unseen harvest of maize"
    ids, words = np.asarray(tokenizer(text).input_ids, dtype=np.int32), words_told(tokenizer, text)
    shares, fates = [], []
    for draw in range(600):
        found, targets = masking(ids, np.random.default_rng(draw))
        chosen = targets != NO_TARGET
        assert chosen.any()
        assert all(len(set(chosen[word].tolist())) == 1 for word in words), "all of a word, or nothing"
        assert np.array_equal(found[~chosen], ids[~chosen])
        assert np.array_equal(targets[chosen], ids[chosen])
        shares.append(chosen[1:-1].mean())
        fates += (found[chosen] == tokenizer.mask_token_id).tolist()
    assert np.mean(shares) == pytest.approx(0.2 + 0.8 ** len(words) / len(words), abs=0.02), "and one word where none was drawn"
    assert np.mean(fates) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("kind", [BertForMaskedLM, RobertaForMaskedLM])
def test_packed_losses_and_gradients_are_transformers_own(kind: Any) -> None:
    configs: dict[Any, Any] = {BertForMaskedLM: BertConfig, RobertaForMaskedLM: RobertaConfig}
    config = configs[kind](
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    ours, theirs = kind(config), kind(copy.deepcopy(config))
    theirs.load_state_dict(ours.state_dict())
    module = masked.wrap(ours, Pretrain(objective=MaskedLm()))
    assert module.packed
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, 60, n).astype(np.int32) for n in (4, 9, 6)]
    corrupt = partial(masked.mask, special=np.asarray([1, 2, 3, 4]), share=0.3, mask_id=4, vocabulary=60)
    from danlu.data.encode import encoded_rows

    whole = masked.masked_once(encoded_rows(rows, [False] * 3), corrupt, 0)
    batch = pack_rows(whole, [0, 1, 2])
    found = masked.loss(module, batch, None)
    found.backward()
    total = torch.zeros(())
    for i in range(3):
        ids, aims = torch.from_numpy(whole.row(i).astype(np.int64)), torch.from_numpy(whole.row_labels(i).astype(np.int64))
        total = total + theirs(input_ids=ids[None], labels=aims[None]).loss * int((aims != NO_TARGET).sum())
    total.backward()
    assert float(found) == pytest.approx(float(total), abs=1e-4)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is None or torch.allclose(parameter.grad, expected[name].grad, atol=1e-5), name
    assert masked.row_outputs(module, batch)[:, 2].sum() == masked.num_targets(batch)


def test_masks_are_drawn_anew_each_step_and_do_not_depend_on_who_holds_the_row(
    tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    job = job_of(tiny_model, topic_files, tmp_path)
    data = masked.splits(job.data, job.task, load_tokenizer(tiny_model), max_length=16, seed=1)

    def drawn(rank: int, world_size: int, micro_batch_size: int, step: int) -> list[tuple[int, ...]]:
        batches = Batches(
            data.train.encoded, None, global_batch_size=8, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, seed=3,
            corrupt=data.train.corrupt,
        )  # fmt: skip
        found = []
        for batch in batches.at(step):
            for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
                found.append(tuple(batch.input_ids[start:stop].tolist()))
        return found

    alone = sorted(drawn(0, 1, 8, 0))
    assert alone == sorted(drawn(0, 2, 2, 0) + drawn(1, 2, 2, 0))
    per_epoch = len(data.train.encoded) // 8 + 1
    assert alone != sorted(drawn(0, 1, 8, per_epoch))
    assert data.dev.encoded.token_labels is not None


def job_of(model: Path, files: dict[str, str], folder: Path, **overrides: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "name": "gaps",
        "model": {"model_name_or_path": str(model), "max_length": 16},
        "data": {"train": files["train"], "test": files["test"], "cache_dir": str(folder / "cache")},
        "task": {"kind": "pretrain", "objective": {"kind": "masked"}},
        "optim": {"learning_rate": 1e-2},
        "precision": "fp32",
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "max_steps": 20,
        "storage": str(folder / "storage"),
    }
    return TrainJob.model_validate(fields | overrides)


def test_it_learns_its_scores_are_transformers_own_and_it_fills_in_masks(
    tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    job = job_of(tiny_model, topic_files, tmp_path)
    trained = sdk.train(job)
    found = trained.evaluations["test"].scores.metrics()
    first = next(record for record in trained.run.records() if record["kind"] == "step")
    assert found["loss"] < first["loss"] - 0.3
    folder = trained.bundle.path / "model"
    plain, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    _, split = sdk.evaluate(trained.reference, storage=job.storage)
    total, number = 0.0, 0
    for i in range(len(split)):
        ids, aims = (torch.from_numpy(part.astype(np.int64)) for part in (split.encoded.row(i), split.encoded.row_labels(i)))
        with torch.no_grad():
            total += float(plain(input_ids=ids[None], labels=aims[None]).loss) * int((aims != NO_TARGET).sum())
        number += int((aims != NO_TARGET).sum())
    assert found["loss"] == pytest.approx(total / number, abs=1e-4)
    for probe in trained.bundle.meta.probes:
        at = probe.prompt_token_ids.index(tokenizer.mask_token_id)
        with torch.no_grad():
            logprobs = plain(torch.tensor([probe.prompt_token_ids])).logits[0, at].log_softmax(-1)
        assert [int(logprobs.argmax())] == probe.completion_token_ids
        assert probe.logprobs == pytest.approx([float(logprobs.max())], abs=1e-4)
    answer = sdk.predict(trained.reference, ["the [MASK] rose"], storage=job.storage)[0]
    assert answer.to_dict()["tokens"] == 1
    with pytest.raises(DataError, match=r"text 1 has no \[MASK\]"):
        sdk.predict(trained.reference, ["the price rose"], storage=job.storage)


def shape_of(folder: Path, config: Any) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_model_from_scratch_is_the_same_in_every_process_and_learns(objective: str, topic_files: dict[str, str], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = (
        Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
        if objective == "causal"
        else BertConfig(**sizes, max_position_embeddings=64)
    )
    shape = shape_of(tmp_path / "shape", config)
    task = {
        "kind": "pretrain",
        "objective": {"kind": objective},
        "from_scratch": {"vocab_size": 400, "config_overrides": {"num_hidden_layers": 2}},
    }
    job = job_of(shape, topic_files, tmp_path, task=task, max_steps=12)
    folders = []
    for name in ("a", "b"):
        data = job.data.model_copy(update={"cache_dir": str(tmp_path / name)})
        folders.append(start_folder(job.model, data, job.task, seed=job.seed))
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    tokenizer = load_tokenizer(folders[0])
    assert len(tokenizer("wheat harvest").input_ids) <= 6
    trained = sdk.train(job)
    assert trained.bundle.meta.scores["test"]["loss"] < next(r for r in trained.run.records() if r["kind"] == "step")["loss"] - 0.3
    assert len(load_tokenizer(trained.bundle.path / "model")) == len(tokenizer)


def test_what_cannot_start_from_scratch_is_refused_before_anything_starts(
    tiny_model: Path, topic_files: dict[str, str], tmp_path: Path
) -> None:
    from pydantic import ValidationError

    scratch = {"kind": "pretrain", "from_scratch": {}}
    with pytest.raises(ValidationError, match=r"tuning.kind=full trains all"):
        job_of(tiny_model, topic_files, tmp_path, task=scratch, tuning={"kind": "lora"})
    job = job_of(tmp_path, topic_files, tmp_path, task=scratch)
    with pytest.raises(ModelError, match=r"has no config.json to take the model's shape from"):
        sdk.prepare(job)
    shape = shape_of(tmp_path / "shape", ModernBertConfig())
    task = Pretrain(from_scratch=FromScratch(config_overrides={"num_hiden_layers": 2}))
    with pytest.raises(ModelError, match="modernbert has no field 'num_hiden_layers'"):
        start_folder(job.model.model_copy(update={"model_name_or_path": str(shape)}), job.data, task, seed=1)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    heads = shape_of(tmp_path / "heads", Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8))
    task = Pretrain(from_scratch=FromScratch(config_overrides={"num_attention_heads": 3}))
    with pytest.raises(ModelError, match="no model of this shape can be built"):
        start_folder(job.model.model_copy(update={"model_name_or_path": str(heads)}), job.data, task, seed=1)
