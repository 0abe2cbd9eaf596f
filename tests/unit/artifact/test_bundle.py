"""A bundle says what it holds; what is half written, changed or of another format is refused."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from danlu.artifact.bundle import FILE, Bundle, BundleMeta, Lineage, Probe, canonical_json, read_bundle, text_digest, write_bundle
from danlu.errors import ModelError
from danlu.spec.compress import BnbNf4
from danlu.spec.task import Classification


def meta(**overrides: Any) -> BundleMeta:
    lineage = Lineage(
        spec={"name": "topics"}, spec_digest="s", data_digests={"train": "d"}, code_version="danlu 0", library_versions={"torch": "2"},
        seed=1, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    fields: dict[str, Any] = {
        "name": "topics",
        "task": Classification(),
        "labels": ["grain", "ship", "交易"],
        "max_length": 32,
        "precision": "fp32",
        "scores": {"test": {"accuracy": 0.1 + 0.2}},
        "probes": [Probe(text="a\u2028b", label="ship", probabilities=[0.1, 0.7, 0.2])],
        "lineage": lineage,
    }
    return BundleMeta(**(fields | overrides))


def make(folder: Path, meta: BundleMeta, weights: bytes = b"weights") -> Bundle:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    (folder / "model" / "config.json").write_text("{}")
    return write_bundle(folder, meta)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = make(tmp_path / "a", meta(quantization=BnbNf4(double_quant=False)))
    found = read_bundle(tmp_path / "a", verify=True)
    assert found == written
    assert found.meta.model_dump(exclude={"files", "digest"}) == meta(quantization=BnbNf4(double_quant=False)).model_dump(
        exclude={"files", "digest"}
    )
    assert set(found.meta.files) == {"model/model.safetensors", "model/config.json"}
    assert found.meta.files["model/model.safetensors"].sha256 == sha256(b"weights").hexdigest()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [FILE, "model"]


def test_the_same_content_has_the_same_digest_and_other_content_another(tmp_path: Path) -> None:
    first = make(tmp_path / "a", meta())
    later = meta().lineage.model_copy(update={"created": "2027-01-01T00:00:00+00:00"})
    assert make(tmp_path / "b", meta(version=7, lineage=later)).meta.digest == first.meta.digest
    assert write_bundle(tmp_path / "a", first.meta).meta.digest == first.meta.digest
    others = [
        make(tmp_path / "c", meta(), weights=b"Weights"), make(tmp_path / "d", meta(labels=["ship", "grain", "交易"])),
        make(tmp_path / "e", meta(probes=[])), make(tmp_path / "f", meta(lineage=later.model_copy(update={"seed": 2}))),
    ]  # fmt: skip
    assert len({first.meta.digest, *(bundle.meta.digest for bundle in others)}) == 5


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    make(tmp_path, meta())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weightS")
    read_bundle(tmp_path)  # of the same size: only contents tell
    with pytest.raises(ModelError, match=r"model\.safetensors is not what was written") as raised:
        read_bundle(tmp_path, verify=True)
    assert raised.value.fix
    (tmp_path / "model" / "model.safetensors").write_bytes(b"w")
    with pytest.raises(ModelError, match=r"model\.safetensors is not what was written"):
        read_bundle(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        read_bundle(tmp_path)


def test_a_half_written_bundle_is_none(tmp_path: Path) -> None:
    make(tmp_path, meta())
    (tmp_path / FILE).unlink()
    with pytest.raises(ModelError, match=r"is no bundle: it has no bundle\.json, which is written last"):
        read_bundle(tmp_path)
    with pytest.raises(ModelError, match="is no bundle"):
        read_bundle(tmp_path / "model" / "config.json")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text[: len(text) // 2], "bundle.json is damaged"),
        (lambda text: "", "bundle.json is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2; this Danlu reads format 1"),
        (lambda text: json.dumps({name: value for name, value in json.loads(text).items() if name != "labels"}), "labels"),
        (lambda text: "[]", "does not say what a bundle says"),
    ],
)
def test_a_bundle_json_that_says_something_else_is_refused(tmp_path: Path, change: Any, problem: str) -> None:
    make(tmp_path, meta())
    before = (tmp_path / FILE).read_text()
    after = change(before)
    assert after != before
    (tmp_path / FILE).write_text(after)
    with pytest.raises(ModelError, match=problem):
        read_bundle(tmp_path)


def test_canonical_json_is_one_text_for_equal_values() -> None:
    assert canonical_json({"b": [1, "中"], "a": None}) == '{"a":null,"b":[1,"中"]}' == canonical_json({"a": None, "b": [1, "中"]})
    assert text_digest("中") == sha256("中".encode()).hexdigest()
