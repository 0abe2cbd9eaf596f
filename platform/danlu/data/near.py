"""Duplicates: exact by digest, near by MinHash over character n-grams with locality-sensitive hashing.

What was seen is kept in SQLite, in memory or in a file, so that memory does not grow with the rows and a stopped run goes on. Near: the
Jaccard similarity of two texts' n-grams, estimated from the share of equal minima (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900).
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

NUM_HASHES = 128
MAX_SHINGLES = 1 << 15
"""Of a longer text its first ones: the rest would cost more than it tells."""
MAX_CANDIDATES = 200
"""Of a text; boilerplate makes many, of which the first will do."""
CACHE_BYTES = 64 << 20
RECALL = 0.98
"""Share of the pairs of exactly the threshold's similarity that the bands find; of more similar ones they find more."""


_SIGNS = re.compile(r"[\W_]+")


def normal(text: str) -> str:
    """What makes two texts the same: letters and digits, not case, width, punctuation or spacing."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return _SIGNS.sub(" ", folded).strip() or folded.strip()


def shingles(text: str) -> np.ndarray:
    """Hashes of a text's distinct character n-grams, uint64: pairs of characters where it is Chinese, five letters elsewhere."""
    plain = normal(text)[: MAX_SHINGLES + 4]
    points = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    size = 2 if 3 * int(((points >= 0x3040) & (points <= 0x9FFF)).sum()) > len(points) else 5
    if len(points) < size:
        points, size = np.concatenate([points, np.zeros(size, dtype=np.uint64)])[:size], size
    hashes = np.zeros(len(points) - size + 1, dtype=np.uint64)
    for offset in range(size):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + points[offset : offset + len(hashes)]
    return np.unique(_mixed(hashes))


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """splitmix64: neighbouring texts must not have neighbouring hashes."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(hashes ^ (hashes >> np.uint64(31)))


_DRAW = np.random.default_rng(0x5EED)
_FACTORS = _DRAW.integers(1, 1 << 63, NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _DRAW.integers(0, 1 << 63, NUM_HASHES, dtype=np.uint64)


def signature(text: str) -> np.ndarray:
    """The smallest value of each hash function over a text's n-grams, uint32 [NUM_HASHES]."""
    hashes = shingles(text)
    smallest = np.full(NUM_HASHES, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(hashes), 1024):
        values = (hashes[start : start + 1024, None] * _FACTORS + _TERMS) >> np.uint64(32)
        smallest = np.minimum(smallest, values.min(axis=0).astype(np.uint32))
    return smallest


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """The estimate of the Jaccard similarity; its standard deviation is at most 0.044."""
    return float((one == other).mean())


@lru_cache
def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of each): the longest bands, and so the fewest false candidates, that still find what is asked."""
    for rows in range(NUM_HASHES, 0, -1):
        number = NUM_HASHES // rows
        if 1 - (1 - threshold**rows) ** number >= RECALL:
            return number, rows
    return NUM_HASHES, 1


class Seen:
    """Texts that were seen, and where. `where` numbers are the caller's: rows, lines."""

    def __init__(self, connection: sqlite3.Connection, name: str, threshold: float | None = None) -> None:
        self.connection, self.name, self.threshold = connection, name, threshold
        connection.execute(f"create table if not exists {name} (key integer, at integer, primary key (key, at)) without rowid")
        if threshold is not None:
            self.number, self.rows = bands(threshold)
            self._salt = np.arange(self.number, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93)
            connection.execute(f"create table if not exists {name}_signatures (at integer primary key, signature blob)")

    def find(self, text: str) -> int | None:
        """Where the first text like this one was seen, or None."""
        return self._find(*self._keys(text))

    def add(self, text: str, at: int) -> int | None:
        """Where the first text like this one was seen; if there is none, this one is remembered."""
        keys, signed = self._keys(text)
        found = self._find(keys, signed)
        if found is None:
            self.connection.executemany(f"insert or ignore into {self.name} values (?, ?)", [(key, at) for key in keys])
            if signed is not None:
                self.connection.execute(f"insert or ignore into {self.name}_signatures values (?, ?)", (at, signed.tobytes()))
        return found

    def _keys(self, text: str) -> tuple[list[int], np.ndarray | None]:
        if self.threshold is None:
            digest = blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
            return [int.from_bytes(digest, "little", signed=True)], None
        signed = signature(text)
        cut = signed[: self.number * self.rows].reshape(self.number, self.rows).astype(np.uint64)
        keys = self._salt.copy()
        for column in range(self.rows):
            keys = _mixed(keys * np.uint64(0x9E3779B97F4A7C15) + cut[:, column])
        return [int(key) for key in keys.view(np.int64)], signed

    def _find(self, keys: list[int], signed: np.ndarray | None) -> int | None:
        marks = ",".join("?" * len(keys))
        found = sorted(
            {at for (at,) in self.connection.execute(f"select at from {self.name} where key in ({marks}) limit {MAX_CANDIDATES}", keys)}
        )
        if signed is None or self.threshold is None:
            return found[0] if found else None
        for at in found:
            query = f"select signature from {self.name}_signatures where at = ?"
            (raw,) = self.connection.execute(query, (at,)).fetchone()
            if similarity(signed, np.frombuffer(raw, dtype=np.uint32)) >= self.threshold:
                return int(at)
        return None


def database(path: Path | None = None) -> sqlite3.Connection:
    """A store of what was seen: in memory, or in a file with a cache of `CACHE_BYTES`."""
    connection = sqlite3.connect(":memory:" if path is None else path, isolation_level=None)
    connection.execute(f"pragma cache_size = -{CACHE_BYTES >> 10}")
    if path is not None:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
    connection.execute("begin")
    return connection


def duplicates(texts: Iterable[str], threshold: float | None = None) -> list[tuple[int, int]]:
    """(row, the earlier row it repeats) of texts that are the same, or at least `threshold` similar."""
    seen = Seen(database(), "seen", threshold)
    return [(row, first) for row, text in enumerate(texts) if (first := seen.add(text, row)) is not None]
