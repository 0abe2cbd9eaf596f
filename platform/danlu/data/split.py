"""A dev split out of the training rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from danlu.errors import DataError


def random_split(num_rows: int, dev_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, dev) row indices, ascending; at least one row in each."""
    size = max(1, round(dev_size * num_rows)) if dev_size > 0 else 0
    if not 0 < size < num_rows:
        raise DataError(
            f"{dev_size:g} of {num_rows} training rows leaves no {'dev' if size == 0 else 'training'} row",
            where="data.dev_size",
            fix="another dev_size, more rows, or a file of their own in data.dev",
        )
    dev = np.sort(np.random.default_rng(seed).permutation(num_rows)[:size])
    return np.setdiff1d(np.arange(num_rows), dev), dev


def stratified_split(labels: Sequence[int] | np.ndarray, dev_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, dev) row indices, ascending. Every class keeps its share in both; a class of one row stays in train."""
    labels = np.asarray(labels)
    draw = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    shares = dev_size * counts
    sizes = np.floor(shares).astype(int)
    # What rounding down left over goes to the classes that lost most by it, so that the total is right.
    missing = round(dev_size * len(labels)) - int(sizes.sum())
    for index in np.argsort(sizes - shares, kind="stable")[: max(0, missing)]:
        sizes[index] += 1
    sizes = np.minimum(sizes, np.maximum(counts - 1, 0))
    dev = [draw.permutation(np.flatnonzero(labels == label))[:size] for label, size in zip(classes, sizes, strict=True)]
    dev_rows = np.sort(np.concatenate(dev)) if dev else np.empty(0, dtype=int)
    if not len(dev_rows):
        raise DataError(
            f"{dev_size:g} of {len(labels)} training rows leaves no dev row",
            where="data.dev_size",
            fix="a larger dev_size, more rows, or a file of their own in data.dev",
        )
    return np.setdiff1d(np.arange(len(labels)), dev_rows), dev_rows.astype(np.int64)
