"""The dev split keeps every class's share, loses nothing, and follows from the seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from danlu.data.split import stratified_split
from danlu.errors import DataError

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 4], [500, 133, 40, 7, 2]))


@pytest.mark.parametrize("dev_size", [0.1, 0.2, 0.33, 0.5, 0.9])
def test_every_class_keeps_its_share(dev_size: float) -> None:
    train, dev = stratified_split(LABELS, dev_size, seed=1)
    assert np.array_equal(np.sort(np.concatenate([train, dev])), np.arange(len(LABELS)))
    assert np.array_equal(train, np.sort(train))
    assert np.array_equal(dev, np.sort(dev))
    for label, count in Counter(LABELS.tolist()).items():
        assert abs((LABELS[dev] == label).sum() - dev_size * count) <= 1
        assert (LABELS[train] == label).any()


@pytest.mark.parametrize("dev_size", [0.1, 0.25, 0.4])
def test_class_counts_are_within_one_of_scikit_learns(dev_size: float) -> None:
    _, dev = stratified_split(LABELS, dev_size, seed=1)
    number = round(dev_size * len(LABELS))
    _, theirs = train_test_split(LABELS, test_size=number, stratify=LABELS, random_state=0)
    assert len(dev) == number
    assert np.abs(np.bincount(LABELS[dev], minlength=5) - np.bincount(theirs, minlength=5)).max() <= 1


def test_the_seed_decides() -> None:
    one, same, other = (stratified_split(LABELS, 0.2, seed)[1] for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert np.array_equal(stratified_split(LABELS.tolist(), 0.2, 3)[1], one)


def test_every_row_of_a_class_is_as_likely_to_be_drawn() -> None:
    labels = np.repeat([0, 1], [10, 10])
    drawn = np.zeros(20)
    for seed in range(1000):
        drawn[stratified_split(labels, 0.3, seed)[1]] += 1
    # 1000 draws with p = 0.3: the standard deviation is 14.5
    assert np.abs(drawn - 300).max() < 5 * 14.5


def test_a_class_of_one_row_stays_in_train() -> None:
    labels = [0] * 10 + [1]
    for dev_size in (0.1, 0.5, 0.95):
        train, dev = stratified_split(labels, dev_size, seed=0)
        assert 10 in train
        assert len(dev) >= 1


@pytest.mark.parametrize(("labels", "dev_size"), [([0, 0, 1, 1], 0.1), ([0, 0, 1, 1], 0.0), ([], 0.1)])
def test_a_split_without_a_dev_row_is_refused(labels: list[int], dev_size: float) -> None:
    with pytest.raises(DataError, match=f"{dev_size:g} of {len(labels)} training rows leaves no dev row") as raised:
        stratified_split(labels, dev_size, seed=0)
    assert raised.value.where == "data.dev_size"
    assert "data.dev" in raised.value.fix


def test_labels_that_are_all_different_are_refused_as_such() -> None:
    with pytest.raises(DataError, match="each of the 3 training rows has a label of its own") as raised:
        stratified_split([0, 1, 2], 0.5, seed=0)
    assert raised.value.where == "data.columns.label"
    assert "task.kind=regression" in raised.value.fix
