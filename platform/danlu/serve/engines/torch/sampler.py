"""A token for each sequence, from its logits: per-request rules, all requests in a few tensor operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from danlu.serve.engines.torch.guide import Matcher
from danlu.serve.generation import Sampling

BLOCK = 512
"""A token is drawn in two steps, its block and then its place in it: only the blocks' sums are added up in double precision."""

WIDTHS = (64, 1024)
"""top_p looks at so many of the most probable tokens first, and at all only if these have less than top_p of the probability."""

LARGEST = 1e30

NO_NUMBERS = "the model's logits are no numbers: NaN or infinity"


class Chooser:
    """How one sequence's tokens are chosen, and what that has to remember."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], end_ids: Sequence[int], matcher: Matcher | None = None) -> None:
        self.sampling, self.matcher = sampling, matcher
        self.num_made = 0
        self.draws = np.random.Generator(np.random.Philox(sampling.seed)) if sampling.temperature > 0 else None
        self.ends = sorted({*end_ids, *sampling.stop_token_ids})
        self.seen = Seen(prompt) if _has_penalties(sampling) else None

    def add(self, token_id: int) -> None:
        """Remember a token that was chosen."""
        self.num_made += 1
        if self.seen is not None:
            self.seen.add(token_id)
        if self.matcher is not None:
            self.matcher.add(token_id)

    @property
    def is_plain(self) -> bool:
        """Whether the logits need no change before the most probable token is taken."""
        return (
            self.sampling.temperature <= 0
            and self.seen is None
            and self.matcher is None
            and not self.sampling.logit_bias
            and self.num_made >= self.sampling.min_tokens
        )


class Seen:
    """The distinct tokens of a sequence and how often it made each: as long as the sequence, not as the vocabulary."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.place: dict[int, int] = {}
        self.ids = np.empty(max(64, 2 * len(prompt)), dtype=np.int64)
        self.counts = np.zeros(len(self.ids), dtype=np.float32)
        for token_id in prompt:
            self._place(token_id)

    def add(self, token_id: int) -> None:
        place = self._place(token_id)  # which may put longer arrays in their place
        self.counts[place] += 1

    def _place(self, token_id: int) -> int:
        place = self.place.setdefault(token_id, len(self.place))
        if place == len(self.ids):
            self.ids, self.counts = np.concatenate([self.ids, self.ids]), np.concatenate([self.counts, np.zeros_like(self.counts)])
        self.ids[place] = token_id
        return place


@dataclass(frozen=True)
class Chosen:
    """A token; with its log probability and the most probable ones, if asked for: (token, log probability) pairs."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[Chosen]:
    """One token for each row of logits (float32 [rows, vocabulary], which are overwritten).

    The order is vLLM's: log probabilities, guide, min_tokens, logit_bias, penalties, temperature, min_p, top_k, top_p.
    """
    asked = [i for i, one in enumerate(choosers) if one.sampling.logprobs is not None]
    raw = logits[asked].log_softmax(-1) if asked else None
    if any(not one.is_plain for one in choosers):
        _mask(logits, choosers)
        _penalize(logits, choosers)
    ids = _most_probable(logits)
    drawn = [i for i, one in enumerate(choosers) if one.draws is not None]
    if drawn:
        some = logits if len(drawn) == len(choosers) else logits[drawn]
        ids[drawn] = _drawn(some, [choosers[i] for i in drawn])
    chosen = [Chosen(token_id) for token_id in ids.tolist()]
    if raw is not None:
        found = logprobs(raw, [chosen[i].token_id for i in asked], [choosers[i].sampling.logprobs or 0 for i in asked])
        for i, one in zip(asked, found, strict=True):
            chosen[i] = one
    return chosen


def logprobs(raw: torch.Tensor, token_ids: Sequence[int], numbers: Sequence[int]) -> list[Chosen]:
    """The log probability of a token of each row of `raw` (log probabilities, [rows, vocabulary]), and the rows' most probable ones."""
    own = raw.gather(1, torch.tensor(token_ids, device=raw.device)[:, None])[:, 0].tolist()
    if any(map(math.isnan, own)):
        raise FloatingPointError(NO_NUMBERS)
    most = min(max(numbers, default=0), raw.shape[1])
    if not most:
        return [Chosen(token_id, logprob) for token_id, logprob in zip(token_ids, own, strict=True)]
    values, places = raw.topk(most, dim=-1)
    rows = zip(token_ids, own, places.tolist(), values.tolist(), numbers, strict=True)
    return [Chosen(token_id, logprob, tuple(zip(ids[:n], found[:n], strict=True))) for token_id, logprob, ids, found, n in rows]


def _most_probable(logits: torch.Tensor) -> torch.Tensor:
    """Of each row, int64 [rows]. On a CPU NumPy's single thread is several times faster than PyTorch's, and wakes no others; and behind a
    step, whose weights went through the caches, every operation of PyTorch's is slow to start."""
    # NaN is the highest of a row that has it, and no token follows from such a row.
    if logits.device.type == "cpu":
        rows = logits.numpy()
        found = rows.argmax(-1)
        are_numbers = bool((rows[np.arange(len(rows)), found] < np.inf).all())
        ids = torch.from_numpy(found)
    else:
        ids = logits.argmax(-1)
        are_numbers = bool((logits.gather(1, ids[:, None]) < torch.inf).all())
    if not are_numbers:
        raise FloatingPointError(NO_NUMBERS)
    return ids


def _mask(logits: torch.Tensor, choosers: Sequence[Chooser]) -> None:
    for row, chooser in zip(logits, choosers, strict=True):
        sampling = chooser.sampling
        if chooser.matcher is not None:
            chooser.matcher.mask(row)
        if chooser.num_made < sampling.min_tokens and chooser.ends:
            row[chooser.ends] = -torch.inf
        if sampling.logit_bias:
            row[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()), dtype=row.dtype, device=row.device)


def _penalize(logits: torch.Tensor, choosers: Sequence[Chooser]) -> None:
    """All rows' penalties at once, on the few tokens that they have seen."""
    given = [(i, one.sampling, one.seen) for i, one in enumerate(choosers) if one.seen is not None]
    if not given:
        return
    lengths = [len(seen.place) for _, _, seen in given]
    ids = torch.from_numpy(np.concatenate([seen.ids[:n] for (_, _, seen), n in zip(given, lengths, strict=True)])).to(logits.device)
    counts = torch.from_numpy(np.concatenate([seen.counts[:n] for (_, _, seen), n in zip(given, lengths, strict=True)])).to(logits.device)
    of_row = torch.tensor(
        [[i, s.repetition_penalty, s.frequency_penalty, s.presence_penalty] for i, s, _ in given], dtype=torch.float64, device=logits.device
    ).repeat_interleave(torch.tensor(lengths, device=logits.device), dim=0)
    rows, repetition, frequency, presence = of_row[:, 0].long(), *of_row[:, 1:].to(logits.dtype).unbind(1)
    values = logits[rows, ids]
    # An odd penalty is its request's affair: only the model itself may come to infinity.
    values = torch.where(values > 0, values / repetition, values * repetition).clamp_max(LARGEST)
    logits[rows, ids] = values - frequency * counts - presence * (counts > 0)


def _drawn(logits: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    """A token of each row, by its probability after temperature and cuts. Each row draws one number of its own generator, so that what
    it gets does not depend on who else is there."""
    numbers = [(max(s.temperature, 1e-5), s.min_p, s.top_k, s.top_p) for s in (one.sampling for one in choosers)]
    settings = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
    logits = logits.div_(settings[:, :1].to(logits.dtype))
    logits = logits - logits.amax(-1, keepdim=True)
    if any(min_p > 0 for _, min_p, _, _ in numbers):
        logits.masked_fill_(logits < settings[:, 1:2].log().to(logits.dtype), -torch.inf)
    cut = [i for i, (_, _, top_k, top_p) in enumerate(numbers) if 0 < top_k < logits.shape[1] or top_p < 1]
    if cut:
        least = _least(logits[cut], [numbers[i][2] or logits.shape[1] for i in cut], settings[cut, 3])
        some = logits[cut]
        logits[cut] = some.masked_fill_(some < least[:, None], -torch.inf)
    uniforms = torch.tensor([one.draws.random() for one in choosers if one.draws is not None], dtype=torch.float64, device=logits.device)
    return _inverted(logits.exp_(), uniforms)


def _least(logits: torch.Tensor, top_k: Sequence[int], top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit that stays in each row after top_k and then top_p."""
    most = torch.tensor(top_k, device=logits.device)
    least = torch.full((len(logits),), -torch.inf, dtype=logits.dtype, device=logits.device)
    open_rows = torch.arange(len(logits), device=logits.device)
    total = logits.double().logsumexp(-1) if logits.shape[1] <= BLOCK else logits.logsumexp(-1).double()
    for width in (*WIDTHS, logits.shape[1]):
        width = min(width, logits.shape[1])
        values = logits[open_rows].topk(width, dim=-1).values
        inside = torch.arange(width, device=logits.device) < most[open_rows, None]
        kept = values.double().masked_fill(~inside, -torch.inf)
        # A row that top_k cuts within the width is measured by what top_k leaves, another by all there is.
        whole = torch.where(most[open_rows] <= width, kept.logsumexp(-1), total[open_rows])
        before = (kept - whole[:, None]).exp().cumsum(-1)
        share = before[:, -1]
        before = before.roll(1, -1)
        before[:, 0] = 0
        stays = inside & (before < top_p[open_rows, None])
        found = values.gather(1, (stays.sum(-1, keepdim=True) - 1).clamp_min(0))[:, 0]
        enough = (share >= top_p[open_rows]) & (most[open_rows] >= logits.shape[1])
        done = (most[open_rows] <= width) | enough | (width == logits.shape[1])
        least[open_rows[done]] = found[done]
        open_rows = open_rows[~done]
        if not len(open_rows):
            break
    return least


def _inverted(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Each row's token at its share `uniforms` (0 to 1) of the row's sum. weights: [rows, vocabulary]; returns int64 [rows]."""
    rows, size = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -size % BLOCK)).view(rows, -1, BLOCK)
    ends = padded.sum(-1).double().cumsum(-1)
    aims = uniforms * ends[:, -1]
    # The first block, and in it the first token, whose cumulated weight is more than the aim; empty ones never are.
    block = torch.searchsorted(ends, aims[:, None], right=True).clamp_max_(ends.shape[1] - 1)
    inside = padded.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    starts = torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    # A block's sum was added up in another order: what lies beyond by rounding belongs to its last token.
    rest = torch.minimum(aims[:, None] - starts, inside[:, -1:] * (1 - 1e-12))
    place = torch.searchsorted(inside, rest.clamp_min_(0), right=True).clamp_max_(BLOCK - 1)
    return (block * BLOCK + place)[:, 0]


def _has_penalties(sampling: Sampling) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)
