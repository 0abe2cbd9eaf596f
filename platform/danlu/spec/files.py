"""Specs in and out of YAML, `--set a.b=c`, and errors that name the path, the line, the value, the rule and what would work."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from danlu.errors import SpecError
from danlu.spec.base import Spec
from danlu.spec.hints import HINTS

S = TypeVar("S", bound=Spec)

PLAIN = {
    "int_type": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "string_type": "a text is needed; quote it if it looks like a number",
    "bool_type": "true or false is needed",
    "list_type": "a list is needed",
    "dict_type": "a mapping is needed",
    "model_type": "a mapping is needed",
    "model_attributes_type": "a mapping is needed",
    "missing": "this field is needed",
    "union_tag_not_found": "`kind` is needed",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans, and no key twice."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)$|^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise SpecError(
                f"{key!r} stands twice, in lines {seen[key]} and {key_node.start_mark.line + 1}",
                where=f"line {key_node.start_mark.line + 1}",
            )
        seen[key] = key_node.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The spec in a file, with `a.b=c` overrides applied."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        names = [str(other) for pattern in ("*.yaml", "*.yml") for other in path.parent.glob(pattern)] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), names, n=1)
        raise SpecError(
            f"{path} does not exist", where="spec", fix=f"did you mean {near[0]}?" if near else "the path of a YAML file"
        ) from error
    except IsADirectoryError as error:
        raise SpecError(f"{path} is a folder", where="spec", fix="the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: byte {error.start} is not UTF-8", where="spec", fix="save the file as UTF-8") from error
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error}", where="spec") from error
    return parse(kind, text, overrides, source=str(path))


def parse(kind: type[S], text: str, overrides: Sequence[str] = (), *, source: str = "<text>") -> S:
    """The spec in a YAML text, with overrides applied; SpecError says everything that is wrong with it."""
    try:
        # Safe: _Loader is SafeLoader with other numbers.
        document = yaml.load(text, Loader=_Loader)
        tree = yaml.compose(text, Loader=_Loader)
    except SpecError as error:
        raise SpecError(error.problem, where=f"{source}, {error.where}", fix="keep one of them") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"not YAML: {getattr(error, 'problem', None) or error}", where=f"{source}{at}") from error
    if document is None:
        raise SpecError("the file is empty", where=source, fix=f"kind: {_kind_of(kind)}, name: ... (`danlu schema` says what may follow)")
    if not isinstance(document, dict):
        raise SpecError(f"a mapping is needed at the top, not a {type(document).__name__}", where=source)
    for override in overrides:
        _apply(document, override)
    if (said := document.get("kind")) is not None and said != _kind_of(kind):
        commands = {"train": "plan, train, evaluate, quantize, predict, run or serve", "service": "serve"}
        fix = f"`kind: {said}` is for `danlu {commands[said]}`" if said in commands else f"kind: {_kind_of(kind)}"
        raise SpecError(f"kind: {said!r}, but this command takes kind: {_kind_of(kind)}", where=source, fix=fix)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _spec_error(kind, error, document, tree, source) from error


def dump(spec: Spec) -> str:
    """YAML of what differs from the defaults; loads back equal."""
    document = spec.model_dump(mode="json", exclude_defaults=True)
    ordered = {name: document[name] for name in type(spec).model_fields if name in document}
    if "kind" in type(spec).model_fields:
        ordered = {"kind": getattr(spec, "kind"), **ordered}  # noqa: B009
    _keep_tags(spec, ordered)
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def _keep_tags(spec: BaseModel, document: dict[str, Any]) -> None:
    """A union's tag is its default and would be left out with the others."""
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if isinstance(value, BaseModel) and name in document:
            if "kind" in type(value).model_fields:
                document[name] = {"kind": value.kind, **{k: v for k, v in document[name].items() if k != "kind"}}  # type: ignore[attr-defined]
            _keep_tags(value, document[name])


def _kind_of(kind: type[Spec]) -> str:
    return str(kind.model_fields["kind"].default)


def _apply(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise SpecError(f"{override!r} is not of the form a.b=c", where="--set", fix="--set optim.learning_rate=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"the value of {override!r} is not YAML", where="--set", fix="quote it: --set 'name=\"a: b\"'") from error
    *parents, last = path.strip().split(".")
    place: Any = document
    for part in parents:
        if isinstance(place, list):
            place = place[_index(place, part, override)]
            continue
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict | list):
            raise SpecError(
                f"{override!r}: {part!r} holds {place!r}, which has no fields",
                where="--set",
                fix=f"--set {path.partition('.' + last)[0]}=...",
            )
    if isinstance(place, list):
        place[_index(place, last, override)] = value
    else:
        place[last] = value


def _index(place: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise SpecError(
            f"{override!r}: the list has {len(place)} items, and {part!r} is none of them", where="--set", fix=f"0 to {len(place) - 1}"
        )
    return int(part)


def _spec_error(kind: type[Spec], error: ValidationError, document: Mapping[str, Any], tree: yaml.Node | None, source: str) -> SpecError:
    lines = [_describe(kind, problem, document, tree) for problem in error.errors()]
    if len(lines) == 1:
        where, problem, fix = lines[0]
        return SpecError(problem, where=f"{source}: {where}" if where else source, fix=fix)
    text = "".join(f"\n  {where}: {problem}" + (f"\n    try: {fix}" if fix else "") for where, problem, fix in lines)
    return SpecError(f"{len(lines)} problems{text}", where=source)


def _describe(kind: type[Spec], problem: ErrorDetails, document: Mapping[str, Any], tree: yaml.Node | None) -> tuple[str, str, str]:
    """(path and line, what is wrong, what would work)."""
    path = _yaml_path(problem["loc"], document)
    line = _line(tree, path)
    where = ".".join(map(str, path)) + (f" (line {line})" if line else "")
    code, value = problem["type"], problem.get("input")
    if code == "extra_forbidden":
        model = _model_at(kind, path[:-1], document)
        return where, "there is no such field here", _meant(kind, model, str(path[-1]), path[:-1])
    if code == "missing":
        return where, "this field is needed", ""
    if code in ("union_tag_invalid", "union_tag_not_found"):
        choices = str(problem["ctx"].get("expected_tags", "")) or ", ".join(_tags(kind, path, document))
        tag = problem["ctx"].get("tag") if "ctx" in problem else None
        near = difflib.get_close_matches(str(tag), re.findall(r"\w+", choices), n=1) if tag is not None else []
        told = f"unknown kind {tag!r}" if tag is not None else "`kind` is needed"
        return where, told, f"did you mean {near[0]!r}? kinds: {choices}" if near else f"kind: one of {choices}"
    if code == "literal_error":
        expected = str(problem["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", expected), n=1)
        return where, f"{value!r} is none of {expected}", f"did you mean {near[0]!r}?" if near else ""
    if code == "value_error":
        return where, problem["msg"].removeprefix("Value error, "), ""
    rule = PLAIN.get(code) or problem["msg"].replace("Input should", "it should").replace("String should", "it should")
    shown = repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return where, f"{shown}: {rule}", _as_intended(code, value)


def _as_intended(code: str, value: object) -> str:
    if code in ("int_type", "float_type") and isinstance(value, str):
        try:
            return f"without quotes: {float(value):g}"
        except ValueError:
            return ""
    if code == "string_type" and isinstance(value, int | float):
        return f'in quotes: "{value}"'
    return ""


def _yaml_path(location: tuple[int | str, ...], document: Any) -> list[int | str]:
    """pydantic's location without the tags of unions, which do not stand in the file."""
    path: list[int | str] = []
    place = document
    for i, part in enumerate(location):
        last = i + 1 == len(location)
        if (isinstance(place, Mapping) and part in place) or (isinstance(place, list) and isinstance(part, int) and part < len(place)):
            path.append(part)
            place = _inside(place, part)
        elif last and isinstance(place, Mapping) and "[" not in str(part):
            path.append(part)
    return path


def _line(tree: yaml.Node | None, path: Sequence[int | str]) -> int | None:
    node, line = tree, None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                return line
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _model_at(kind: type[BaseModel], path: Sequence[int | str], document: Any) -> type[BaseModel] | None:
    """The spec class that stands at a path; a union's variant is told by its tag."""
    model: type[BaseModel] | None = kind
    place = document
    for part in path:
        place = _inside(place, part)
        if model is None or isinstance(part, int) or part not in model.model_fields:
            return None
        variants = _models_in(model.model_fields[part].annotation)
        tagged = [
            v
            for v in variants
            if isinstance(place, Mapping) and "kind" in v.model_fields and v.model_fields["kind"].default == place.get("kind")
        ]
        model = (tagged or variants or [None])[0]  # type: ignore[list-item]
    return model


def _inside(place: Any, part: int | str) -> Any:
    if isinstance(place, Mapping):
        return place.get(part)
    return place[part] if isinstance(place, list) and isinstance(part, int) and part < len(place) else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []


def _tags(kind: type[BaseModel], path: Sequence[int | str], document: Any) -> list[str]:
    parent = _model_at(kind, path[:-1], document)
    field = parent.model_fields.get(str(path[-1])) if parent and path else None
    return [str(model.model_fields["kind"].default) for model in _models_in(field.annotation)] if field else []


def _meant(kind: type[BaseModel], model: type[BaseModel] | None, name: str, here: Sequence[int | str]) -> str:
    """What a misspelt, misplaced or foreign name stands for."""
    allowed = list(model.model_fields) if model else []
    prefix = ".".join(map(str, here)) + "." if here else ""
    if near := difflib.get_close_matches(name, allowed, n=1, cutoff=0.75):
        return f"did you mean {prefix}{near[0]}?"
    if elsewhere := [path for path in _all_paths(kind) if path.rpartition(".")[2] == name and path != prefix + name]:
        return f"it belongs at {' or '.join(elsewhere[:3])}"
    if name in HINTS:
        return f"here that is {HINTS[name]}"
    everywhere = {path.rpartition(".")[2]: path for path in _all_paths(kind)}
    if near := difflib.get_close_matches(name, everywhere, n=1, cutoff=0.8):
        return f"did you mean {everywhere[near[0]]}?"
    return f"fields here: {', '.join(allowed)}"


def _all_paths(kind: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in kind.model_fields.items():
        paths.append(prefix + name)
        for model in _models_in(field.annotation):
            paths += [path for path in _all_paths(model, f"{prefix}{name}.") if path not in paths]
    return paths
