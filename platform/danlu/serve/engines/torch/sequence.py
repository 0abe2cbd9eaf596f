"""A request on its way through the engine, and the stream its answer leaves by."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from danlu.serve.engines.torch.draft import Drafter
from danlu.serve.generation import Delta, Generation, TokenLogprob

if TYPE_CHECKING:
    from danlu.serve.engines.torch.sampler import Chooser
    from danlu.serve.engines.torch.text import TextMaker

Key = tuple[str, int] | None
"""Which weights made a sequence's keys and values: the adapter's name and the number of its loading; None is the base model."""


@dataclass(eq=False)
class Sequence:
    """One sequence: what was asked, its tokens, and how many of them lie in its slot of the cache."""

    generation: Generation
    tokens: list[int]
    """The prompt, then what was made."""
    max_tokens: int
    key: Key = None
    stream: Stream | None = None
    chooser: Chooser | None = None
    text: TextMaker | None = None
    slot: int | None = None
    num_computed: int = 0
    """Tokens whose keys and values are in the slot."""
    num_cached: int = 0
    """Those of them that the prefix cache gave."""
    cancelled: bool = False
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    drafter: Drafter = field(default_factory=Drafter)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self.prompt = np.asarray(self.tokens, dtype=np.int64)

    @property
    def num_made(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def is_decoding(self) -> bool:
        """Whether all that is left to read is what was made last."""
        return self.num_computed >= self.prompt_length


class Stream:
    """Deltas wait here for their one reader. All methods belong to the event loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.waiting: list[Delta] = []
        self.error: Exception | None = None
        self.arrived = asyncio.Event()

    def put(self, item: Delta | Exception) -> None:
        if isinstance(item, Delta):
            self.waiting.append(item)
        elif self.error is None:
            self.error = item
        self.arrived.set()

    async def next(self) -> Delta:
        """What has come since the last call, as one delta: a reader slower than the engine gets larger pieces, not a longer queue."""
        if not self.waiting and self.error is None:
            await self.arrived.wait()
        self.arrived.clear()
        if not self.waiting:
            assert self.error is not None
            raise self.error
        found, self.waiting = self.waiting, []
        return joined(found)


def joined(deltas: list[Delta]) -> Delta:
    """Several deltas of a sequence as one."""
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        tuple(one for delta in deltas for one in delta.logprobs),
        tuple(one for delta in deltas for one in delta.prompt_logprobs),
        deltas[-1].finish_reason,
        deltas[-1].usage,
    )


def deliver(items: Iterable[tuple[Stream | None, Delta | Exception]]) -> None:
    """Hand deltas and errors to their streams, waking each event loop once."""

    def put(some: list[tuple[Stream, Delta | Exception]]) -> None:
        for stream, item in some:
            stream.put(item)

    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Delta | Exception]]] = {}
    for stream, item in items:
        if stream is not None:
            by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, some in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(put, some)
