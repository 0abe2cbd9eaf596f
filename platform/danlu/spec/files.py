"""Specs in and out of YAML, and `--set a.b=c`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from danlu.errors import SpecError
from danlu.spec import yaml12
from danlu.spec.base import Spec
from danlu.spec.problems import spec_error

S = TypeVar("S", bound=Spec)


def load(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The spec in a file, with `a.b=c` overrides applied."""
    return parse(kind, read(path), overrides, source=str(path))


def read(path: str | Path) -> str:
    """The text of a spec file."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SpecError(f"{path} does not exist", where="spec", fix=_files_near(path)) from error
    except IsADirectoryError as error:
        raise SpecError(f"{path} is a folder", where="spec", fix="the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: byte {error.start} is not UTF-8", where="spec", fix="save the file as UTF-8") from error
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}", where="spec") from error


def parse(kind: type[S], text: str, overrides: Sequence[str] = (), *, source: str = "<text>") -> S:
    """The spec in a YAML text, with overrides applied; SpecError says everything that is wrong with it."""
    document, tree = yaml12.read(text, source)
    _check_mapping(document, (kind,), source)
    settings = dict(_apply(document, override) for override in overrides)
    _choose(document, (kind,), source)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise spec_error(kind, error, document, tree, source, settings) from error


def which(kinds: Sequence[type[Spec]], text: str, *, source: str = "<text>") -> type[Spec]:
    """The one of several kinds of spec that a YAML text is: by its `kind`, or without one by its fields."""
    document, _ = yaml12.read(text, source)
    _check_mapping(document, kinds, source)
    return _choose(document, kinds, source)


def dump(spec: Spec) -> str:
    """YAML of what differs from the defaults; loads back equal."""
    document = spec.model_dump(mode="json", exclude_defaults=True)
    ordered = {name: document[name] for name in type(spec).model_fields if name in document}
    if "kind" in type(spec).model_fields:
        ordered = {"kind": getattr(spec, "kind"), **ordered}  # noqa: B009
    _keep_tags(spec, ordered)
    return yaml12.write(ordered)


def _keep_tags(spec: BaseModel, document: dict[str, Any]) -> None:
    """A union's tag is its default and would be left out with the others."""
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if isinstance(value, BaseModel) and name in document:
            document[name] = _tagged(value, document[name])
        elif isinstance(value, list) and name in document:
            document[name] = [
                _tagged(part, written) if isinstance(part, BaseModel) else written
                for part, written in zip(value, document[name], strict=True)
            ]


def _tagged(spec: BaseModel, document: dict[str, Any]) -> dict[str, Any]:
    if "kind" in type(spec).model_fields:
        document = {"kind": spec.kind, **{k: v for k, v in document.items() if k != "kind"}}  # type: ignore[attr-defined]
    _keep_tags(spec, document)
    return document


def _files_near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    files = sorted(other for pattern in ("[!.]*.yaml", "[!.]*.yml") for other in path.parent.glob(pattern))
    near = difflib.get_close_matches(path.stem, [other.stem for other in files], n=1)
    if near:
        return f"did you mean {next(other for other in files if other.stem == near[0])}?"
    return (
        f"YAML files there: {', '.join(map(str, files[:5]))}"
        if files
        else "the path of a YAML file; `danlu schema train` says what may stand in one"
    )


def _kind_of(kind: type[Spec]) -> str:
    return str(kind.model_fields["kind"].default)


def _check_mapping(document: object, kinds: Sequence[type[Spec]], source: str) -> None:
    if document is None:
        said = " or ".join(f"kind: {_kind_of(kind)}" for kind in kinds)
        raise SpecError("the file is empty", where=source, fix=f"{said}, name: ... (`danlu schema` says what may follow)")
    if not isinstance(document, dict):
        shown = "a list" if isinstance(document, list) else repr(document)
        raise SpecError(f"a mapping of fields is needed at the top, not {shown}", where=source, fix="name: ... on a line of its own")


def _choose(document: Mapping[str, Any], kinds: Sequence[type[Spec]], source: str) -> type[Spec]:
    said = document.get("kind")
    if said is None:
        return max(kinds, key=lambda kind: len(document.keys() & kind.model_fields.keys()))
    for kind in kinds:
        if said == _kind_of(kind):
            return kind
    takes = " or ".join(f"kind: {_kind_of(kind)}" for kind in kinds)
    fix = takes
    if said in ("train", "service"):
        fix = "`danlu serve` takes it" if said == "service" else "`danlu train`, `plan`, `evaluate`, `predict`, `run` and `serve` take it"
    raise SpecError(f"kind: {said!r}, but this takes {takes}", where=source, fix=fix)


def _apply(document: dict[str, Any], override: str) -> tuple[tuple[str, ...], str]:
    """Set one field of the document; the field's path and the text it was set to."""
    name, equals, text = override.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or not all(path):
        raise SpecError(f"{override!r} is not of the form a.b=c", where="--set", fix="--set optim.learning_rate=1e-4")
    try:
        value, _ = yaml12.read(text, "its value")
    except SpecError as error:
        raise SpecError(f"{override!r}: {error.problem}", where="--set", fix=error.fix or _quoted(name, text)) from error
    place: Any = document
    for i, part in enumerate(path):
        last = i + 1 == len(path)
        if isinstance(place, list):
            index = _index(place, part, override)
            if last:
                place[index] = value
            place = place[index]
        elif isinstance(place, dict):
            if last:
                place[part] = value
            elif place.get(part) is None:
                place[part] = {}
            place = place[part]
        else:
            parent = ".".join(path[:i])
            raise SpecError(f"{override!r}: {parent} is {place!r}, which has no fields", where="--set", fix=f"--set {parent}=...")
    return path, text


def _index(place: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        raise SpecError(
            f"{override!r}: the list has {len(place)} items, and {part!r} is none of them",
            where="--set",
            fix=f"a number from 0 to {len(place) - 1}" if place else "set the whole list: a.b=[x, y]",
        )
    return int(part)


def _quoted(name: str, text: str) -> str:
    return f"quote it: --set '{name}=\"{text}\"'"
