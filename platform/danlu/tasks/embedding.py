"""Embeddings: a vector per text, near those of the texts that belong to it. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import Labelled, as_text, choose, enough
from danlu.data.encode import Encoded, encode, encoded_rows, ends
from danlu.data.formats import Rows
from danlu.data.pack import Packed
from danlu.data.report import data_report
from danlu.data.split import random_split
from danlu.spec.data import Columns, Data
from danlu.spec.task import Embed
from danlu.tasks.encoder import build_encoder, encoder_skeleton
from danlu.tasks.exchange import BadExample, Embedding, Text, TokenIds
from danlu.tasks.packed import PackedEmbedder, inputs
from danlu.tasks.rows import Split, Splits, hold_out, metrics_line, read_given, read_splits

PER_TOKEN = False
USUAL = {
    "text": ("anchor", "query", "question", "sentence1", "text", "premise"),
    "positive": ("positive", "pos", "document", "passage", "answer", "sentence2", "text_pair", "hypothesis"),
    "negative": ("negative", "neg", "negatives", "hard_negative", "hard_negatives"),
}
QUERIES_AT_ONCE = 256

# rows


def splits(data: Data, task: Embed, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split and tokenise; raises DataError for anything that could not be learned from. A row is a text, one that belongs to
    it, and those that do not."""
    rows = read_splits(data)
    made = {name: _split(table, data, tokenizer, max_length, f"data.{name}") for name, table in rows.items()}
    report = data_report({name: (split.texts, split.encoded) for name, split in made.items()}, rows, max_length=max_length)
    if "dev" not in made:
        made = hold_out(made, *random_split(len(made["train"]), data.dev_size, seed))
    return Splits(made["train"], made["dev"], made.get("test"), [], report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: Embed,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Rows of other files than the job's."""
    return _split(read_given(source, data), data, tokenizer, max_length, "--data")


def encode_examples(
    examples: Sequence[Text | TokenIds],
    tokenizer: PreTrainedTokenizerBase,
    task: Embed,
    *,
    max_length: int,
    cache_dir: str | Path | None = None,
) -> Encoded:
    """Token ids of single texts, cut to max_length; ids as they are, BadExample for those that this model does not read."""
    texts = [one.text for one in examples if isinstance(one, Text)]
    encoded = encode(texts, None, tokenizer, max_length=max_length, cache_dir=cache_dir)
    if len(texts) == len(examples):
        return encoded
    of_text, rows, truncated = iter(range(len(encoded))), list[np.ndarray](), list[bool]()
    for i, one in enumerate(examples):
        if isinstance(one, TokenIds):
            _check_ids(one.ids, "input" if len(examples) == 1 else f"input[{i}]", len(tokenizer), max_length)
            rows.append(np.asarray(one.ids, dtype=np.int32))
            truncated.append(False)
        else:
            at = next(of_text)
            rows.append(encoded.row(at))
            truncated.append(bool(encoded.truncated[at]))
    return encoded_rows(rows, truncated)


def _check_ids(ids: Sequence[int], where: str, vocabulary: int, max_length: int) -> None:
    if len(ids) > max_length:
        told = f"`{where}` has {len(ids)} tokens; this model reads {max_length} at most"
        raise BadExample(told, where, f"{max_length} or fewer; or the text, which is cut")
    if (wrong := next((one for one in ids if not 0 <= one < vocabulary), None)) is not None:
        fix = f"ids of this model's own tokenizer, 0 to {vocabulary - 1}; or the text (LangChain: check_embedding_ctx_length=False)"
        raise BadExample(f"`{where}` has the token id {wrong}, and the vocabulary {vocabulary} tokens", where, fix)


def _split(rows: Rows, data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str) -> Split:
    groups, texts = _read(rows, data.columns, where)
    flat = [text for group in groups for text in group]
    encoded = encode(flat, None, tokenizer, max_length=max_length, cache_dir=data.cache_dir)
    bounds = ends([len(group) for group in groups])
    truncated = np.asarray([encoded.truncated[a:b].any() for a, b in pairwise(bounds)], dtype=bool)
    return Split(replace(encoded, groups=bounds, truncated=truncated), None, texts, [Text(group[0]) for group in groups])


def _read(rows: Rows, columns: Columns, where: str) -> tuple[list[list[str]], Labelled]:
    """Each row as its text, one that belongs to it and those that do not; a row with several that do is several."""
    chosen = choose(rows, columns, USUAL, ("text", "positive"), where)
    negatives = rows.columns[chosen["negative"]] if "negative" in chosen else [None] * len(rows)
    groups: list[list[str]] = []
    numbers: list[int] = []
    dropped: Counter[str] = Counter()
    table = zip(rows.columns[chosen["text"]], rows.columns[chosen["positive"]], negatives, strict=True)
    for number, (anchor, positive, negative) in enumerate(table, 1):
        text, near, far = as_text(anchor), _listed(positive), _listed(negative)
        if not text.strip() or not near:
            dropped["rows without a text or one that belongs to it"] += 1
            continue
        groups += [[text, one, *far] for one in near]
        numbers += [number] * len(near)
    enough(groups, dropped, chosen, where)
    texts = Labelled(
        [group[0] for group in groups], ["\n".join(group[1:]) for group in groups], None, numbers, chosen, dropped=dict(dropped)
    )
    return groups, texts


def _listed(value: object) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [text for one in values if (text := as_text(one)).strip()]


# model


def build_model(
    folder: str | Path, label_names: Sequence[str], *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder in float32, without a head; `quantization` holds its linear layers in fewer bits."""
    model = build_encoder(AutoModel, folder, {}, dropout=dropout, quantization=quantization)
    for name, parameter in model.named_parameters():
        if name.startswith("pooler."):  # not used: its place is taken by `pooling`
            parameter.requires_grad_(False)
    return model


def skeleton(folder: str | Path, num_labels: int) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    return encoder_skeleton(AutoModel, folder, {})


def head_parameters(model: PreTrainedModel) -> set[str]:
    """None: all that is used is pretrained."""
    return set()


def wrap(model: PreTrainedModel, task: Embed, *, packed: bool | None = None) -> PackedEmbedder:
    """The model as the loop calls it; `packed` as PackedEncoder has it."""
    return PackedEmbedder(model, pooling=task.pooling, packed=packed)


# loss


def loss(model: nn.Module, batch: Packed, task: Embed) -> torch.Tensor:
    """Sum over rows of InfoNCE: the cross-entropy of finding the text that belongs to a row's among all others of the micro-batch but the
    rows' own."""
    assert batch.groups is not None
    vectors = row_outputs(model, batch).float()
    first = batch.groups[:-1].to(vectors.device)
    others = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
    others[first] = False
    cosines = vectors[first] @ vectors[others].T / task.temperature
    return nn.functional.cross_entropy(cosines, first - torch.arange(len(first), device=first.device), reduction="sum")


def num_targets(batch: Packed) -> int:
    """One a row."""
    return batch.num_rows


# metrics


@dataclass(frozen=True)
class RetrievalScores:
    """Each text's search among all texts of the split that belong to any: the share of its own that are found in the first places, the
    mean of 1 / the first one's place, and nDCG."""

    ndcg_at_10: float
    mrr: float
    recall_at_1: float
    recall_at_10: float
    num_rows: int
    num_documents: int

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {name: getattr(self, name) for name in ("ndcg_at_10", "mrr", "recall_at_1", "recall_at_10")}

    def text(self) -> str:
        """For the terminal."""
        return f"{metrics_line(self)}   documents {self.num_documents}"


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Vectors of length 1, [texts of all rows, hidden]."""
    found: torch.Tensor = model(*inputs(batch))
    return found


def scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: Embed) -> RetrievalScores:
    """Score vectors (float [texts of all rows, hidden]): each distinct text once, as what is searched for and as what is found."""
    encoded = split.encoded
    assert encoded.groups is not None
    flat = encoded.sequences
    keys = [flat.row(i).tobytes() for i in range(len(flat))]
    firsts = set(encoded.groups[:-1].tolist())
    documents = list({keys[i]: i for i in range(len(keys) - 1, -1, -1) if i not in firsts}.values())
    place = {keys[i]: number for number, i in enumerate(documents)}
    wanted: dict[bytes, set[int]] = {}
    queries: dict[bytes, int] = {}
    for first in encoded.groups[:-1]:
        queries.setdefault(keys[first], int(first))
        wanted.setdefault(keys[first], set()).add(place[keys[first + 1]])
    ranks: list[np.ndarray] = []
    found, asked = outputs[documents], list(queries.items())
    for start in range(0, len(asked), QUERIES_AT_ONCE):
        some = asked[start : start + QUERIES_AT_ONCE]
        order = np.argsort(-(outputs[[at for _, at in some]] @ found.T), axis=1, kind="stable")
        places = np.argsort(order, axis=1)
        ranks += [np.sort(places[i, sorted(wanted[key])]) for i, (key, _) in enumerate(some)]
    return RetrievalScores(
        ndcg_at_10=float(np.mean([_ndcg(rank, 10) for rank in ranks])),
        mrr=float(np.mean([1 / (rank[0] + 1) for rank in ranks])),
        recall_at_1=float(np.mean([(rank < 1).mean() for rank in ranks])),
        recall_at_10=float(np.mean([(rank < 10).mean() for rank in ranks])),
        num_rows=len(ranks),
        num_documents=len(documents),
    )


def _ndcg(ranks: np.ndarray, k: int) -> float:
    """Of what is wanted, standing at `ranks` (from 0): https://doi.org/10.1145/582415.582418, gains of 1."""
    best = 1 / np.log2(np.arange(min(len(ranks), k)) + 2)
    return float((1 / np.log2(ranks[ranks < k] + 2)).sum() / best.sum())


# prediction


def predictions(
    outputs: np.ndarray, encoded: Encoded, examples: Sequence[Text], label_names: Sequence[str], task: Embed
) -> list[Embedding]:
    """The vector of each row's first text."""
    firsts = np.arange(len(encoded)) if encoded.groups is None else encoded.groups[:-1]
    return [Embedding("", row.tolist()) for row in outputs[firsts].astype(np.float64)]


__all__ = [
    "PER_TOKEN", "RetrievalScores", "build_model", "encode_examples", "given_split", "head_parameters", "loss", "num_targets",
    "predictions", "row_outputs", "scores", "skeleton", "splits", "wrap",
]  # fmt: skip
