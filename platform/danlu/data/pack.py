"""Padding-free batches: rows laid end to end with their offsets, drawn so that a step number is all the state there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from danlu.data.encode import Encoded, ends


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end; a row is one of them, or the several that `groups` gives it.

    input_ids, position_ids, token_type_ids: int64 [tokens]; cu_seqlens: int32 [sequences + 1]; groups: int64 [rows + 1] or None; labels:
    int64 or float32 [rows, ...], int64 [tokens] where each token has one, or None; reference: float32 [rows, width], what the start model
    gave on each row, or None.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor | None
    cu_seqlens: torch.Tensor
    labels: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return len(self.cu_seqlens if self.groups is None else self.groups) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Packed:
        """The same batch on `device`; cu_seqlens and groups stay on the host, where rows are split by them."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            token_type_ids=moved(self.token_type_ids),
            labels=moved(self.labels),
            reference=moved(self.reference),
        )


def pack(
    rows: Sequence[np.ndarray], token_types: Sequence[np.ndarray] | None = None, labels: Sequence[int] | np.ndarray | None = None
) -> Packed:
    """Lay rows (int arrays of token ids, none empty) end to end."""
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    types = None if token_types is None else np.concatenate(token_types)
    return _packed(np.concatenate(rows), lengths, types, None if labels is None else np.asarray(labels))


def _packed(
    ids: np.ndarray,
    lengths: np.ndarray,
    types: np.ndarray | None,
    labels: np.ndarray | None,
    groups: np.ndarray | None = None,
    reference: np.ndarray | None = None,
) -> Packed:
    cu_seqlens = ends(lengths)
    positions = np.arange(cu_seqlens[-1], dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)
    kind = np.float32 if labels is not None and labels.dtype.kind == "f" else np.int64
    return Packed(
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(positions),
        None if types is None else torch.from_numpy(types.astype(np.int64)),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        None if labels is None else torch.from_numpy(labels.astype(kind)),
        None if groups is None else torch.from_numpy(groups),
        None if reference is None else torch.from_numpy(reference.astype(np.float32)),
    )


def by_length(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Row indices in groups of at most `max_tokens` tokens (one row at least), longest rows first."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups: list[list[int]] = [[]]
    room = max_tokens
    for index in order:
        if groups[-1] and lengths[index] > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(int(index))
        room -= int(lengths[index])
    return [np.asarray(group) for group in groups if group]


class Corrupt(Protocol):
    """What is drawn anew for a row each time it is trained on: (token ids, the tokens' labels) out of its token ids."""

    def __call__(self, ids: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]: ...


MEGA_BATCHES = 50
"""Rows are sorted by length within so many batches (transformers' number): enough for batches of one length, and order stays random."""


class Batches:
    """Training batches as a pure function of the step.

    Every epoch is one permutation of the rows, drawn from (seed, epoch); steps take `global_batch_size` rows each from the
    endless line of epochs. So a run goes on at the exact row by its step number alone, and the rows of a step are the same
    for any number of workers and any accumulation.
    """

    def __init__(
        self,
        encoded: Encoded,
        labels: np.ndarray | None,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        group_by_length: bool = False,
        reference: np.ndarray | None = None,
        corrupt: Corrupt | None = None,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(f"{global_batch_size=} is not a multiple of {micro_batch_size=} x {world_size=}")
        self.encoded, self.labels, self.seed, self.group_by_length = encoded, labels, seed, group_by_length
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.reference, self.corrupt = reference, corrupt
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows_of(self, step: int) -> np.ndarray:
        """Row indices of the whole global batch of a step, int64 [global_batch_size]."""
        first, size = step * self.global_batch_size, len(self.encoded)
        return np.concatenate(
            [
                self._permutation(epoch)[max(0, first - epoch * size) : first + self.global_batch_size - epoch * size]
                for epoch in range(first // size, (first + self.global_batch_size - 1) // size + 1)
            ]
        )

    def at(self, step: int) -> list[Packed]:
        """This rank's micro-batches of a step."""
        rows = self.rows_of(step)
        # Dealt out by length, there and back: micro-batches that run side by side hold nearly the same number of tokens, so
        # no rank waits for another. The sum over the step does not depend on who holds which row.
        rows = rows[np.argsort(-self.encoded.lengths[rows], kind="stable")]
        num_piles = self.global_batch_size // self.micro_batch_size
        table = rows.reshape(self.micro_batch_size, num_piles).copy()
        table[1::2] = table[1::2, ::-1]
        return [self._packed(table[:, pile], step) for pile in range(self.rank, num_piles, self.world_size)]

    def num_tokens(self, step: int) -> int:
        """Tokens of the whole global batch of a step."""
        return int(self.encoded.lengths[self.rows_of(step)].sum())

    def _packed(self, rows: np.ndarray, step: int) -> Packed:
        if self.corrupt is None:
            return pack_rows(self.encoded, rows, self.labels, self.reference)
        # Drawn by step and row, so that the draw does not depend on who holds the row.
        drawn = [self.corrupt(self.encoded.row(int(row)), np.random.default_rng((self.seed, step, int(row)))) for row in rows]
        return pack([ids for ids, _ in drawn], labels=np.concatenate([labels for _, labels in drawn]))

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            draw = np.random.default_rng((self.seed, epoch))
            order = draw.permutation(len(self.encoded))
            self._epoch, self._order = epoch, self._grouped(order, draw) if self.group_by_length else order
        return self._order

    def _grouped(self, order: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Batches of neighbours in length, out of `MEGA_BATCHES` batches of rows at a time, in a drawn order."""
        size = self.global_batch_size
        whole = len(order) // size * size
        batches: list[np.ndarray] = []
        for start in range(0, whole, size * MEGA_BATCHES):
            mega = order[start : min(start + size * MEGA_BATCHES, whole)]
            mega = mega[np.argsort(self.encoded.lengths[mega], kind="stable")]
            batches += [mega[first : first + size] for first in range(0, len(mega), size)]
        return np.concatenate([*(batches[int(i)] for i in draw.permutation(len(batches))), order[whole:]])


def pack_rows(
    encoded: Encoded, rows: Sequence[int] | np.ndarray, labels: np.ndarray | None = None, reference: np.ndarray | None = None
) -> Packed:
    """The named rows of `encoded`, packed, with their `labels` ([all rows, ...]) or the labels of their tokens."""
    rows = np.asarray(rows, dtype=np.int64)
    taken = encoded.take(rows)
    told = taken.token_labels if labels is None else labels[rows]
    beside = None if reference is None else reference[rows]
    return _packed(taken.input_ids, np.diff(taken.offsets), taken.token_type_ids, told, taken.groups, beside)
