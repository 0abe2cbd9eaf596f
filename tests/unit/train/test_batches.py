"""Batches: each row once an epoch, the same rows for any number of workers, exact from any step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from danlu.data.encode import Encoded
from danlu.data.pack import Batches


@pytest.fixture
def encoded() -> Encoded:
    """53 rows; every token of row i is i."""
    lengths = np.random.default_rng(0).integers(2, 20, size=53)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.repeat(np.arange(53, dtype=np.int32), lengths)
    return Encoded(ids, offsets, np.zeros(53, dtype=bool), None)


def batches(encoded: Encoded, *, rank: int = 0, world: int = 1, micro: int = 8, size: int = 16, grouped: bool = False) -> Batches:
    labels = np.arange(53)
    return Batches(
        encoded, labels, global_batch_size=size, micro_batch_size=micro, rank=rank, world_size=world, seed=3, group_by_length=grouped
    )


def test_every_row_comes_once_an_epoch(encoded: Encoded) -> None:
    seen = Counter(int(row) for step in range(53) for row in batches(encoded).rows_of(step))
    assert seen == Counter(dict.fromkeys(range(53), 16))


def test_epochs_have_different_orders(encoded: Encoded) -> None:
    ours = batches(encoded, size=53, micro=53)
    assert sorted(ours.rows_of(0)) == sorted(ours.rows_of(1))
    assert ours.rows_of(0).tolist() != ours.rows_of(1).tolist()


@pytest.mark.parametrize(("world", "micro"), [(1, 16), (1, 4), (2, 8), (2, 2), (4, 4)])
def test_the_rows_of_a_step_do_not_depend_on_workers_or_accumulation(encoded: Encoded, world: int, micro: int) -> None:
    labels = [
        int(label)
        for rank in range(world)
        for batch in batches(encoded, rank=rank, world=world, micro=micro).at(7)
        for label in batch.labels
    ]
    assert sorted(labels) == sorted(batches(encoded).rows_of(7).tolist())
    assert len(batches(encoded, world=world, micro=micro).at(7)) == 16 // (world * micro)


def test_labels_stay_with_their_rows(encoded: Encoded) -> None:
    for batch in batches(encoded).at(2):
        assert batch.input_ids[batch.cu_seqlens[:-1].long()].tolist() == batch.labels.tolist()


def test_a_step_is_the_same_whether_or_not_the_ones_before_were_asked_for(encoded: Encoded) -> None:
    walked = batches(encoded)
    for step in range(9):
        walked.rows_of(step)
    assert walked.rows_of(9).tolist() == batches(encoded).rows_of(9).tolist()


def test_workers_get_nearly_the_same_number_of_tokens(encoded: Encoded) -> None:
    for step in range(5):
        tokens = [sum(batch.num_tokens for batch in batches(encoded, rank=rank, world=2, micro=8).at(step)) for rank in (0, 1)]
        assert abs(tokens[0] - tokens[1]) <= 20


def test_batches_of_one_length_hold_every_row_once_and_are_as_resumable(encoded: Encoded) -> None:
    ours = batches(encoded, size=8, grouped=True)
    seen = Counter(int(row) for step in range(53) for row in ours.rows_of(step))
    assert seen == Counter(dict.fromkeys(range(53), 8))
    assert batches(encoded, size=8, grouped=True).rows_of(9).tolist() == ours.rows_of(9).tolist()

    def spread(grouped: bool) -> int:
        these = batches(encoded, size=8, grouped=grouped)
        return sum(int(np.ptp(encoded.lengths[these.rows_of(step)])) for step in range(6))

    assert spread(grouped=True) < spread(grouped=False) / 3
    assert [int(ours.rows_of(step)[0]) for step in range(6)] != sorted(int(ours.rows_of(step)[0]) for step in range(6))
