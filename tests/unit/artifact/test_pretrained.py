"""A model's folder is found wherever it is; what is missing or damaged is said before anything loads."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

from danlu.artifact.pretrained import model_folder, weight_shapes
from danlu.errors import ModelError
from danlu.spec.model import Model


def find(name: str | Path, **options: Any) -> Path:
    return model_folder(Model(model_name_or_path=str(name)), **options)


def refusal(name: str | Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as raised:
        find(name, **options)
    assert raised.value.where == "model.model_name_or_path"
    return raised.value


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_folder_is_found_by_path_uri_and_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(folder) == find(f"file://{folder}") == folder
    package = tmp_path / "packages" / "a_package_with_a_model"
    shutil.copytree(folder, package / "model")
    (package / "__init__.py").write_text("raise AssertionError('looked up, never run')")
    monkeypatch.syspath_prepend(package.parent)
    assert find("pkg://a_package_with_a_model/model") == package / "model"
    monkeypatch.chdir(tmp_path)
    assert find("model") == find("./model") == folder


def test_a_revision_of_what_is_no_hub_id_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for name in (folder, f"file://{folder}", "pkg://a_package/model", "model", "s3://bucket/model"):
        with pytest.raises(ModelError, match=r"revision=main has no effect: .* is a folder") as told:
            model_folder(Model(model_name_or_path=str(name), revision="main"))
        assert told.value.where == "model.revision"
    with pytest.raises(ModelError, match="revision=main has no effect"):
        model_folder(Model(model_name_or_path="org/name", revision="main"), need_weights=False)
    with pytest.raises(ModelError, match="the model hub did not give it"):
        model_folder(Model(model_name_or_path="org/name", revision="main"))


def test_shapes_are_those_of_the_loaded_weights(folder: Path) -> None:
    shapes = weight_shapes(folder)
    assert shapes is not None
    model = AutoModel.from_pretrained(folder)
    assert {name: weight.shape for name, weight in shapes.items()} == {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert sum(weight.num_elements for weight in shapes.values()) == model.num_parameters()
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    assert weight_shapes(folder / "sharded") == shapes
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {name: weight.dtype for name, weight in shapes.items()} == {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_what_a_folder_lacks_is_said(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere" / "else").problem
    assert "hub id" in refusal(tmp_path / "nowhere" / "else").fix
    assert "is a file, not a folder" in refusal(folder / "config.json").problem
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    error = refusal(folder)
    assert "has a config.json but no weights" in error.problem
    assert "model.safetensors" in error.fix
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder).problem


@pytest.mark.parametrize("size", [0, 5, 8, 200, -1])
def test_truncated_weights_are_found_before_they_are_loaded(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    error = refusal(folder)
    assert error.problem == f"{path} is not a whole safetensors file"
    assert "again" in error.fix


def test_a_git_lfs_pointer_is_called_one(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 90868376\n")
    error = refusal(folder)
    assert "git-lfs pointer" in error.problem
    assert "git lfs pull" in error.fix


def test_a_missing_shard_is_found(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder / "sharded", max_shard_size="20KB")
    shard = sorted((folder / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    assert str(shard) in refusal(folder / "sharded").problem
    (folder / "sharded" / "model.safetensors.index.json").write_text("{")
    assert "index.json" in refusal(folder / "sharded").problem


@pytest.mark.parametrize("text", ["[]", '{"weight_map": []}', '{"weight_map": 3}'])
def test_an_index_of_another_shape_is_found(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "does not list the weight files" in refusal(folder).problem


@pytest.mark.parametrize("header", ["[]", '{"a": 3}', '{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}', '{"a": {}}'])
def test_a_header_of_another_shape_is_found(header: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert "is not a whole safetensors file" in refusal(folder).problem


def test_an_adapter_is_called_one(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    error = refusal(folder)
    assert "holds an adapter" in error.problem
    assert "merge it into its base" in error.fix


def test_weights_of_another_format_have_no_shapes_and_are_whole(folder: Path) -> None:
    weights = folder / "pytorch_model.bin"
    torch.save(AutoModel.from_pretrained(folder).state_dict(), weights)
    (folder / "model.safetensors").unlink()
    assert find(folder) == folder
    assert weight_shapes(folder) is None
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": weights.name, "b": "pytorch_model-2.bin"}}))
    assert "pytorch_model-2.bin cannot be read" in refusal(folder).problem
    (folder / "pytorch_model.bin.index.json").unlink()
    os.truncate(weights, weights.stat().st_size // 2)
    assert refusal(folder).problem == f"{weights} is not whole"
    weights.write_bytes(b"")
    assert refusal(folder).problem == f"{weights} is not whole"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 90868376\n")
    assert "git-lfs pointer" in refusal(folder).problem


def upload(folder: Path, to: str) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"{to}/{path.name}", path.read_bytes())


def test_a_storage_uri_is_downloaded_once(folder: Path, tmp_path: Path) -> None:
    upload(folder, "/pretrained/tiny")
    local = find("memory://pretrained/tiny", cache_dir=tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in local.iterdir()} == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [local.name]
    fsspec.filesystem("memory").rm("/pretrained", recursive=True)
    assert find("memory://pretrained/tiny", cache_dir=tmp_path / "cache") == local


def test_a_download_that_is_not_whole_is_not_kept(folder: Path, tmp_path: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    upload(folder, "/pretrained/broken")
    error = refusal("memory://pretrained/broken", cache_dir=tmp_path / "cache")
    assert error.problem == "memory://pretrained/broken/model.safetensors is not a whole safetensors file"
    assert list((tmp_path / "cache").iterdir()) == []
    fsspec.filesystem("memory").pipe_file("/pretrained/broken/model.safetensors", weights)
    assert find("memory://pretrained/broken", cache_dir=tmp_path / "cache").is_dir()


def test_workers_that_download_at_once_all_get_it(folder: Path, tmp_path: Path) -> None:
    gate, found, failures = threading.Barrier(6), [], []

    def worker() -> None:
        try:
            gate.wait(timeout=10)
            found.append(find(f"local://{folder}", cache_dir=tmp_path / "cache"))
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=worker) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not failures
    assert len(found) == 6
    assert len(set(found)) == 1


def test_places_that_are_not_there_are_said(tmp_path: Path) -> None:
    assert "does not exist or is no folder" in refusal("memory://pretrained/nothing", cache_dir=tmp_path).problem
    assert "Protocol not known: nosuchscheme" in refusal("nosuchscheme://bucket/model", cache_dir=tmp_path).problem
    assert "pip install no-such-package" in refusal("pkg://no_such_package/model").fix


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "no-such-model", "not a valid/hub id"])
def test_a_hub_id_without_a_network_is_refused_at_once(name: str) -> None:
    began = time.perf_counter()
    error = refusal(name)
    assert f"'{name}' is no local folder, and the model hub did not give it" in error.problem
    assert "HF_ENDPOINT" in error.fix
    assert time.perf_counter() - began < 5
