"""Which tokens of which sequences the next step reads. Pure: no tensors, no threads."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace

from danlu.serve.engines.torch.draft import Guess, look_up
from danlu.serve.engines.torch.sequence import Sequence
from danlu.serve.engines.torch.slots import Copy, Slots

FREE_TOKENS = 8
"""A step of so many tokens takes a third longer than one of a single token: it reads every weight once, for all of them."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a sequence."""

    sequence: Sequence
    start: int
    stop: int
    draft: tuple[int, ...] = ()
    """Behind them: tokens that are guessed, and read to be checked."""

    @property
    def is_last(self) -> bool:
        """Whether a new token is made behind it."""
        return self.stop == len(self.sequence.tokens)

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start + len(self.draft)


@dataclass(frozen=True)
class Plan:
    """A step: copies first, then the pieces. Those of sequences that go on token by token come first, in the order of their slots."""

    copies: list[Copy]
    pieces: list[Piece]

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)


class Scheduler:
    """First come, first served. Every running sequence that has read its prompt makes a token in every step; the rest of the token
    budget goes to prompts in the order they came. A slot is as long as the longest sequence, so whoever got one can finish: nobody is
    ever put back, and nobody overtakes."""

    def __init__(
        self,
        slots: Slots,
        *,
        max_num_batched_tokens: int,
        prefill_chunk_tokens: int,
        num_speculative_tokens: int = 0,
        guess: Guess = look_up,
    ) -> None:
        assert max_num_batched_tokens > slots.num_slots, "each running sequence must find room for its token, and a prompt for one of its"
        self.slots = slots
        self.max_num_batched_tokens, self.prefill_chunk_tokens = max_num_batched_tokens, prefill_chunk_tokens
        self.num_speculative_tokens, self.guess = num_speculative_tokens, guess
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence that has ended, however: what it held is free at once. One that is not here is no mistake."""
        if sequence.slot is not None:
            self.running.remove(sequence)
            self.slots.give_back(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self) -> Plan:
        """The next step; no pieces if there is nothing to do. The caller makes the copies and then reads all pieces."""
        copies: list[Copy] = []
        # A prompt that is just being read for another waits for it, and who came later with it: a few steps at most.
        while self.waiting and self.slots.free and not self.slots.is_being_read(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.begun = time.perf_counter()
            self.running.append(sequence)
            if (copy := self.slots.take(sequence)) is not None:
                copies.append(copy)
        decoding = sorted((one for one in self.running if one.is_decoding), key=lambda one: one.slot or 0)
        pieces = [Piece(one, one.num_computed, len(one.tokens)) for one in decoding]
        # While others wait for their next token, prompts are read in small bites: a step lasts as long as its tokens.
        budget = self.max_num_batched_tokens - sum(piece.stop - piece.start for piece in pieces)
        budget = min(budget, self.prefill_chunk_tokens) if pieces else budget
        for one in self.running:
            if budget and not one.is_decoding:
                # Prompt probabilities need a row of logits for each token, and each is as long as the vocabulary.
                most = min(budget, self.prefill_chunk_tokens) if one.generation.sampling.prompt_logprobs else budget
                stop = min(one.prompt_length, one.num_computed + most)
                pieces.append(Piece(one, one.num_computed, stop))
                budget -= stop - one.num_computed
        return Plan(copies, self._with_drafts(pieces))

    def _with_drafts(self, pieces: list[Piece]) -> list[Piece]:
        """Guesses where they cost next to nothing: what is left of a small step, shared evenly. Pieces with them come behind the others."""
        room = (min(FREE_TOKENS, self.max_num_batched_tokens) - sum(piece.num_tokens for piece in pieces)) // max(1, len(pieces))
        most = min(room, self.num_speculative_tokens)
        if most < 1:
            return pieces
        # The last token of an answer needs no guess behind it, and its slot may have no room for one.
        left = [piece.sequence.max_tokens - piece.sequence.num_made - 1 if piece.sequence.is_decoding else 0 for piece in pieces]
        drafts = self.guess([(piece.sequence, min(most, rest)) for piece, rest in zip(pieces, left, strict=True)])
        found = [replace(piece, draft=tuple(draft)) for piece, draft in zip(pieces, drafts, strict=True)]
        return sorted(found, key=lambda piece: bool(piece.draft))

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting
