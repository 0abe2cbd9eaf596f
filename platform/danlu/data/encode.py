"""Texts to token ids: in parallel, cached by content."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FORMAT = 2
CHUNK = 4096
NO_TARGET = -100
"""PyTorch's ignore_index."""
CHARACTERS_PER_TOKEN = 64
"""No tokenizer makes so few tokens of ordinary text; a row whose kept tokens might reach the cut is tokenised whole."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of rows, end to end. input_ids: int32 [tokens]; offsets: int64 [rows + 1]; truncated: bool [rows];
    token_type_ids: int8 [tokens], or None where the texts are not pairs; targets: int32 [tokens], what the output at each position has to
    be (NO_TARGET where nothing is learned), or None where a row's targets are not at its tokens."""

    input_ids: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray
    token_type_ids: np.ndarray | None = None
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    def row(self, index: int) -> np.ndarray:
        """Token ids of a row."""
        return self.input_ids[self.offsets[index] : self.offsets[index + 1]]

    def token_types(self, index: int) -> np.ndarray:
        """Segment ids of a row: 0 for the text, 1 for its pair."""
        assert self.token_type_ids is not None
        return self.token_type_ids[self.offsets[index] : self.offsets[index + 1]]

    def row_targets(self, index: int) -> np.ndarray:
        """Targets of a row's positions."""
        assert self.targets is not None
        return self.targets[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        """The named rows, in that order."""
        indices = [int(row) for row in rows]
        offsets = np.concatenate([[0], np.cumsum(self.lengths[indices])]).astype(np.int64)
        ids = np.concatenate([self.row(i) for i in indices]) if indices else self.input_ids[:0]
        types = None if self.token_type_ids is None else np.concatenate([self.token_types(i) for i in indices] or [self.token_type_ids[:0]])
        targets = None if self.targets is None else np.concatenate([self.row_targets(i) for i in indices] or [self.targets[:0]])
        return Encoded(ids, offsets, self.truncated[indices], types, targets)


def encoded_rows(
    rows: Sequence[np.ndarray],
    truncated: Sequence[bool],
    *,
    token_types: Sequence[np.ndarray] | None = None,
    targets: Sequence[np.ndarray] | None = None,
) -> Encoded:
    """Rows (int arrays of token ids) end to end, with what else is known of each token."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)

    def flat(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
        return np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype=dtype)

    types = None if token_types is None else flat(token_types, np.int8)
    aims = None if targets is None else flat(targets, np.int32)
    return Encoded(flat(rows, np.int32), offsets, np.asarray(truncated, dtype=bool), types, aims)


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
    path = None if cache_dir is None else Path(cache_dir) / "tokens" / f"{_digest(texts, pairs, tokenizer, max_length)}.npz"
    if path is not None and (found := read_cached(path)) is not None and len(found) == len(texts):
        return found
    encoded = _encode(texts, pairs, tokenizer, max_length, on_progress)
    if path is not None:
        write_cached(path, encoded)
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


def _digest(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    digest = sha256(f"{FORMAT} {max_length} {len(texts)} {pairs is not None}".encode())
    # Taken apart by lengths, so that no two lists of texts share a digest.
    for column in (texts, pairs or ()):
        for text in column:
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    backend = tokenizer.backend_tokenizer
    # Left over from the call before, and set anew by the next one: it must not tell the same rows apart.
    backend.no_truncation()
    backend.no_padding()
    digest.update(backend.to_str().encode())
    return digest.hexdigest()


def read_cached(path: Path) -> Encoded | None:
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            types, targets = arrays.get("token_type_ids"), arrays.get("targets")
            found = Encoded(arrays["input_ids"], arrays["offsets"], arrays["truncated"], types, targets)
        if found.offsets[-1] != len(found.input_ids) or len(found.truncated) != len(found):
            raise ValueError("its arrays do not fit together")
        return found
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, IndexError) as error:
        log.warning("the cached tokens in %s are damaged (%s): tokenising again", path, error)
        return None


def write_cached(path: Path, encoded: Encoded) -> None:
    arrays = {"input_ids": encoded.input_ids, "offsets": encoded.offsets, "truncated": encoded.truncated}
    if encoded.token_type_ids is not None:
        arrays["token_type_ids"] = encoded.token_type_ids
    if encoded.targets is not None:
        arrays["targets"] = encoded.targets
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
