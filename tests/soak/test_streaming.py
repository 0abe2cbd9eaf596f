"""Rows that are larger than memory, on a real Ray: shards are tokenised by Ray Data's workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from danlu.data import prepare
from danlu.errors import DataError
from danlu.spec.train import TrainJob
from danlu.tasks.rows import Splits
from danlu.tasks.streamed import Spread
from danlu.tasks.task import read_splits
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train.driver import over_the_cluster

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("ray_local")]


def test_shards_are_tokenised_over_the_cluster_and_a_mistake_in_one_comes_back(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f'{{"text": "wheat rose {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    tokenizer = load_tokenizer(tiny_model)
    monkeypatch.setattr(prepare, "SHARD_ROWS", 100)

    def read(cache: str, spread: Spread | None) -> Splits:
        data = {"train": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / cache), "streaming": True}
        job = TrainJob.model_validate({"name": "shards", "model": {"model_name_or_path": str(tiny_model)}, "data": data})
        return read_splits(job, tokenizer, max_length=32, spread=spread)

    asked = []

    def spread(function: Any, shards: Any) -> None:
        asked.extend(shard.target for shard in shards)
        over_the_cluster(function, shards)
        assert all(path.exists() for path in asked), "made by Ray's workers, before this process makes what is missing"

    here, there = read("here", None), read("there", spread)
    assert len(asked) == 4
    assert np.array_equal(here.train.encoded.input_ids, there.train.encoded.input_ids)
    assert here.train.digest == there.train.digest
    rows = ['{"text": "", "label": "a"}\n' if i > 40 else row for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    with pytest.raises(DataError, match=r"^data\.train: .* rows have no text"):
        read("broken", spread)
