"""Who holds which slot of the cache, and what lies in those that nobody holds: the prefix cache. Knows numbers, not tensors."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from danlu.serve.engines.torch.sequence import Key, Sequence

MIN_HIT = 16
"""A shorter common prefix is read again: that costs no more than looking for it."""

NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Copy:
    """The first `length` positions of one slot, to be put at the same place in another."""

    source: int
    target: int
    length: int


class Slots:
    """Every sequence holds one slot. A slot given back keeps its tokens until another sequence needs it, the longest unused first."""

    def __init__(self, num_slots: int, *, enable_prefix_caching: bool) -> None:
        self.num_slots, self.enable_prefix_caching = num_slots, enable_prefix_caching
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))
        self.holders: dict[int, Sequence] = {}
        self.left: dict[int, tuple[Key, np.ndarray]] = {}
        """Of free slots: the tokens that lie there, and whose they are."""
        self.queried, self.hit = 0, 0

    def take(self, sequence: Sequence) -> Copy | None:
        """Give the sequence a slot (there must be a free one) and what the cache has of its prompt; the copy that has to be made."""
        source, length = self._longest_prefix(sequence)
        slot = next(iter(self.free))
        if source is not None and source in self.free:
            if 2 * length >= len(self.left[source][1]):
                slot = source  # most of it goes on in the new sequence: no copy, and nothing worth keeping is lost
            else:
                self.free.move_to_end(source)
                slot = next(iter(self.free))
        del self.free[slot]
        self.left.pop(slot, None)
        self.holders[slot] = sequence
        sequence.slot, sequence.num_computed, sequence.num_cached = slot, length, length
        if self.enable_prefix_caching:
            self.queried += sequence.prompt_length
            self.hit += length
        return Copy(source, slot, length) if source is not None and source != slot else None

    def give_back(self, sequence: Sequence) -> None:
        """The slot is free at once, its tokens can be found until it is taken."""
        slot = sequence.slot
        assert slot is not None
        assert self.holders[slot] is sequence, "a slot is given back once"
        del self.holders[slot]
        sequence.slot = None
        self.free[slot] = None
        if self.enable_prefix_caching and sequence.num_computed >= MIN_HIT:
            self.left[slot] = (sequence.key, np.asarray(sequence.tokens[: sequence.num_computed], dtype=np.int64))
        else:
            self.free.move_to_end(slot, last=False)

    def is_being_read(self, sequence: Sequence) -> bool:
        """Whether most of its prompt is just being read for another sequence, as where one prompt has `n` answers: a copy costs less."""
        if not self._looks_up(sequence):
            return False
        wanted = sequence.prompt[:-1]
        best: tuple[int | None, int] = (None, 0)
        for slot, holder in self.holders.items():
            if not holder.is_decoding and holder.key == sequence.key:
                best = _longer(best, slot, holder.prompt, wanted)
        return 2 * best[1] >= len(wanted) and best[1] > self._longest_prefix(sequence)[1]

    def forget(self, key: Key) -> None:
        """Drop what an adapter that is gone has left."""
        self.left = {slot: (owner, tokens) for slot, (owner, tokens) in self.left.items() if owner != key}

    @property
    def usage(self) -> float:
        """Share of the slots that are held, 0 to 1."""
        return len(self.holders) / self.num_slots

    def _looks_up(self, sequence: Sequence) -> bool:
        # Prompt probabilities need the prompt's logits, and so its forward.
        return self.enable_prefix_caching and not sequence.generation.sampling.prompt_logprobs

    def _longest_prefix(self, sequence: Sequence) -> tuple[int | None, int]:
        if not self._looks_up(sequence):
            return None, 0
        wanted = sequence.prompt[:-1]  # the last token's logits are needed: it is always read
        best: tuple[int | None, int] = (None, 0)
        for slot, (key, tokens) in self.left.items():
            best = _longer(best, slot, tokens if key == sequence.key else NOTHING, wanted)
        for slot, holder in self.holders.items():
            best = _longer(best, slot, holder.prompt[: holder.num_computed] if holder.key == sequence.key else NOTHING, wanted)
        return best


def _longer(best: tuple[int | None, int], slot: int, tokens: np.ndarray, wanted: np.ndarray) -> tuple[int | None, int]:
    most = min(len(tokens), len(wanted))
    if most < MIN_HIT or most <= best[1] or tokens[0] != wanted[0]:
        return best
    different = np.flatnonzero(tokens[:most] != wanted[:most])
    length = int(different[0]) if len(different) else most
    return (slot, length) if length > best[1] and length >= MIN_HIT else best
