"""The bundle: a model's folder with everything that says what it is, how it scored and what it must answer."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from danlu.errors import ModelError
from danlu.spec.base import Spec
from danlu.spec.compress import Quantization
from danlu.spec.task import Task
from danlu.spec.tuning import Tuning

FILE = "bundle.json"


class Probe(Spec):
    """A text and the answer that whoever serves the bundle must give: label and probabilities, the loss of the text, or what follows it."""

    text: str
    """Of a conversation: what the chat template makes of it, the generation prompt included."""
    input: dict[str, Any] = Field(default_factory=dict)
    """Of an encoder's bundle: what is asked, by the names of its task's example (`danlu.tasks.exchange`); `text` shows it."""
    label: str | None = None
    """What the answer says; empty where that is a vector."""
    probabilities: list[float] = Field(default_factory=list)
    """The numbers behind it."""
    margin: float = 0.0
    """How clearly it says that: up to twice the tolerance, rounding may change the label."""
    loss: float | None = None
    """Nats a token of the text, cut at the bundle's max_length."""
    messages: list[dict[str, Any]] = Field(default_factory=list)
    """A conversation that the assistant is asked to go on with, OpenAI's messages; empty for plain text."""
    tools: list[dict[str, Any]] = Field(default_factory=list)
    prompt_token_ids: list[int] = Field(default_factory=list)
    """What the model has read before the completion."""
    completion: str | None = None
    """The greedy continuation: every token the most probable one, in the precision the bundle was evaluated in."""
    completion_token_ids: list[int] = Field(default_factory=list)
    logprobs: list[float] = Field(default_factory=list)
    """Of the completion's tokens, natural logarithms."""


class Lineage(Spec):
    """Where a bundle came from."""

    spec: dict[str, Any]
    """The TrainJob, as JSON."""
    spec_digest: str
    data_digests: dict[str, str]
    code_version: str
    library_versions: dict[str, str]
    seed: int
    created: str
    """UTC, ISO 8601."""
    parent: str | None = None
    """Digest of the bundle this one was compressed from, or whose weights its training started from."""
    run: str | None = None
    """URI of the run."""
    cleaning: dict[str, dict[str, int]] | None = None
    """Split -> step of `data.clean` -> rows it removed; None where there were no steps."""


class FileDigest(Spec):
    """What a file has to be."""

    size: int
    sha256: str


class BundleMeta(Spec):
    """What `bundle.json` says."""

    format: Literal[1] = 1
    name: str
    version: int | None = None
    task: Task
    labels: list[str]
    """In the order of the model's outputs; empty for a language model."""
    max_length: int
    precision: Literal["fp32", "bf16"]
    """What the model was evaluated in."""
    weights: Literal["full", "adapter"] = "full"
    base_model: str | None = None
    """Of an adapter: the model it belongs to."""
    tuning: Tuning | None = None
    """Of an adapter: how it was trained, which says what its base has to be."""
    quantization: Quantization | None = None
    scores: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Split -> metric -> value."""
    probes: list[Probe] = Field(default_factory=list)
    lineage: Lineage
    files: dict[str, FileDigest] = Field(default_factory=dict)
    digest: str = ""
    """sha256 of the files and of all that is said here, but for the version and the time: the same content has the same digest."""


@dataclass(frozen=True)
class Bundle:
    """A whole bundle in a local folder; `model/` holds weights and tokenizer."""

    path: Path
    meta: BundleMeta


def write_bundle(folder: Path, meta: BundleMeta) -> Bundle:
    """Make `folder` a bundle: digests of its files, then bundle.json, last and at once."""
    files = {
        path.relative_to(folder).as_posix(): FileDigest(size=path.stat().st_size, sha256=file_digest(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE
    }
    meta = meta.model_copy(update={"files": files})
    meta = meta.model_copy(update={"digest": _content_digest(meta)})
    _write_atomically(folder / FILE, meta.model_dump_json(indent=1))
    return Bundle(folder, meta)


def read_bundle(folder: Path, *, verify: bool = False) -> Bundle:
    """The bundle in a folder. Sizes are always checked, contents with `verify`. ModelError if it is none or is damaged."""
    try:
        document = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(
            f"{folder} is no bundle: it has no {FILE}, which is written last", where="bundle", fix="name@alias, or train again"
        ) from error
    except ValueError as error:
        raise ModelError(f"{folder / FILE} is damaged: {error}", where="bundle", fix="an earlier version, or train again") from error
    if isinstance(document, dict) and document.get("format") != 1:
        raise ModelError(
            f"{folder} has the bundle format {document.get('format')!r}; this Danlu reads format 1", where="bundle", fix="a newer Danlu"
        )
    try:
        meta = BundleMeta.model_validate(document)
    except ValidationError as error:
        raise ModelError(f"{folder / FILE} does not say what a bundle says: {error}", where="bundle") from error
    for name, expected in meta.files.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path} is missing", where="bundle", fix="an earlier version, or copy the bundle again")
        if path.stat().st_size != expected.size or (verify and file_digest(path) != expected.sha256):
            raise ModelError(f"{path} is not what was written", where="bundle", fix="an earlier version, or copy the bundle again")
    return Bundle(folder, meta)


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: object) -> str:
    """One text for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def text_digest(text: str) -> str:
    """sha256 of a text."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _content_digest(meta: BundleMeta) -> str:
    said = meta.model_dump(mode="json", exclude={"digest": True, "version": True, "lineage": {"created"}})
    return text_digest(canonical_json(said))


def _write_atomically(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".bundle-", delete=False, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
