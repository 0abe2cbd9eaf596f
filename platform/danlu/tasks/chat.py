"""Supervised fine-tuning on conversations: a decoder learns what the assistant says. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from danlu.data.columns import Labelled
from danlu.data.conversations import BadRow, Conversation, Kept, detect, keep, reader, records
from danlu.data.encode import NO_TARGET, Encoded
from danlu.data.formats import Rows
from danlu.data.pack import Packed
from danlu.data.rendering import Rendered, need_chat_template, render, show, special_ids, tokenise, tokenise_plain
from danlu.data.report import data_report
from danlu.data.split import random_split
from danlu.spec.data import Data
from danlu.spec.task import Chat, Task
from danlu.tasks import pretrain
from danlu.tasks.rows import Split, Splits, metrics_line, read_given, read_splits

NAMES = {
    "messages": "OpenAI messages",
    "sharegpt": "sharegpt conversations",
    "alpaca": "alpaca instructions",
    "prompt_completion": "prompts and completions",
    "text": "plain texts",
}

PER_TOKEN = False

# rows


def splits(data: Data, task: Chat, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split, render and tokenise; DataError for what could not be learned from."""
    rows = read_splits(data)
    read = {name: _conversations(table, task, f"data.{name}") for name, table in rows.items()}
    if "dev" not in read:
        # Whole conversations are held out, also where each turn is a row of its own.
        train, dev = random_split(len(read["train"].items), data.dev_size, seed)
        rows["dev"], read["dev"] = rows["train"], _take(read["train"], dev, dropped=False)
        read["train"] = _take(read["train"], train, dropped=True)
    made: dict[str, Split] = {}
    notes: list[str] = []
    for name in ("train", "dev", "test"):
        if name in read:
            split, kept = _encoded(read[name], rows[name], task, tokenizer, data, max_length, f"data.{name}")
            made[name] = split
            notes += [*_said(rows[name], split, task, name), *kept.notes(name), *_unended(split.encoded, tokenizer, name)]
    report = data_report(
        {name: (split.texts, split.encoded) for name, split in made.items()},
        {name: rows[name] for name in made},
        max_length=max_length,
        notes=notes,
        example=show(made["train"].encoded, 0, tokenizer),
    )
    return Splits(made["train"], made["dev"], made.get("test"), [], report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: Chat,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Conversations of other files than the job's."""
    rows = read_given(source, data)
    return _encoded(_conversations(rows, task, "--data"), rows, task, tokenizer, data, max_length, "--data")[0]


def _conversations(rows: Rows, task: Chat, where: str) -> Kept[Conversation]:
    row_format = detect(rows, where=where) if task.row_format == "auto" else task.row_format
    return keep(records(rows), reader(row_format), where=where)


def _take(kept: Kept[Conversation], rows: np.ndarray, *, dropped: bool) -> Kept[Conversation]:
    items, numbers = [kept.items[int(i)] for i in rows], [kept.row_numbers[int(i)] for i in rows]
    return Kept(items, numbers, kept.dropped, kept.first_dropped) if dropped else Kept(items, numbers)


def _encoded(
    read: Kept[Conversation], rows: Rows, task: Chat, tokenizer: PreTrainedTokenizerBase, data: Data, max_length: int, where: str
) -> tuple[Split, Kept[int]]:
    plain = read.items[0].text is not None
    if not plain:
        need_chat_template(tokenizer)

    def rendered(one: tuple[Conversation, int]) -> list[tuple[Conversation, Rendered]]:
        return [(one[0], text) for text in render(one[0], tokenizer, task.assistant_turns)]

    numbered = zip(read.row_numbers, zip(read.items, read.row_numbers, strict=True), strict=True)
    texts = keep(numbered, rendered, where=where, before=read)
    whole = [text for _, text in texts.items]
    if plain:
        encoded = tokenise_plain([one.text for one in whole], tokenizer, max_length=max_length)
    else:
        encoded = tokenise(whole, tokenizer, max_length=max_length, cache_dir=data.cache_dir)

    def has_targets(index: int) -> list[int]:
        if (encoded.row_labels(index) != NO_TARGET).any():
            return [index]
        if encoded.truncated[index]:
            raise BadRow(f"nothing that the assistant says is within model.max_length={max_length} tokens")
        raise BadRow("the prompt makes other tokens alone than with the answer behind it, so a server would not see what was trained")

    kept = keep(zip(texts.row_numbers, range(len(whole)), strict=True), has_targets, where=where, before=texts)
    chosen = {_name(rows, task): _column(rows)}
    table = Labelled([whole[i].text for i in kept.items], None, None, kept.row_numbers, chosen)
    return Split(encoded.take(kept.items), None, table, conversations=[texts.items[i][0] for i in kept.items]), kept


def _name(rows: Rows, task: Chat) -> str:
    return NAMES[detect(rows, where="") if task.row_format == "auto" else task.row_format]


def _column(rows: Rows) -> str:
    usual = ("messages", "conversations", "conversation", "instruction", "prompt", "text")
    return next((name for name in usual if name in rows.columns), next(iter(rows.columns)))


def _said(rows: Rows, split: Split, task: Chat, name: str) -> list[str]:
    if split.encoded.token_labels is None:
        return []
    learned = int((split.encoded.token_labels != NO_TARGET).sum())
    share = learned / len(split.encoded.input_ids)
    lost = int(split.encoded.truncated.sum())
    cut = f"; {lost} longer rows cut at their end, the end of their last turn with it" if lost else ""
    what = "turns of the assistant" if _name(rows, task) != NAMES["text"] else "texts"
    turns = {"all": f"all {what}", "last": f"the last of the {what}", "each": f"each of the {what} as a row"}[task.assistant_turns]
    return [f"{name}: {_name(rows, task)}; learned: {turns}, {learned:,} tokens ({share:.0%}){cut}"]


def _unended(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    if name != "train" or end_of_turn_ids(encoded, tokenizer):
        return []
    return [f"{name}: no turn ends in a special token, so the model does not learn where to stop"]


def end_of_turn_ids(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that end what is learned, the most frequent first: a server has to stop at them."""
    assert encoded.token_labels is not None
    counts: Counter[int] = Counter()
    for start in range(0, len(encoded.token_labels), 1 << 20):  # they may be a file's
        labels = encoded.token_labels[start : start + (1 << 20)]
        following = encoded.token_labels[start + 1 : start + len(labels) + 1]
        last = (labels != NO_TARGET) & (np.append(following, NO_TARGET)[: len(labels)] == NO_TARGET)
        counts.update(labels[last].tolist())
    special = special_ids(tokenizer)
    return [token for token, _ in counts.most_common() if token in special]


# model: the decoder of pretrain

build_model, skeleton, head_parameters, wrap = pretrain.build_model, pretrain.skeleton, pretrain.head_parameters, pretrain.wrap


# loss


def loss(model: nn.Module, batch: Packed, task: Task) -> torch.Tensor:
    """Sum of the losses of a batch's learned tokens."""
    summed: torch.Tensor = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, None, batch.labels).sum()
    return summed


def num_targets(batch: Packed) -> int:
    """The tokens that the assistant says."""
    assert batch.labels is not None
    return int((batch.labels != NO_TARGET).sum())


# metrics


@dataclass(frozen=True)
class ChatScores:
    """`loss` is nats a learned token; `token_accuracy` the share of them that are the most probable one, given what is before them."""

    loss: float
    token_accuracy: float
    num_tokens: int
    num_rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {"loss": self.loss, "perplexity": self.perplexity, "token_accuracy": self.token_accuracy}

    def text(self) -> str:
        """For the terminal."""
        return metrics_line(self)


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Each row's summed loss, hits and number of targets, float32 [rows, 3]."""
    assert batch.labels is not None
    found: torch.Tensor = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, None, batch.labels, True)
    lengths = batch.cu_seqlens.diff().tolist()
    counts = torch.stack([(piece != NO_TARGET).sum() for piece in torch.split(batch.labels, lengths)])
    return torch.cat([found.float(), counts[:, None].to(found.device, torch.float32)], dim=1)


def scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: Task) -> ChatScores:
    """Scores over all learned tokens of rows' outputs (float [rows, 3])."""
    total, hits, tokens = outputs.astype(np.float64).sum(axis=0)
    return ChatScores(float(total / tokens), float(hits / tokens), int(tokens), len(outputs))
