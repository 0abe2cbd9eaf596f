"""A token that the tokenizer was given and the model was not is told before anything starts, and by a replica to who sent it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import make_rows
from transformers import AutoTokenizer

from danlu import sdk
from danlu.artifact.bundle import Bundle, BundleMeta, Lineage
from danlu.errors import ModelError
from danlu.serve.engines.encoder import EncoderEngine
from danlu.spec.serve import Encoder
from danlu.spec.task import Classification
from danlu.spec.train import TrainJob
from danlu.tasks.exchange import BadExample, Text
from danlu.tasks.predictor import load_predictor

ROWS = make_rows(30, 1)


@pytest.fixture(scope="module")
def given(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer was given tokens, and whose embeddings were not resized."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("given") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{i}>" for i in range(9)])  # the first of them fill holes
    tokenizer.save_pretrained(folder)
    return Path(folder)


def prepare(model: Path, rows: list[dict[str, str]], folder: Path, **more: Any) -> sdk.Prepared:
    pandas.DataFrame(rows).to_csv(folder / "train.csv", index=False)
    pandas.DataFrame(ROWS).to_csv(folder / "dev.csv", index=False)
    fields: dict[str, Any] = {
        "name": "vocabulary",
        "model": {"model_name_or_path": str(model), "max_length": 32},
        "data": {"train": str(folder / "train.csv"), "dev": str(folder / "dev.csv"), "cache_dir": str(folder / "cache")},
        "task": {"kind": "classification"},
        "storage": str(folder / "runs"),
        "precision": "fp32",
    }
    return sdk.prepare(TrainJob.model_validate(fields | more), calibrate=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_a_token_that_the_model_does_not_know_are_refused(streaming: bool, given: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"text": "wheat <new8> exports", "label": ROWS[0]["label"]}]
    data = {
        "train": str(tmp_path / "train.csv"),
        "dev": str(tmp_path / "dev.csv"),
        "streaming": streaming,
        "cache_dir": str(tmp_path / "c"),
    }
    with pytest.raises(
        ModelError, match=r"data\.train has '<new8>', the tokenizer's token \d+, and the model has embeddings of \d+: .*wheat"
    ):
        prepare(given, rows, tmp_path, data=data)


def test_a_token_that_no_row_has_is_no_matter_unless_any_may_be_drawn(given: Path, tmp_path: Path) -> None:
    assert len(prepare(given, ROWS, tmp_path).splits.train.encoded) == len(ROWS)
    with pytest.raises(ModelError, match="any of which may be put in a masked one's place"):
        prepare(given, ROWS, tmp_path, task={"kind": "pretrain", "objective": {"kind": "masked"}})


def test_a_replica_refuses_the_text_and_answers_the_others(given: Path) -> None:
    labels = ["a", "b"]
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    meta = BundleMeta(name="topics", task=Classification(), labels=labels, max_length=32, precision="fp32", probes=[], lineage=lineage)
    engine = EncoderEngine(Encoder(), Bundle(Path("nowhere"), meta), predictor=load_predictor(given, labels, max_length=32))

    async def life() -> list[Any]:
        await engine.start()
        asked = [[Text("wheat")], [Text("wheat <new8> exports")], [Text("exports")]]
        found = await asyncio.gather(*map(engine.predict, asked), return_exceptions=True)
        engine.check_health()
        await engine.stop()
        return found

    first, error, other = asyncio.run(life())
    assert (len(first), len(other)) == (1, 1)
    assert isinstance(error, BadExample)
    assert "'<new8>', the tokenizer's token" in error.problem
