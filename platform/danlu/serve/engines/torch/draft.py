"""Guesses at a sequence's next tokens, which the next step then checks: what followed the same few tokens earlier (prompt lookup).

The step reads the guessed tokens together with the last real one and so has the logits behind each. From those the tokens are chosen as
always, one by one; as long as the one chosen is the one guessed, the next is there already. So what is chosen, drawn or greedy, is the
same with guesses as without; a guess only decides how many steps it takes (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (3, 2)
"""Of what has to be the same: the longer is looked for first."""

LONGEST_PAUSE = 64


class Drafter:
    """Guesses for one sequence. After one that was wrong from its first token on it keeps quiet: for a token, then for two, four ..."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        """Tokens that stood together -> where what follows them begins, the last time."""
        self.num_read = 0
        self.pause, self.quiet_until = 0, 0

    def guess(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """What may follow a sequence's tokens: so many at most, or none."""
        if most < 1 or len(tokens) < self.quiet_until:
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
        self.pause = 0 if right else min(LONGEST_PAUSE, max(1, 2 * self.pause))
        self.quiet_until = len(tokens) + self.pause
