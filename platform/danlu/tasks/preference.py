"""Preference optimisation: answers made likelier than others. DPO, IPO, ORPO and KTO. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from danlu.data.columns import Labelled
from danlu.data.conversations import BadRow, Kept, keep
from danlu.data.encode import NO_TARGET, encoded_rows
from danlu.data.formats import Rows
from danlu.data.pack import Packed
from danlu.data.preferences import Pair, read_judged, read_pairs
from danlu.data.rendering import Rendered, need_chat_template, render, show, tokenise
from danlu.data.report import data_report
from danlu.data.split import random_split, stratified_split
from danlu.spec.data import Data
from danlu.spec.task import Dpo, Ipo, Kto, Orpo, Preference
from danlu.tasks import pretrain
from danlu.tasks.rows import Split, Splits, hold_out, metrics_line, read_given, read_splits

PER_TOKEN = False

# rows


def splits(data: Data, task: Preference, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split, render and tokenise; DataError for what could not be learned from."""
    need_chat_template(tokenizer)
    made: dict[str, Split] = {}
    tables = read_splits(data)
    notes = []
    for name, table in tables.items():
        made[name], kept, told = _encoded(table, task, tokenizer, data, max_length, f"data.{name}")
        notes += [f"{name}: {told}", *kept.notes(name)]
    if "dev" not in made:
        if isinstance(task.loss, Kto):
            train_rows, dev_rows = stratified_split(_desirable(made["train"]).astype(np.int64), data.dev_size, seed)
        else:
            train_rows, dev_rows = random_split(len(made["train"]), data.dev_size, seed)
        made, tables["dev"] = hold_out(made, train_rows, dev_rows), tables["train"]
    report = data_report(
        {name: (split.texts, split.encoded) for name, split in made.items()},
        tables,
        max_length=max_length,
        notes=notes,
        example=show(made["train"].encoded, 0, tokenizer),
    )
    return Splits(made["train"], made["dev"], made.get("test"), [], report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: Preference,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Pairs of other files than the job's."""
    rows = read_given(source, data)
    return _encoded(rows, task, tokenizer, data, max_length, "--data")[0]


OTHER, DESIRABLE = 1, 2
"""Token types: of a row's second conversation, and of a desirable answer's; 0 is a chosen or an undesirable one's."""


def _encoded(
    rows: Rows, task: Preference, tokenizer: PreTrainedTokenizerBase, data: Data, max_length: int, where: str
) -> tuple[Split, Kept[int], str]:
    """A row holds the chosen conversation, then the rejected one, told apart by its token types; of KTO a conversation, then its prompt
    with the answer to another one. Also what the rows were read as."""
    judged = isinstance(task.loss, Kto)
    read, told = (read_judged if judged else read_pairs)(rows, where=where)
    sides_are = ("", "other prompt's") if judged else ("chosen", "rejected")

    def rendered(pair: Pair) -> list[tuple[Pair, Rendered, Rendered]]:
        return [(pair, render(pair.chosen, tokenizer, "all")[0], render(pair.rejected, tokenizer, "all")[0])]

    texts = keep(zip(read.row_numbers, read.items, strict=True), rendered, where=where, before=read)
    written = ([item[1] for item in texts.items], [item[2] for item in texts.items])
    sides = [tokenise(side, tokenizer, max_length=max_length, cache_dir=data.cache_dir) for side in written]

    def has_targets(index: int) -> list[int]:
        for side, name in zip(sides, sides_are, strict=True):
            if not (side.row_labels(index) != NO_TARGET).any():
                why = f"is not within model.max_length={max_length} tokens" if side.truncated[index] else "makes other tokens than alone"
                raise BadRow(f"the {name} answer {why}".replace("  ", " "))
        return [index]

    kept = keep(zip(texts.row_numbers, range(len(texts.items)), strict=True), has_targets, where=where, before=texts)
    encoded = encoded_rows(
        [np.concatenate([side.row(i) for side in sides]) for i in kept.items],
        [bool(sides[0].truncated[i] or sides[1].truncated[i]) for i in kept.items],
        token_types=[
            np.repeat([DESIRABLE if texts.items[i][0].desirable else 0, OTHER], [side.lengths[i] for side in sides]) for i in kept.items
        ],
        token_labels=[np.concatenate([side.row_labels(i) for side in sides]) for i in kept.items],
    )
    columns = {role: name for role in ("chosen", "rejected", "preferred_output", "non_preferred_output") if (name := role) in rows.columns}
    chosen, rejected = ([side[i].text for i in kept.items] for side in written)
    labels = ["desirable" if texts.items[i][0].desirable else "undesirable" for i in kept.items] if judged else None
    table = Labelled(chosen, None if judged else rejected, labels, kept.row_numbers, columns)
    return Split(encoded, None, table, conversations=[texts.items[i][0].chosen for i in kept.items]), kept, told


def _desirable(split: Split) -> np.ndarray:
    """Of KTO's rows, bool [rows]."""
    assert split.encoded.token_type_ids is not None
    found: np.ndarray = split.encoded.token_type_ids[split.encoded.bounds[:-1]] == DESIRABLE
    return found


def relative_to_start(data: Splits, outputs: Callable[[Split], np.ndarray]) -> Splits:
    """The splits with what the start model thinks of them; `outputs` is its `row_outputs` of a split."""
    return replace(data, train=with_reference(data.train, outputs), dev=with_reference(data.dev, outputs))


def with_reference(split: Split, outputs: Callable[[Split], np.ndarray]) -> Split:
    """A split with the start model's log probabilities of each row's two answers."""
    return replace(split, reference=np.ascontiguousarray(outputs(split)[:, :2]))


# model: the decoder of pretrain

build_model, skeleton, head_parameters, wrap = pretrain.build_model, pretrain.skeleton, pretrain.head_parameters, pretrain.wrap


# loss


def loss(model: nn.Module, batch: Packed, task: Preference) -> torch.Tensor:
    """Sum of the losses of a batch's rows."""
    logps, counts = answers_logps(model, batch)
    if isinstance(task.loss, Kto):
        assert batch.token_type_ids is not None
        desirable = batch.token_type_ids[batch.cu_seqlens[:-1].to(batch.token_type_ids.device, torch.int64)] == DESIRABLE
        return kto_losses(logps, batch.reference, desirable, task.loss).sum()
    return pair_losses(logps, counts, batch.reference, task).sum()


def num_targets(batch: Packed) -> int:
    """One a row."""
    return batch.num_rows


def answers_logps(model: nn.Module, batch: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities of the answers, summed over their tokens, and how many tokens those are: float32 [rows, 2], chosen first."""
    assert batch.token_type_ids is not None
    assert batch.labels is not None
    lengths = batch.cu_seqlens.diff().to(torch.int64)
    types = batch.token_type_ids.cpu()
    rejected = torch.stack([(piece == OTHER).sum() for piece in torch.split(types, lengths.tolist())])
    # Each answer is a row of its own, which sees nothing of the other.
    parts = torch.stack([lengths - rejected, rejected], dim=1).flatten()
    cu_seqlens = torch.cat([parts.new_zeros(1), parts.cumsum(0)]).to(torch.int32)
    positions = torch.arange(batch.num_tokens) - torch.repeat_interleave(cu_seqlens[:-1].to(torch.int64), parts)
    losses = model(batch.input_ids, positions.to(batch.input_ids.device), cu_seqlens, None, batch.labels)
    counts = torch.stack([(piece != NO_TARGET).sum() for piece in torch.split(batch.labels, parts.tolist())])
    return -losses.float().view(-1, 2), counts.view(-1, 2).float()


def pair_losses(logps: torch.Tensor, counts: torch.Tensor, reference: torch.Tensor | None, task: Preference) -> torch.Tensor:
    """Each pair's loss, [rows]; all arguments are [rows, 2], chosen first. `reference`: the start model's log probabilities."""
    match task.loss:
        case Dpo() as dpo:
            assert reference is not None, "DPO is relative to the start model"
            margin = dpo.beta * ((logps - reference)[:, 0] - (logps - reference)[:, 1])
            likely, unlikely = nn.functional.logsigmoid(margin), nn.functional.logsigmoid(-margin)
            return -(1 - dpo.label_smoothing) * likely - dpo.label_smoothing * unlikely
        case Ipo() as ipo:
            assert reference is not None, "IPO is relative to the start model"
            mean = (logps - reference) / counts
            return (mean[:, 0] - mean[:, 1] - 1 / (2 * ipo.beta)) ** 2
        case Orpo() as orpo:
            mean = logps / counts
            log_odds = mean - torch.log1p(-torch.exp(mean.clamp(max=-1e-6)))
            return -mean[:, 0] - orpo.beta * nn.functional.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
        case Kto():
            raise AssertionError("KTO has no pairs")


def kto_losses(logps: torch.Tensor, reference: torch.Tensor | None, desirable: torch.Tensor, kto: Kto) -> torch.Tensor:
    """Each answer's loss, [rows]; `logps` and the start model's `reference` are [rows, 2], the answer's before the other prompt's one's."""
    assert reference is not None, "KTO is relative to the start model"
    ratio, divergence = (logps - reference)[:, 0], kl_divergence(logps, reference)
    gain = 1 - torch.sigmoid(kto.beta * (ratio - divergence))
    loss_ = 1 - torch.sigmoid(kto.beta * (divergence - ratio))
    return torch.where(desirable.to(ratio.device), kto.desirable_weight * gain, kto.undesirable_weight * loss_)


def kl_divergence(logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How far the model is from its start, estimated from prompts with other prompts' answers; nothing is learned from it."""
    return (logps - reference)[:, 1].mean().detach().clamp(min=0)


# metrics


@dataclass(frozen=True)
class PreferenceScores:
    """`reward_accuracy`: share of pairs whose chosen answer has the higher reward; of KTO, of answers whose reward is on their side of the
    model's divergence from its start. Rewards are beta times the log probability beyond the start model's (DPO, KTO: of the answer; IPO:
    a token) or, without one (ORPO), beta times the mean log probability of a token. KTO's chosen are the desirable ones; where there are
    none of a kind, its reward and the margin are 0."""

    loss: float
    reward_accuracy: float
    reward_margin: float
    reward_chosen: float
    reward_rejected: float
    num_rows: int

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {
            "reward_accuracy": self.reward_accuracy,
            "loss": self.loss,
            "reward_margin": self.reward_margin,
            "reward_chosen": self.reward_chosen,
            "reward_rejected": self.reward_rejected,
        }

    def text(self) -> str:
        """For the terminal."""
        return metrics_line(self)


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Log probabilities, numbers of tokens and the start model's log probabilities, chosen before rejected: float32 [rows, 6]."""
    logps, counts = answers_logps(model, batch)
    reference = torch.zeros_like(logps) if batch.reference is None else batch.reference.to(logps.device)
    return torch.cat([logps, counts.to(logps.device), reference], dim=1)


def scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: Preference) -> PreferenceScores:
    """Scores of rows' outputs (float [rows, 6])."""
    logps, counts, reference = (torch.from_numpy(part).double() for part in np.split(outputs, 3, axis=1))
    if isinstance(task.loss, Kto):
        return _kto_scores(logps, reference, torch.from_numpy(_desirable(split)), task.loss)
    losses = pair_losses(logps, counts, reference, task)
    match task.loss:
        case Dpo():
            rewards = task.loss.beta * (logps - reference)
        case Ipo():
            rewards = task.loss.beta * (logps - reference) / counts
        case Orpo():
            rewards = task.loss.beta * logps / counts
    chosen, rejected = rewards.unbind(1)
    return PreferenceScores(
        loss=float(losses.mean()),
        reward_accuracy=float((chosen > rejected).double().mean()),
        reward_margin=float((chosen - rejected).mean()),
        reward_chosen=float(chosen.mean()),
        reward_rejected=float(rejected.mean()),
        num_rows=len(outputs),
    )


def _kto_scores(logps: torch.Tensor, reference: torch.Tensor, desirable: torch.Tensor, kto: Kto) -> PreferenceScores:
    rewards = kto.beta * (logps - reference)[:, 0]
    border = kto.beta * kl_divergence(logps, reference)
    chosen, rejected = (float(some.mean()) if len(some) else 0.0 for some in (rewards[desirable], rewards[~desirable]))
    return PreferenceScores(
        loss=float(kto_losses(logps, reference, desirable, kto).mean()),
        reward_accuracy=float(torch.where(desirable, rewards > border, rewards < border).double().mean()),
        reward_margin=chosen - rejected if desirable.any() and not desirable.all() else 0.0,
        reward_chosen=chosen,
        reward_rejected=rejected,
        num_rows=len(rewards),
    )
