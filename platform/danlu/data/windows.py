"""Long texts as windows: each row becomes as many sequences as it takes, and none of its words is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Encoding
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from danlu.data.encode import CHUNK, Encoded, cached, ends
from danlu.errors import SpecError

Spans = Sequence[tuple[int, int]]


def encode_with_context(
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stride: int,
    max_question_length: int,
    cache_dir: str | Path | None,
) -> Encoded:
    """Each question with windows of its context, neighbours sharing `stride` tokens; `spans` are characters of the context.

    A question is cut to `max_question_length` tokens, so that some of the context fits.
    """

    special = tokenizer.num_special_tokens_to_add(pair=True)
    if (room := max_length - max_question_length - special) <= stride:
        raise SpecError(
            f"model.max_length={max_length} holds {max_question_length} tokens of a question, {special} special ones and {max(0, room)} of "
            f"the context, and windows share {stride}: they would not move on",
            where="model.max_length",
            fix="a larger model.max_length, or a smaller task.doc_stride",
        )

    def make() -> Encoded:
        windows: list[list[Encoding]] = []
        for start in range(0, len(questions), CHUNK):
            asked = _shortened(questions[start : start + CHUNK], tokenizer, max_question_length)
            windows += _windows(tokenizer, (asked, list(contexts[start : start + CHUNK])), len(asked), max_length, stride, "only_second")
        return _laid_out(windows, [[_context_spans(one) for one in row] for row in windows], paired=True)

    settings = f"context {max_length} {stride} {max_question_length}"
    return cached(make, (questions, contexts), tokenizer, settings=settings, cache_dir=cache_dir)


def encode_words(
    texts: Sequence[str], spans: Sequence[Spans], tokenizer: PreTrainedTokenizerBase, *, max_length: int, cache_dir: str | Path | None
) -> Encoded:
    """Texts by their words (start, end), tokenised word by word; a long text's windows follow each other without sharing tokens.

    `Encoded.spans` has a word's characters at its first token, and -1 at its others.
    """

    _put_spaces_before_words(tokenizer)

    def make() -> Encoded:
        windows: list[list[Encoding]] = []
        for start in range(0, len(texts), CHUNK):
            words = [
                [text[a:b] for a, b in row] for text, row in zip(texts[start : start + CHUNK], spans[start : start + CHUNK], strict=True)
            ]
            windows += _windows(tokenizer, (words,), len(words), max_length, 0, True, is_split_into_words=True)
        return _laid_out(windows, [_word_spans(row, places) for row, places in zip(windows, spans, strict=True)], paired=False)

    columns = (texts, [" ".join(f"{a}:{b}" for a, b in row) for row in spans])
    return cached(make, columns, tokenizer, settings=f"words {max_length}", cache_dir=cache_dir)


def _put_spaces_before_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """RoBERTa's kind of tokenizer knows a word by the space before it, which a word alone does not have."""
    words = tokenizer.backend_tokenizer.pre_tokenizer
    if isinstance(words, ByteLevel) and not words.add_prefix_space:
        words.add_prefix_space = True
        tokenizer.backend_tokenizer.pre_tokenizer = words


def _windows(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[Sequence[object]],
    rows: int,
    max_length: int,
    stride: int,
    truncation: str | bool,
    **how: bool,
) -> list[list[Encoding]]:
    """The windows of each row."""
    batch = tokenizer(*columns, truncation=truncation, max_length=max_length, stride=stride, return_overflowing_tokens=True, **how)
    found: list[list[Encoding]] = [[] for _ in range(rows)]
    for row, one in zip(batch["overflow_to_sample_mapping"], batch.encodings or (), strict=True):
        found[row].append(one)
    return found


def _laid_out(windows: Sequence[Sequence[Encoding]], spans: Sequence[Sequence[np.ndarray]], *, paired: bool) -> Encoded:
    flat = [one for row in windows for one in row]
    return Encoded(
        np.concatenate([np.asarray(one.ids, dtype=np.int32) for one in flat]),
        ends([len(one.ids) for one in flat]),
        np.zeros(len(windows), dtype=bool),
        np.concatenate([np.asarray(one.type_ids, dtype=np.int8) for one in flat]) if paired else None,
        ends([len(row) for row in windows]),
        np.concatenate([one for row in spans for one in row]),
    )


def _context_spans(one: Encoding) -> np.ndarray:
    owners = np.asarray([-1 if owner is None else owner for owner in one.sequence_ids])
    return np.where((owners == 1)[:, None], np.asarray(one.offsets, dtype=np.int32), np.int32(-1))


def _word_spans(row: Sequence[Encoding], places: Spans) -> list[np.ndarray]:
    seen = -1
    found = []
    for one in row:
        spans = np.full((len(one.ids), 2), -1, dtype=np.int32)
        for token, word in enumerate(one.word_ids):
            if word is not None and word > seen:
                spans[token], seen = places[word], word
        found.append(spans)
    return found


def _shortened(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[str]:
    """Questions of at most `limit` tokens, cut where a token ends."""
    whole = tokenizer(list(questions), add_special_tokens=False).encodings or ()
    return [
        question if len(one.ids) <= limit else question[: one.offsets[limit - 1][1]] for question, one in zip(questions, whole, strict=True)
    ]
