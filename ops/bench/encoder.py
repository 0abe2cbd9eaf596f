"""Encoder throughput in one process: Danlu's Predictor against Hugging Face's own forward, from token ids and from texts.

The same classifier (MiniLM, 22M), Reuters R8 test texts as they come, at most 128 tokens, and the same texts cut to lognormal lengths
between 8 and 128 tokens (mean about 30), which is nearer to what people send. Hugging Face gets batches of 32, padded to their longest;
padding and packing are timed, tokenising only in the rows that say so.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundles import Bundles, some_texts, train_bundles
from harness import SPEC, Row, compare, cores, finish, interleave, options
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from danlu.compress.load import load_predictor

BATCH = 32
MAX_LENGTH = 128


@dataclass(frozen=True)
class Classifier:
    """A contestant in two steps: texts to token ids (in a form of its own), those to probabilities (float [texts, labels])."""

    encode: Callable[[Sequence[str]], Any]
    forward: Callable[[Any], np.ndarray]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return self.forward(self.encode(texts))


@dataclass(frozen=True)
class Corpus:
    """Texts and what is known of their lengths."""

    name: str
    texts: list[str]
    note: str


def danlu(bundles: Bundles, kind: str) -> Classifier:
    predictor = load_predictor(bundles.int8) if kind == "int8" else load_predictor(bundles.original, precision=kind)  # type: ignore[arg-type]
    return Classifier(predictor.encode, lambda encoded: torch.from_numpy(predictor.outputs(encoded)).softmax(-1).numpy())


def hugging_face(bundles: Bundles, kind: str, *, by_length: bool = False) -> Classifier:
    """`kind`: fp32, bf16 (weights too, its fastest), or int8 (PyTorch's dynamic quantization)."""
    folder = bundles.original.path / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16 if kind == "bf16" else torch.float32).eval()
    if kind == "int8":
        with warnings.catch_warnings(action="ignore"):  # deprecated in favour of torchao, and still what most people use
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return ids

    def forward(ids: list[list[int]]) -> np.ndarray:
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i])) if by_length else range(len(ids))
        found = np.empty((len(ids), model.config.num_labels), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(ids), BATCH):
                rows = list(order[start : start + BATCH])
                batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
                found[rows] = model(**batch).logits.float().softmax(-1).numpy()
        return found

    return Classifier(encode, forward)


def corpora(bundles: Bundles, number: int) -> list[Corpus]:
    tokenizer = AutoTokenizer.from_pretrained(bundles.original.path / "model")
    whole = some_texts(number)
    draw = random.Random(0)
    # Skewed as requests are: most are short, one in a batch is long (lognormal, as in the benchmark of a decoder).
    short = [" ".join(text.split()[: max(6, int(draw.lognormvariate(3.2, 0.75)))]) for text in whole]
    found = []
    for name, texts in (("R8", whole), ("short", short)):
        lengths = np.asarray([len(ids) for ids in tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]])
        padded = sum(lengths[i : i + BATCH].max() * len(lengths[i : i + BATCH]) for i in range(0, number, BATCH))
        note = f"{name}: {number} texts of {lengths.min()}-{lengths.max()} tokens, mean {lengths.mean():.0f}"
        found.append(Corpus(name, texts, f"{note}; unsorted batches of {BATCH} are {1 - lengths.sum() / padded:.0%} padding"))
    return found


def main() -> None:
    given = options(__doc__, rounds=5)
    number = 32 if given.quick else 256
    torch.set_num_threads(cores())
    os.chdir(SPEC.parents[2])
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        bundles = train_bundles(Path(temporary), max_length=MAX_LENGTH, steps=4 if given.quick else 16)
        engines: dict[str, Classifier] = {
            "Danlu bf16": danlu(bundles, "bf16"),
            "HF bf16": hugging_face(bundles, "bf16"),
            "HF bf16, length-sorted": hugging_face(bundles, "bf16", by_length=True),
            "Danlu int8": danlu(bundles, "int8"),
            "HF int8 (dynamic)": hugging_face(bundles, "int8"),
            "Danlu fp32": danlu(bundles, "fp32"),
            "HF fp32": hugging_face(bundles, "fp32"),
            "HF fp32, length-sorted": hugging_face(bundles, "fp32", by_length=True),
        }
        rows: list[Row] = []
        notes: list[str] = []
        for corpus in corpora(bundles, number):
            notes += [corpus.note, check_answers(corpus, engines)]
            turns = {name: lambda e=engine, c=corpus: speeds(e, c) for name, engine in engines.items()}  # type: ignore[misc]
            rows += _rows(corpus.name, interleave(turns, given.rounds))
    finish("encoder", given, rows, notes)


@dataclass(frozen=True)
class Speeds:
    """Texts per second: from token ids, and tokenising included."""

    forward: float
    whole: float


def speeds(engine: Classifier, corpus: Corpus) -> Speeds:
    began = time.perf_counter()
    ids = engine.encode(corpus.texts)
    encoded = time.perf_counter()
    engine.forward(ids)
    ended = time.perf_counter()
    return Speeds(len(corpus.texts) / (ended - encoded), len(corpus.texts) / (ended - began))


def check_answers(corpus: Corpus, engines: dict[str, Classifier]) -> str:
    """Everybody's probabilities beside HF fp32's; this is the warm-up too. AssertionError if Danlu's are too far off."""
    found = {name: engine(corpus.texts) for name, engine in engines.items()}
    truth = found.pop("HF fp32")
    far = {name: float(np.abs(one - truth).max()) for name, one in found.items()}
    same = {name: float((one.argmax(axis=1) == truth.argmax(axis=1)).mean()) for name, one in found.items()}
    for name, limit in (("Danlu fp32", 1e-4), ("Danlu bf16", 5e-2), ("Danlu int8", 2e-1)):
        assert far[name] <= limit, f"{name}: a probability is {far[name]:.1e} from Hugging Face's in float32"
        assert same[name] > 0.95, f"{name}: only {same[name]:.1%} of the labels are Hugging Face's in float32"
    told = ", ".join(f"{name} {far[name]:.0e} ({same[name]:.1%})" for name in found)
    return f"{corpus.name}: largest change of a probability from HF fp32 (same labels): {told}"


def _rows(corpus: str, found: dict[str, list[Speeds]]) -> list[Row]:
    against = [
        ("Danlu bf16", "HF bf16"),
        ("Danlu bf16", "HF bf16, length-sorted"),
        ("Danlu bf16", "HF fp32"),
        ("Danlu fp32", "HF fp32"),
        ("Danlu fp32", "HF fp32, length-sorted"),
        ("Danlu int8", "HF int8 (dynamic)"),
        ("Danlu int8", "HF bf16"),
        ("Danlu int8", "Danlu bf16"),
    ]
    forward = {name: [one.forward for one in speeds] for name, speeds in found.items()}
    whole = {name: [one.whole for one in speeds] for name, speeds in found.items()}
    rows = [compare(f"{corpus} texts, {ours}", "texts/s", forward[ours], forward[theirs], theirs) for ours, theirs in against]
    names = ("Danlu bf16", "HF bf16"), ("Danlu int8", "HF bf16")
    return rows + [
        compare(f"{corpus} texts, {ours}, with tokenizer", "texts/s", whole[ours], whole[theirs], theirs) for ours, theirs in names
    ]


if __name__ == "__main__":
    main()
