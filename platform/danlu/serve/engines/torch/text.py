"""Tokens into text, piece by piece; and the watch for stop texts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

MAX_HELD_TOKENS = 8
"""A character has four bytes at most; a model that makes byte after byte of none must not hold its text back for ever."""

CONTEXT = 6
"""Tokens of the prompt that the first token is decoded after: whether it starts with a space depends on them."""


class TextMaker:
    """The text of one sequence. `add` gives what can be sent: whole characters, and nothing that may yet become a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str]) -> None:
        # The Rust tokenizer itself: transformers' decode spends ten times as long around it.
        self.decode = tokenizer.backend_tokenizer.decode
        self.stop = stop
        self.ids = list(prompt[-CONTEXT:])
        self.start, self.read = 0, len(self.ids)
        self.before = self._decoded(self.read)
        self.held = ""
        """Decoded, and not yet given away."""
        self.stopped = False

    def add(self, token_id: int, *, watch: bool = True) -> str:
        """The text that has become certain; if it ran into a stop text, `stopped` is True and nothing follows. Without `watch` stop
        texts pass."""
        self.ids.append(token_id)
        now = self._decoded(len(self.ids))
        if now.endswith("\N{REPLACEMENT CHARACTER}") and len(self.ids) - self.read < MAX_HELD_TOKENS:
            return ""
        return self._given(self._advanced(now), watch)

    def finish(self) -> str:
        """All that was held back."""
        if self.stopped:
            return ""
        text = self.held + (self._advanced(self._decoded(len(self.ids))) if self.read < len(self.ids) else "")
        self.held = ""
        return text

    def _decoded(self, stop: int) -> str:
        text: str = self.decode(self.ids[self.start : stop], skip_special_tokens=True)
        return text

    def _advanced(self, now: str) -> str:
        """The new part of `now`; the tokens it came from become the context of the next."""
        new = now[len(self.before) :]
        self.start, self.read = self.read, len(self.ids)
        self.before = self._decoded(self.read)
        return new

    def _given(self, new: str, watch: bool) -> str:
        if not self.stop:
            return new
        text = self.held + new
        if watch:
            found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
            if found:
                self.stopped, self.held = True, ""
                return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self.stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
