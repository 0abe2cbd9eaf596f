"""Texts to token ids: in parallel, cached by content."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FORMAT = 3
OPTIONAL = ("token_type_ids", "groups", "spans", "token_labels")
CHUNK = 1024
NO_TARGET = -100
"""PyTorch's ignore_index."""
CHARACTERS_PER_TOKEN = 64
"""No tokenizer makes so few tokens of ordinary text; a row whose kept tokens might reach the cut is tokenised whole."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of rows, end to end. A row is one sequence, or the sequences (options of a question, windows of a long text) that `groups`
    gives it. input_ids: int32 [tokens]; offsets: int64 [sequences + 1]; truncated: bool [rows]; token_type_ids: int8 [tokens], or None
    where the texts are not pairs; groups: int64 [rows + 1], or None where each row is one sequence.

    spans: int32 [tokens, 2], the characters of the row's text that a token stands for, -1 where it stands for none; token_labels: int
    [tokens], what the output at each token has to be, NO_TARGET where nothing is learned. Only where a task says something of each token.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray
    token_type_ids: np.ndarray | None = None
    groups: np.ndarray | None = None
    spans: np.ndarray | None = None
    token_labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets if self.groups is None else self.groups) - 1

    @property
    def bounds(self) -> np.ndarray:
        """Where each row's tokens begin, and where the last one's end, int64 [rows + 1]."""
        return self.offsets if self.groups is None else self.offsets[self.groups]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.bounds)

    @property
    def sequences(self) -> Encoded:
        """The same tokens with a row for each sequence."""
        if self.groups is None:
            return self
        return replace(self, groups=None, truncated=np.repeat(self.truncated, np.diff(self.groups)))

    def row(self, index: int) -> np.ndarray:
        """Token ids of a row."""
        return self.input_ids[self.bounds[index] : self.bounds[index + 1]]

    def token_types(self, index: int) -> np.ndarray:
        """Segment ids of a row: 0 for the text, 1 for its pair."""
        assert self.token_type_ids is not None
        return self.token_type_ids[self.bounds[index] : self.bounds[index + 1]]

    def sequences_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Places of the named rows' sequences, row after row."""
        return np.asarray(rows, dtype=np.int64) if self.groups is None else _ranges(self.groups, rows)

    def tokens_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where the tokens of the named rows stand, int64 [their tokens], in that order."""
        return _ranges(self.bounds, rows)

    def row_labels(self, index: int) -> np.ndarray:
        """Labels of a row's tokens."""
        assert self.token_labels is not None
        return self.token_labels[self.bounds[index] : self.bounds[index + 1]]

    def take(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        """The named rows, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        tokens = self.tokens_of(rows)
        sequences = self.sequences_of(rows)

        def of(array: np.ndarray | None, places: np.ndarray) -> np.ndarray | None:
            return None if array is None else array[places]

        return Encoded(
            self.input_ids[tokens],
            ends(self.offsets[sequences + 1] - self.offsets[sequences]),
            self.truncated[rows],
            of(self.token_type_ids, tokens),
            None if self.groups is None else ends(self.groups[rows + 1] - self.groups[rows]),
            of(self.spans, tokens),
            of(self.token_labels, tokens),
        )


def ends(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """0 and the running sums: where things of these sizes begin and end, laid end to end. int64 [things + 1]."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _ranges(bounds: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """bounds[i] .. bounds[i + 1] of each i of `rows`, one after the other."""
    rows = np.asarray(rows, dtype=np.int64)
    sizes = bounds[rows + 1] - bounds[rows]
    places: np.ndarray = np.arange(int(sizes.sum())) + np.repeat(bounds[rows] - ends(sizes)[:-1], sizes)
    return places


def encoded_rows(
    rows: Sequence[np.ndarray],
    truncated: Sequence[bool],
    *,
    token_types: Sequence[np.ndarray] | None = None,
    token_labels: Sequence[np.ndarray] | None = None,
) -> Encoded:
    """Rows (int arrays of token ids) end to end, with what else is known of each token."""

    def flat(arrays: Sequence[np.ndarray] | None, dtype: type[np.generic]) -> np.ndarray | None:
        return None if arrays is None else np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype=dtype)

    ids = flat(rows, np.int32)
    assert ids is not None
    return Encoded(
        ids,
        ends([len(row) for row in rows]),
        np.asarray(truncated, dtype=bool),
        flat(token_types, np.int8),
        token_labels=flat(token_labels, np.int32),
    )


def encode(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    cache_dir: str | Path | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Tokenise with special tokens, each row cut to `max_length`; read from `cache_dir` if the same was done before."""
    return cached(
        lambda: _encode(texts, pairs, tokenizer, max_length, on_progress),
        (texts,) if pairs is None else (texts, pairs),
        tokenizer,
        settings=f"{max_length}",
        cache_dir=cache_dir,
    )


def cached(
    make: Callable[[], Encoded],
    columns: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: str,
    cache_dir: str | Path | None,
) -> Encoded:
    """What `make` makes of these texts with this tokenizer and these settings; read from `cache_dir` if it was made before."""
    path = None if cache_dir is None else Path(cache_dir) / "tokens" / f"{_digest(columns, tokenizer, settings)}.npz"
    if path is not None and (found := _read(path)) is not None:
        return found
    encoded = make()
    if path is not None:
        _write(path, encoded)
    return encoded


def _encode(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_progress: Callable[[int, int], None] | None,
) -> Encoded:
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    truncated: list[bool] = []
    for start in range(0, len(texts), CHUNK):
        some = list(texts[start : start + CHUNK])
        others = None if pairs is None else list(pairs[start : start + CHUNK])
        for i, one in enumerate(_tokenise(tokenizer, *_cut(some, others, max_length), max_length)):
            cut = [number for number, column in enumerate((some, others)) if column and len(column[i]) > max_length * CHARACTERS_PER_TOKEN]
            if any(not _lost_its_last_word(one, number) for number in cut):
                # The cut text may have made other tokens than the whole one (a megabyte of spaces, a hash cut in half).
                one = _tokenise(tokenizer, [some[i]], None if others is None else [others[i]], max_length)[0]
            ids.append(np.asarray(one.ids, dtype=np.int32))
            types.append(np.asarray(one.type_ids, dtype=np.int8))
            truncated.append(bool(one.overflowing))
        if on_progress is not None:
            on_progress(min(start + CHUNK, len(texts)), len(texts))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    flat = np.concatenate(ids) if ids else np.empty(0, dtype=np.int32)
    kinds = None if pairs is None else np.concatenate(types) if types else np.empty(0, dtype=np.int8)
    return Encoded(flat, offsets, np.asarray(truncated, dtype=bool), kinds)


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, max_length: int) -> list[Encoding]:
    """Each text by the Rust tokenizer, which uses all cores it is allowed."""
    return list(tokenizer(texts, pairs, truncation=True, max_length=max_length).encodings or ())


def _cut(texts: list[str], pairs: list[str] | None, max_length: int) -> tuple[list[str], list[str] | None]:
    """A 3 MB line must not be tokenised whole for its first 64 tokens."""
    limit = max_length * CHARACTERS_PER_TOKEN
    return [text[:limit] for text in texts], None if pairs is None else [pair[:limit] for pair in pairs]


def _lost_its_last_word(one: Encoding, sequence: int) -> bool:
    """True if truncation dropped the last word: a tokenizer takes words one by one, so only the last one can tell where a text was cut."""

    def last_word(part: Encoding) -> int:
        words = zip(part.word_ids, part.sequence_ids, strict=True)
        return max((word for word, owner in words if word is not None and owner == sequence), default=-1)

    return max((last_word(part) for part in one.overflowing), default=-1) > last_word(one)


def _digest(columns: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, settings: str) -> str:
    digest = sha256(f"{FORMAT} {settings} {[len(column) for column in columns]}".encode())
    # Taken apart by lengths, so that no two lists of texts share a digest.
    for column in columns:
        for text in column:
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    digest.update(_tokenizer_text(tokenizer))
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells tokenizers apart that make other tokens of a text."""
    return sha256(_tokenizer_text(tokenizer)).hexdigest()


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> bytes:
    backend = tokenizer.backend_tokenizer
    # Left over from the call before, and set anew by the next one: it must not tell the same rows apart.
    backend.no_truncation()
    backend.no_padding()
    text: str = backend.to_str()
    return text.encode()


def _read(path: Path) -> Encoded | None:
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            more = {name: arrays[name] for name in OPTIONAL if name in arrays}
            found = Encoded(arrays["input_ids"], arrays["offsets"], arrays["truncated"], **more)
        if found.offsets[-1] != len(found.input_ids) or len(found.truncated) != len(found):
            raise ValueError("its arrays do not fit together")
        return found
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, IndexError) as error:
        log.warning("the cached tokens in %s are damaged (%s): tokenising again", path, error)
        return None


def _write(path: Path, encoded: Encoded) -> None:
    arrays = {"input_ids": encoded.input_ids, "offsets": encoded.offsets, "truncated": encoded.truncated}
    arrays |= {name: array for name in OPTIONAL if (array := getattr(encoded, name)) is not None}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            temporary = file.name
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError as error:
        # A cache only saves time: a full or read-only disk must not stop the job.
        log.warning("the tokens could not be cached in %s: %s", path.parent, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
