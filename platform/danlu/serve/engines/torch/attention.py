"""Attention of a step's tokens over the slots of the cache: sequences that make one token each, and pieces of prompts, in one batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from danlu.serve.engines.torch.scheduler import Piece

CALL_CELLS = 512
"""An attention call costs as much as reading this many more cached tokens: where lengths differ by less, sequences share a call."""


@dataclass
class DecodeGroup:
    """Tokens [start, stop) of the batch, one per sequence, whose slots all lie in [first_slot, last_slot]."""

    start: int
    slots: list[int]
    lengths: list[int]
    """Positions each token sees, its own included."""
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + len(self.slots)

    @property
    def span(self) -> int:
        return self.slots[-1] - self.slots[0] + 1

    @property
    def has_gaps(self) -> bool:
        return self.span != len(self.slots)

    def mask(self, window: int | None, query: torch.Tensor) -> torch.Tensor | None:
        """[span, 1, 1, longest], added to the scores; None where every sequence sees all. Made once a step for all layers."""
        if window not in self.masks:
            longest = max(self.lengths)
            lengths = torch.full((self.span, 1), longest)
            lengths[self.places] = torch.tensor(self.lengths)[:, None]
            positions = torch.arange(longest)
            hidden = positions >= lengths
            if window is not None:
                hidden |= positions < lengths - window
            found = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)[:, None, None]
            self.masks[window] = found.to(query.device) if bool(hidden.any()) else None
        return self.masks[window]

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """Where the sequences stand within the span."""
        return torch.tensor([slot - self.slots[0] for slot in self.slots])


@dataclass
class Chunk:
    """Tokens [start, stop) of the batch: a sequence's tokens from position `first` on."""

    start: int
    stop: int
    slot: int
    first: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, groups: int, query: torch.Tensor) -> torch.Tensor:
        """Added to the scores, [groups * tokens, positions]: each token sees what is before it, and itself."""
        if window not in self.masks:
            length = self.stop - self.start
            behind = torch.arange(self.first, self.first + length)[:, None] - torch.arange(self.first + length)
            hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
            mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask.repeat(groups, 1).to(query.device)
        return self.masks[window]


@dataclass(frozen=True)
class Batch:
    """A step's tokens, end to end."""

    input_ids: torch.Tensor
    """int64 [tokens]"""
    position_ids: torch.Tensor
    slots: torch.Tensor
    wanted: torch.Tensor
    """The tokens whose logits are needed."""
    groups: list[DecodeGroup]
    chunks: list[Chunk]


def num_wanted(piece: Piece) -> int:
    """Logits that a piece needs, its last tokens': all where the prompt's probabilities are asked for, else one behind a sequence's end."""
    if piece.start < piece.sequence.prompt_length and piece.sequence.generation.sampling.prompt_logprobs:
        return piece.stop - piece.start
    return 1 + len(piece.draft) if piece.is_last else 0


def make_batch(pieces: Sequence[Piece], *, device: torch.device, all_wanted: bool = False) -> Batch:
    """The batch of a plan's pieces, in their order."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    groups: list[DecodeGroup] = []
    chunks: list[Chunk] = []
    for piece in pieces:
        sequence, start = piece.sequence, len(ids)
        assert sequence.slot is not None
        length = piece.num_tokens
        ids += sequence.tokens[piece.start : piece.stop]
        ids += piece.draft
        positions += range(piece.start, piece.start + length)
        slots += [sequence.slot] * length
        wanted += range(start + length - (length if all_wanted else num_wanted(piece)), start + length)
        if length == 1 and not chunks:
            _group(groups, start, sequence.slot, piece.stop)
        else:
            chunks.append(Chunk(start, start + length, sequence.slot, piece.start))
    input_ids, position_ids, of_slots, of_wanted = (
        torch.tensor(some, dtype=torch.int64).to(device) for some in (ids, positions, slots, wanted)
    )
    return Batch(input_ids, position_ids, of_slots, of_wanted, groups, chunks)


def _group(groups: list[DecodeGroup], start: int, slot: int, length: int) -> None:
    """Put a sequence into the last group, unless a call of its own is cheaper than what the call would read in vain."""
    if groups and groups[-1].slots[-1] < slot:
        last = groups[-1]
        longest = max(*last.lengths, length)
        wider = (slot - last.slots[0] + 1) * longest
        if wider - last.span * max(last.lengths) - length <= CALL_CELLS:
            last.slots.append(slot)
            last.lengths.append(length)
            return
    groups.append(DecodeGroup(start, [slot], [length]))


def attend(
    layer: tuple[torch.Tensor, torch.Tensor],
    batch: Batch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Write the step's keys and values, then let each token see what is before it in its own slot.

    query: [tokens, heads, dim]; key, value: [tokens, kv heads, dim]; returns [tokens, heads, value dim]. The query heads that share a
    key-value head go as further rows of it: no copy of keys and values, and none of enable_gqa, which is four times slower in bf16 on CPU.
    """
    keys, values = layer
    _write(keys, key, batch)
    _write(values, value, batch)
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    out = query.new_empty(tokens, heads, value.shape[2])
    query = query.reshape(tokens, kv_heads, heads // kv_heads, dim)
    for group in batch.groups:
        first, longest = group.slots[0], max(group.lengths)
        lowest = 0 if window is None else max(0, min(group.lengths) - window)
        mask = group.mask(window, query)
        some = query[group.start : group.stop]
        if group.has_gaps:
            some = some.new_zeros(group.span, *some.shape[1:]).index_copy_(0, group.places.to(some.device), some)
        seen = slice(first, first + group.span), slice(None), slice(lowest, longest)
        found = _attention(some, keys[seen], values[seen], None if mask is None else mask[..., lowest:], scale, softcap)
        if group.has_gaps:
            found = found[group.places.to(found.device)]
        out[group.start : group.stop] = found.reshape(len(group.slots), heads, -1)
    for chunk in batch.chunks:
        last, length = chunk.first + chunk.stop - chunk.start, chunk.stop - chunk.start
        lowest = 0 if window is None else max(0, chunk.first + 1 - window)
        # [1, kv heads, groups * tokens, dim]
        some = query[chunk.start : chunk.stop].permute(1, 2, 0, 3).reshape(1, kv_heads, -1, dim)
        mask = chunk.mask(window, heads // kv_heads, query)[:, lowest:]
        seen = slice(chunk.slot, chunk.slot + 1), slice(None), slice(lowest, last)
        found = _attention(some, keys[seen], values[seen], mask, scale, softcap)
        out[chunk.start : chunk.stop] = found.view(kv_heads, -1, length, found.shape[-1]).permute(2, 0, 1, 3).reshape(length, heads, -1)
    return out


def _write(cached: torch.Tensor, new: torch.Tensor, batch: Batch) -> None:
    decoded = batch.chunks[0].start if batch.chunks else len(new)
    if decoded:
        cached[batch.slots[:decoded], :, batch.position_ids[:decoded]] = new[:decoded]
    for chunk in batch.chunks:
        cached[chunk.slot, :, chunk.first : chunk.first + chunk.stop - chunk.start] = new[chunk.start : chunk.stop].transpose(0, 1)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None, softcap: float | None
) -> torch.Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
