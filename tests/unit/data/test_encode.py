"""Token ids are the tokenizer's own, row by row; the cache saves work and never costs an answer."""

from __future__ import annotations

import logging
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import FILLER, TOPICS
from transformers import PreTrainedTokenizerBase

from danlu.data import encode as module
from danlu.data.encode import Encoded, encode
from danlu.tasks.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model)


def texts(number: int = 50, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = [*FILLER, *TOPICS["ship"], "unheard", "中文", "naïve", "x" * 120, "-", "\u2028"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(number)]


def assert_equal_to(
    encoded: Encoded, tokenizer: PreTrainedTokenizerBase, rows: list[str], pairs: list[str] | None, max_length: int
) -> None:
    assert len(encoded) == len(rows)
    for i, text in enumerate(rows):
        pair = None if pairs is None else pairs[i]
        cut = tokenizer(text, pair, truncation=True, max_length=max_length, return_token_type_ids=True)
        whole = tokenizer(text, pair)
        assert encoded.row(i).tolist() == cut["input_ids"]
        assert encoded.truncated[i] == (len(whole["input_ids"]) > max_length)
        assert encoded.lengths[i] == len(cut["input_ids"])
        if pairs is not None:
            assert encoded.token_types(i).tolist() == cut["token_type_ids"]


@pytest.mark.parametrize("max_length", [5, 16, 64])
@pytest.mark.parametrize("paired", [False, True])
def test_rows_are_what_the_tokenizer_says_one_by_one(tokenizer: PreTrainedTokenizerBase, max_length: int, paired: bool) -> None:
    pairs = texts(seed=1) if paired else None
    encoded = encode(texts(), pairs, tokenizer, max_length=max_length, cache_dir=None)
    assert_equal_to(encoded, tokenizer, texts(), pairs, max_length)
    assert (encoded.input_ids.dtype, encoded.offsets.dtype) == (np.int32, np.int64)
    assert encoded.truncated.any()


WORDS = " ".join("".join(random.Random(i).choices("abcdefgh", k=128)) for i in range(200))
LONG = {
    "hashes cut in half": WORDS,
    "hashes with dashes": WORDS.replace(" ", "-"),
    "spaces to the limit": "the " * 14 + " " * 5000,
    "spaces, then one word": "the " * 3 + " " * 5000 + "wheat",
    "spaces, then many words": "the " * 3 + " " * 5000 + "wheat corn " * 40,
    "one word": "a" * 5000,
    "Chinese": "中文的" * 3000,
    "no words": " \n" * 4000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_is_cut_where_the_tokenizer_cuts_it(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    short = ["the wheat rose"]
    assert_equal_to(encode([LONG[name]], None, tokenizer, max_length=16, cache_dir=None), tokenizer, [LONG[name]], None, 16)
    assert_equal_to(encode([LONG[name]], short, tokenizer, max_length=16, cache_dir=None), tokenizer, [LONG[name]], short, 16)
    assert_equal_to(encode(short, [LONG[name]], tokenizer, max_length=16, cache_dir=None), tokenizer, short, [LONG[name]], 16)


def test_megabytes_in_a_line_take_no_time(tokenizer: PreTrainedTokenizerBase) -> None:
    lines = ["wheat rose, " * 250_000, " " * 1_000_000 + "wheat", "中" * 1_000_000]
    began = time.perf_counter()
    encoded = encode(lines, None, tokenizer, max_length=64, cache_dir=None)
    assert time.perf_counter() - began < 5
    assert encoded.lengths.tolist() == [64, 3, 64]
    assert encoded.truncated.tolist() == [True, False, True]


def test_rows_can_be_taken_in_any_order(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = texts(seed=1)
    encoded = encode(texts(), pairs, tokenizer, max_length=16, cache_dir=None)
    some = [7, 3, 3, 49]
    assert_equal_to(encoded.take(some), tokenizer, [texts()[i] for i in some], [pairs[i] for i in some], 16)
    assert len(encoded.take([])) == 0


def test_chunks_join_seamlessly_and_tell_how_far_they_are(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 20)
    told: list[tuple[int, int]] = []
    encoded = encode(texts(), None, tokenizer, max_length=16, cache_dir=None, on_progress=lambda done, total: told.append((done, total)))
    assert_equal_to(encoded, tokenizer, texts(), None, 16)
    assert told == [(20, 50), (40, 50), (50, 50)]


def same(one: Encoded, other: Encoded) -> bool:
    types = (one.token_type_ids is None) == (other.token_type_ids is None) and (
        one.token_type_ids is None or np.array_equal(one.token_type_ids, other.token_type_ids)
    )
    arrays = ("input_ids", "offsets", "truncated")
    return types and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets a number for each time texts are really tokenised."""
    calls: list[int] = []
    original = module._encode
    monkeypatch.setattr(module, "_encode", lambda *arguments: calls.append(len(arguments[0])) or original(*arguments))
    return calls


@pytest.mark.parametrize("pairs", [None, texts(seed=1)])
def test_the_second_time_comes_from_the_cache(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, tokenised: list[int], pairs: list[str] | None
) -> None:
    first, second = (encode(texts(), pairs, tokenizer, max_length=16, cache_dir=tmp_path) for _ in range(2))
    assert same(first, second)
    assert tokenised == [50]
    assert len(list(tmp_path.rglob("*.npz"))) == len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_another_text_length_pair_or_tokenizer_is_not_taken_from_the_cache(
    tokenizer: PreTrainedTokenizerBase, tiny_model: Path, tmp_path: Path, tokenised: list[int]
) -> None:
    other = load_tokenizer(tiny_model)
    other.add_tokens(["unheard"])
    cases = [
        (["ab", "c"], None, tokenizer, 16), (["a", "bc"], None, tokenizer, 16), (["ab", "c"], None, tokenizer, 8),
        (["ab", "c"], ["", ""], tokenizer, 16), (["ab", "c"], None, other, 16),
    ]  # fmt: skip
    for rows, pairs, which, max_length in cases:
        encode(rows, pairs, which, max_length=max_length, cache_dir=tmp_path)
    assert len(tokenised) == len(cases)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "other arrays", "does not fit"])
def test_a_damaged_cache_file_is_tokenised_again_and_mended(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, tokenised: list[int], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = encode(texts(), None, tokenizer, max_length=16, cache_dir=tmp_path)
    (path,) = tmp_path.rglob("*.npz")
    match damage:
        case "cut":
            os.truncate(path, path.stat().st_size // 2)
        case "garbage":
            path.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 4)
        case "empty":
            path.write_bytes(b"")
        case "other arrays":
            np.savez(path, other=np.zeros(3))
        case "does not fit":
            np.savez(path, input_ids=first.input_ids[:-1], offsets=first.offsets, truncated=first.truncated)
    with caplog.at_level(logging.WARNING):
        assert same(encode(texts(), None, tokenizer, max_length=16, cache_dir=tmp_path), first)
    assert "tokenising again" in caplog.text
    assert same(encode(texts(), None, tokenizer, max_length=16, cache_dir=tmp_path), first)
    assert tokenised == [50, 50]


@contextmanager
def files_no_larger_than(number: int) -> Iterator[None]:
    """A write beyond it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_only_warns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), files_no_larger_than(256):
        encoded = encode(texts(), None, tokenizer, max_length=16, cache_dir=tmp_path)
    assert_equal_to(encoded, tokenizer, texts(), None, 16)
    assert "could not be cached" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_folder_that_cannot_be_made_only_warns(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        encoded = encode(texts(), None, tokenizer, max_length=16, cache_dir=tmp_path / "file")
    assert_equal_to(encoded, tokenizer, texts(), None, 16)
    assert "could not be cached" in caplog.text
