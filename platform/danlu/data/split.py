"""Dev and test splits out of the training rows: random, stratified, by group, by time; each follows from its seed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from danlu.errors import DataError
from danlu.spec.data import Group, Ratio, Stratified, Time


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
    if len(labels) > 1 and len(classes) == len(labels):
        told = f"each of the {len(labels)} training rows has a label of its own: none can be held out for scoring"
        raise DataError(told, where="data.columns.label", fix="task.kind=regression if they are numbers to foretell, or another column")
    if not len(dev_rows):
        raise DataError(
            f"{dev_size:g} of {len(labels)} training rows leaves no dev row",
            where="data.dev_size",
            fix="a larger dev_size, more rows, or a file of their own in data.dev",
        )
    return np.setdiff1d(np.arange(len(labels)), dev_rows), dev_rows.astype(np.int64)


def draw_split(
    split: Ratio | Stratified | Group | Time, num_rows: int, keys: Sequence[str] | None, seed: int, *, where: str = "data.split"
) -> np.ndarray:
    """0 for a training row, 1 for dev, 2 for test, int8 [rows]. `keys`: each row's label, group or time, as the split asks for."""
    if not num_rows:
        raise DataError("there is no training row to hold any out of", where=where)
    sides = np.zeros(num_rows, dtype=np.int8)
    rows = np.arange(num_rows)
    for side, size in ((2, split.test_size), (1, split.dev_size)):
        if not size:
            continue
        # A share of all rows, drawn out of those that are left.
        share = size * num_rows / len(rows)
        left = None if keys is None else [keys[int(row)] for row in rows]
        held = rows[_held_out(split, left, len(rows), share, seed + side, where)]
        sides[held] = side
        rows = np.setdiff1d(rows, held)
    if not len(rows):
        raise DataError(f"dev_size={split.dev_size:g} and test_size={split.test_size:g} leave no training row", where=where)
    return sides


def _held_out(
    split: Ratio | Stratified | Group | Time, keys: Sequence[str] | None, num_rows: int, share: float, seed: int, where: str
) -> np.ndarray:
    match split:
        case Ratio():
            return random_split(num_rows, share, seed)[1]
        case Stratified():
            assert keys is not None
            return stratified_split(np.unique(np.asarray(keys), return_inverse=True)[1], share, seed)[1]
        case Group():
            assert keys is not None
            return _groups(np.asarray(keys), share, seed, split.column, where)
        case Time():
            assert keys is not None
            return _latest([_moment(key, split.column, where) for key in keys], share, split.column, where)


def _groups(keys: np.ndarray, share: float, seed: int, column: str, where: str) -> np.ndarray:
    """Rows of groups in a drawn order, each taken if that comes closer to the share."""
    groups, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    wanted, taken = share * len(keys), 0
    chosen: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if abs(taken + counts[group] - wanted) < abs(taken - wanted) and len(chosen) + 1 < len(groups):
            chosen.append(int(group))
            taken += int(counts[group])
    if not chosen:
        raise DataError(
            f"the column {column!r} has {len(groups)} value{'s' if len(groups) != 1 else ''} and the smallest group {counts.min()} of "
            f"{len(keys)} rows: no whole group comes near {share:.1%} of them",
            where=where,
            fix="a larger share, or a column with smaller groups",
        )
    return np.flatnonzero(np.isin(inverse, chosen))


def _latest(moments: Sequence[float], share: float, column: str, where: str) -> np.ndarray:
    """The latest rows. Those of one moment stay together, on the side that comes nearer to the share."""
    times = np.asarray(moments)
    number = max(1, round(share * len(times)))
    border = np.sort(times)[len(times) - number]
    held = min(
        (times > border, times >= border), key=lambda rows: abs(int(rows.sum()) - number) + len(rows) * (rows.all() or not rows.any())
    )
    if held.all() or not held.any():
        raise DataError(f"all rows have the same {column!r}: none is later than the others", where=where, fix="split.kind=ratio")
    return np.flatnonzero(held)


def _moment(key: str, column: str, where: str) -> float:
    try:
        return float(key)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(key.strip().replace("/", "-"))
    except ValueError as error:
        raise DataError(
            f"{key!r} in the column {column!r} is no number and no date",
            where=where,
            fix="numbers, or ISO 8601: 2026-11-25, 2026-11-25T08:30:00",
        ) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
