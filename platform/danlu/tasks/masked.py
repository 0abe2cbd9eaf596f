"""Masked language modelling on plain text: an encoder fills in what was masked. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from transformers import AutoModelForMaskedLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import labelled
from danlu.data.encode import NO_TARGET, Encoded, encoded_rows
from danlu.data.pack import Corrupt
from danlu.data.rendering import special_ids
from danlu.data.report import data_report
from danlu.data.split import random_split
from danlu.errors import ModelError
from danlu.spec.data import Data
from danlu.spec.task import MaskedLm, Pretrain
from danlu.tasks import chat
from danlu.tasks.loading import load_model, load_shapes
from danlu.tasks.packed_masked import PackedMaskedLM
from danlu.tasks.rows import Split, Splits, read_given, read_splits

PER_TOKEN = False

# rows


def splits(data: Data, task: Pretrain, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, split and tokenise; each row is a text, or a piece of one. Training rows are masked anew each time, the others once."""
    rows = read_splits(data)
    texts = {name: labelled(table, data.columns, where=f"data.{name}", need_label=False) for name, table in rows.items()}
    if "dev" not in texts:
        train_rows, dev_rows = random_split(len(texts["train"].texts), data.dev_size, seed)
        texts["dev"], texts["train"] = texts["train"].take(dev_rows), texts["train"].take(train_rows)
        rows["dev"] = rows["train"]
    made = {name: Split(pieces(split.texts, tokenizer, max_length), None, split) for name, split in texts.items()}
    report = data_report({name: (split.texts, split.encoded) for name, split in made.items()}, rows, max_length=max_length)
    mask = masking(task, tokenizer)
    made["train"] = replace(made["train"], corrupt=mask)
    for name in ("dev", "test"):
        if name in made:
            made[name] = replace(made[name], encoded=masked_once(made[name].encoded, mask, seed))
    return Splits(made["train"], made["dev"], made.get("test"), [], report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: Pretrain,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Texts of other files than the job's, masked once."""
    rows = read_given(source, data)
    texts = labelled(rows, data.columns, where="--data", need_label=False)
    return Split(masked_once(pieces(texts.texts, tokenizer, max_length), masking(task, tokenizer), 0), None, texts)


def pieces(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Texts cut into rows of at most `max_length` tokens, each with the special tokens of a whole text."""
    found: list[np.ndarray] = []
    for text in texts:
        encodings = tokenizer(text, truncation=True, max_length=max_length, return_overflowing_tokens=True).encodings or ()
        found += [np.asarray(one.ids, dtype=np.int32) for one in encodings]
    return encoded_rows(found, [False] * len(found))


def masked_once(encoded: Encoded, mask: Corrupt, seed: int) -> Encoded:
    """Every row masked, the same for every evaluation."""
    drawn = [mask(encoded.row(i), np.random.default_rng((seed, i))) for i in range(len(encoded))]
    return encoded_rows([ids for ids, _ in drawn], [False] * len(drawn), token_labels=[targets for _, targets in drawn])


def with_a_mask(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[str, str]:
    """A text with the middle one of the tokens that are read masked; and what stood there."""
    read = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    places = [(start, end) for start, end in read["offset_mapping"] if end > start]
    start, end = places[len(places) // 2]
    return f"{text[:start]}{tokenizer.mask_token}{text[end:]}", text[start:end]


def masking(task: Pretrain, tokenizer: PreTrainedTokenizerBase) -> Corrupt:
    """What masks a row anew each time it is trained on."""
    assert isinstance(task.objective, MaskedLm)
    if tokenizer.mask_token_id is None:
        raise ModelError(
            "the tokenizer has no mask token", where="task.objective.kind", fix="an encoder's folder, or objective: {kind: causal}"
        )
    special = np.asarray(sorted(special_ids(tokenizer)))
    share, mask_id, size = task.objective.mlm_probability, int(tokenizer.mask_token_id), len(tokenizer)
    pieces_ = word_pieces(tokenizer) if task.objective.whole_word_mask else None
    return partial(mask, special=special, share=share, mask_id=mask_id, vocabulary=size, word_pieces=pieces_)


def mask(
    ids: np.ndarray,
    draw: np.random.Generator,
    *,
    special: np.ndarray,
    share: float,
    mask_id: int,
    vocabulary: int,
    word_pieces: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking (https://arxiv.org/abs/1810.04805): of the chosen `share` of a row 80 % become the mask, 10 % any token, 10 % stay.

    With `word_pieces` whole words are chosen, and the tokens of one become what they become each by itself, as in BERT's own script. At
    least one token is chosen, so that every row teaches something.
    """
    free = np.flatnonzero(~np.isin(ids, special))
    words = np.arange(len(free)) if word_pieces is None else words_of(ids, word_pieces, free)
    chosen = free[(draw.random(int(words.max(initial=-1)) + 1) < share)[words]]
    if not len(chosen) and len(free):
        chosen = free[words == words[draw.choice(len(free), 1)]]
    targets = np.full(len(ids), NO_TARGET, dtype=np.int32)
    targets[chosen] = ids[chosen]
    masked = ids.copy()
    fate = draw.random(len(chosen))
    masked[chosen[fate < 0.8]] = mask_id
    other = chosen[(fate >= 0.8) & (fate < 0.9)]
    masked[other] = draw.integers(0, vocabulary, len(other))
    return masked, targets


ALONE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
"""Writing without spaces: such a character is a word."""


def words_of(ids: np.ndarray, word_pieces: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The word that each of the places `free` of a row belongs to, counted from 0."""
    begins = np.ones(len(free), dtype=bool)
    neighbours = np.diff(free) == 1  # what stands behind a special token begins a word
    begins[1:] = ~(word_pieces[1][ids[free[1:]]] & word_pieces[0][ids[free[:-1]]] & neighbours)
    words: np.ndarray = np.cumsum(begins) - 1
    return words


def word_pieces(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """bool [2, vocabulary]: the word of a token may go on with the next one; a token may go on with the word before it.

    WordPiece marks what goes on (##), byte-level and SentencePiece tokenizers what begins (a space); there a word is letters and digits.
    """
    highest = max(tokenizer.get_vocab().values())  # more than there are entries, where a vocabulary has holes
    names = [name or "" for name in tokenizer.convert_ids_to_tokens(list(range(highest + 1)))]
    if any(name.startswith("##") for name in names):
        return np.asarray([[True] * len(names), [name.startswith("##") for name in names]])
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    as_byte = {sign: byte for byte, sign in bytes_to_unicode().items()}
    byte_level = not any(name.startswith("\u2581") for name in names)
    found = np.zeros((2, len(names)), dtype=bool)
    for index, name in enumerate(names):
        raw = bytes(as_byte[sign] for sign in name if sign in as_byte) if byte_level else name.replace("\u2581", " ").encode()
        if not raw:
            continue
        text = raw.decode("utf-8", "ignore")
        # A character of several bytes may be cut between two tokens.
        open_, inside = raw.decode("utf-8", "replace").endswith("\ufffd"), 0x80 <= raw[0] < 0xC0
        found[0, index] = open_ or text[-1:] == " " or (text[-1:].isalnum() and not ALONE.match(text[-1]))
        found[1, index] = inside or (text[:1].isalnum() and not ALONE.match(text[0]))
    return found


# model


def build_model(
    folder: str | Path, label_names: Sequence[str] = (), *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder with its output layer, in float32; that layer starts from nothing where the folder has none."""
    return load_model(
        AutoModelForMaskedLM,
        folder,
        dropout=dropout,
        dropout_names=("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
        quantization=quantization,
        fix="a folder whose config.json belongs to its weights",
        backbone_only=True,
    )


def skeleton(folder: str | Path, num_labels: int = 0) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    return load_shapes(AutoModelForMaskedLM, folder, "masked language model")


def head_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the output layer's parameters, but for what it shares with the embeddings."""
    return {name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}


def wrap(model: PreTrainedModel, task: Pretrain) -> PackedMaskedLM:
    """The model as the loop calls it."""
    return PackedMaskedLM(model)


# loss and metrics: of the learned tokens, as in chat

loss, num_targets, row_outputs, scores = chat.loss, chat.num_targets, chat.row_outputs, chat.scores
