"""Guesses at a sequence's next tokens, which the next step then checks: what followed the same few tokens earlier (prompt lookup), or
what a smaller model says (draft_model.py).

The step reads the guessed tokens together with the last real one and so has the logits behind each. From those the tokens are chosen as
always, one by one; as long as the one chosen is the one guessed, the next is there already. So what is chosen, drawn or greedy, is the
same with guesses as without; a guess only decides how many steps it takes (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from danlu.serve.engines.torch import sequence

Asked = Sequence[tuple["sequence.Sequence", int]]
"""Running sequences, and how many tokens may be guessed of each."""

Guess = Callable[[Asked], list[Sequence[int]]]

LENGTHS = (3, 2)
"""Of what has to be the same: the longer is looked for first."""

LONGEST_PAUSE = 64


def look_up(asked: Asked) -> list[Sequence[int]]:
    """Prompt lookup, each sequence in its own text."""
    return [one.drafter.guess(one.tokens, most) for one, most in asked]


class Drafter:
    """One sequence's guesses. After one that was wrong from its first token on it keeps quiet: for a token, then for two, four ..."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        """Tokens that stood together -> where what follows them begins, the last time."""
        self.num_read = 0
        self.pause, self.quiet_until = 0, 0
        self.last_right: int | None = None
        """Tokens of the last guess."""

    def is_quiet(self, tokens: Sequence[int]) -> bool:
        return len(tokens) < self.quiet_until

    def guess(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """What may follow a sequence's tokens: so many at most, or none."""
        if most < 1 or self.is_quiet(tokens):
            return ()
        # What the tokens end with is not looked up before something follows it.
        for end in range(self.num_read, len(tokens)):
            for length in LENGTHS:
                if end >= length:
                    self.ends[tuple(tokens[end - length : end])] = end
        self.num_read = len(tokens)
        for length in LENGTHS:
            start = self.ends.get(tuple(tokens[-length:]))
            if start is not None:
                return tokens[start : start + most]
        return ()

    def judge(self, tokens: Sequence[int], right: int) -> None:
        """How many tokens of the last guess were right, and all that the sequence has now."""
        self.last_right = right
        self.pause = 0 if right else min(LONGEST_PAUSE, max(1, 2 * self.pause))
        self.quiet_until = len(tokens) + self.pause
