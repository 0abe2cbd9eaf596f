"""Log probabilities as a client is told them: tokens with their texts."""

from __future__ import annotations

import torch

from danlu.serve.engines.torch.requests import Reader
from danlu.serve.engines.torch.sampler import Chosen, logprobs
from danlu.serve.engines.torch.scheduler import Piece
from danlu.serve.generation import TokenLogprob

LOGIT_ROWS = 64
"""Rows of a prompt's log probabilities that are made at a time: each is as long as the vocabulary."""


def told(reader: Reader, chosen: Chosen) -> TokenLogprob:
    """A token, and those that were the most probable."""
    name = reader.token_text
    top = tuple((token_id, name(token_id), logprob) for token_id, logprob in chosen.top)
    return TokenLogprob(chosen.token_id, name(chosen.token_id), chosen.logprob, top)


def prompt_logprobs(reader: Reader, piece: Piece, logits: torch.Tensor) -> list[TokenLogprob]:
    """Of the prompt's tokens behind those of a piece: logits at a position speak of the next one."""
    sequence = piece.sequence
    found = [TokenLogprob(sequence.tokens[0], reader.token_text(sequence.tokens[0]), None)] if piece.start == 0 else []
    following = sequence.tokens[piece.start + 1 : min(piece.stop + 1, sequence.prompt_length)]
    number = sequence.generation.sampling.logprobs or 0
    for start in range(0, len(following), LOGIT_ROWS):
        ids = following[start : start + LOGIT_ROWS]
        raw = logits[start : start + len(ids)].log_softmax(-1)
        found += [told(reader, one) for one in logprobs(raw, ids, [number] * len(ids))]
    return found
