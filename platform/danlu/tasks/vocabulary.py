"""Tokens that a tokenizer was given and its model was not: whoever looks one up reads past the embeddings' end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from danlu.errors import ModelError
from danlu.tasks.config import read_config
from danlu.tasks.rows import Splits

FIX = "a model whose embeddings were resized to its tokenizer (model.resize_token_embeddings), or the tokenizer without what was added"
AT_ONCE = 1 << 24
"""Ids that are looked at together: there may be more than fit the memory."""


def num_embeddings(config: Any) -> int:
    """Tokens that a model of this config knows."""
    return int(config.get_text_config().vocab_size)


def unknown_token(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, num_known: int) -> tuple[int, str] | None:
    """Where the first of `ids` [tokens] stands that the model has no embedding for, and how it is told; None where all have one."""
    for start in range(0, len(ids), AT_ONCE):
        if len(found := np.flatnonzero(ids[start : start + AT_ONCE] >= num_known)):
            at = start + int(found[0])
            return at, f"{tokenizer.decode([int(ids[at])])!r}, the tokenizer's token {ids[at]}, and the model has embeddings of {num_known}"
    return None


def check_vocabulary(splits: Splits, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, draws: bool) -> None:
    """ModelError names a token of a row that the model of a folder does not know; with `draws`, where training puts any token in the place
    of another, also one that no row has."""
    where, num_known = "model.model_name_or_path", num_embeddings(read_config(folder))
    number = max(tokenizer.get_vocab().values()) + 1
    if number <= num_known:
        return
    if draws:
        told = f"its tokenizer has {number} tokens, any of which may be put in a masked one's place, and the model {num_known}"
        raise ModelError(told, where=where, fix=FIX)
    for name, split in (("train", splits.train), ("dev", splits.dev), ("test", splits.test)):
        if split is None or (found := unknown_token(split.encoded.input_ids, tokenizer, num_known)) is None:
            continue
        row = int(np.searchsorted(split.encoded.bounds, found[0], side="right")) - 1
        ids = split.encoded.input_ids[split.encoded.bounds[row] : split.encoded.bounds[row + 1]]
        raise ModelError(f"data.{name} has {found[1]}: {tokenizer.decode(ids[:40])!r}", where=where, fix=FIX)
