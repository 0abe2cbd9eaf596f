"""A smaller model that guesses the running sequences' next tokens, all in one batch (draft.py says what becomes of a guess).

What it has read of a sequence lies in a cache of its own, in the slot of the same number, and is found there by comparing tokens: a guess
that was wrong, a slot that was given to another sequence, a prefix that was copied need no word to it. It reads a text when the first
guess is wanted, in pieces, so no first token waits for it, and what is never guessed costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, replace

import torch

from danlu.serve.engines.torch.attention import make_batch
from danlu.serve.engines.torch.cache import Cache
from danlu.serve.engines.torch.draft import Asked
from danlu.serve.engines.torch.forward import Forward
from danlu.serve.engines.torch.scheduler import Piece
from danlu.serve.engines.torch.sequence import Sequence
from danlu.serve.engines.torch.slots import Copy
from danlu.serve.generation import Generation


@dataclass
class Held:
    """What lies in a slot of the draft's cache."""

    own: Sequence
    """The owner's tokens, and behind them those that were guessed."""
    owner: Sequence | None
    num_sure: int
    """Tokens that are known to be the owner's."""


class DraftModel:
    """Guesses what the draft finds most probable. An adapter's sequences get the base draft's guesses too."""

    def __init__(
        self, forward: Forward, cache: Cache, device: torch.device, *, vocab_size: int, num_target_tokens: int, chunk: int
    ) -> None:
        self.forward, self.cache, self.device = forward, cache, device
        self.vocab_size, self.num_target_tokens, self.chunk = vocab_size, num_target_tokens, chunk
        self.slots: dict[int, Held] = {}

    def copy(self, copies: Several[Copy]) -> None:
        """What the target's cache copies, as far as the draft has read it."""
        for one in copies:
            source = self.slots.get(one.source)
            length = 0 if source is None else min(one.length, source.own.num_computed)
            if source is not None and length:
                self.cache.copy([replace(one, length=length)])
                self.slots[one.target] = Held(_sequence(one.target, source.own.tokens[:length], length), None, 0)

    def guess(self, asked: Asked) -> list[Several[int]]:
        """Of each sequence so many tokens at most, and one more than were right the last time. None while it keeps quiet, and none before
        the draft has read what there is: a step reads `chunk` tokens of it."""
        guessed: list[list[int]] = [[] for _ in asked]
        most = [0 if one.drafter.is_quiet(one.tokens) else min(number, _worth(one)) for one, number in asked]
        followed = [(i, self._follow(one)) for i, (one, _) in enumerate(asked) if most[i] > 0]
        room, pieces = self.chunk, []
        for i, own in sorted(followed, key=lambda one: len(one[1].tokens) - one[1].num_computed):
            stop = min(len(own.tokens), own.num_computed + room)
            # The rows of the two models may be padded to different numbers.
            if stop > own.num_computed and max(own.tokens[own.num_computed : stop]) < self.vocab_size:
                pieces.append((i, Piece(own, own.num_computed, stop)))
                room -= stop - own.num_computed
        while pieces:
            pieces = [(i, piece) for i, piece in self._read(pieces, guessed) if len(guessed[i]) < most[i]]
        return list(guessed)

    def _follow(self, sequence: Sequence) -> Sequence:
        """The slot's tokens, made the sequence's, of which as many are computed as were the same; the last one never is."""
        assert sequence.slot is not None
        held = self.slots.get(sequence.slot) or Held(_sequence(sequence.slot, [], 0), None, 0)
        own, tokens = held.own, sequence.tokens
        same = min(held.num_sure, own.num_computed) if held.owner is sequence else 0
        while same < min(own.num_computed, len(tokens)) and own.tokens[same] == tokens[same]:
            same += 1
        own.tokens[same:] = tokens[same:]
        own.num_computed = min(same, len(tokens) - 1)
        self.slots[sequence.slot] = Held(own, sequence, len(tokens))
        return own

    def _read(self, pieces: list[tuple[int, Piece]], guessed: list[list[int]]) -> list[tuple[int, Piece]]:
        """A forward, a guess behind each sequence that is read to its end, and the pieces with which these go on."""
        pieces.sort(key=lambda one: (one[1].num_tokens > 1, one[1].sequence.slot))
        logits = self.forward(make_batch([piece for _, piece in pieces], device=self.device), self.cache)
        last = [(i, piece) for i, piece in pieces if piece.is_last]
        following = []
        for _, piece in pieces:
            piece.sequence.num_computed = piece.stop
        for (i, piece), token in zip(last, logits[:, : self.num_target_tokens].argmax(-1).tolist(), strict=True):
            piece.sequence.tokens.append(token)
            guessed[i].append(token)
            following.append((i, Piece(piece.sequence, piece.stop, piece.stop + 1)))
        return following


def _sequence(slot: int, tokens: list[int], num_computed: int) -> Sequence:
    made = Sequence(Generation("draft", ()), tokens, 1, slot=slot)
    made.num_computed = num_computed
    return made


def _worth(sequence: Sequence) -> int:
    """Each guess is a step of the draft's, so a text that it guesses badly gets few."""
    right = sequence.drafter.last_right
    return 1 << 30 if right is None else right + 1
