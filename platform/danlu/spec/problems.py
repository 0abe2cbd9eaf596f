"""What pydantic finds wrong with a spec, said for the one who wrote it: path, line, value, rule and what would work."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from danlu.errors import SpecError
from danlu.spec.base import DNS_LABEL, DNS_LABEL_RULE, MEMORY, MEMORY_RULE, MODEL_NAME, MODEL_NAME_RULE
from danlu.spec.hints import HINTS

Path = tuple[int | str, ...]

NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


@dataclass(frozen=True)
class _Written:
    """The document that was checked: its kind, its values, its YAML nodes, and what `--set` put into it."""

    kind: type[BaseModel]
    document: Mapping[str, Any]
    tree: yaml.Node | None
    settings: Mapping[tuple[str, ...], str]

    def setting(self, path: Path) -> tuple[str, ...] | None:
        """The last `--set` that put there what stands at a path."""
        names = tuple(map(str, path))
        return max((name for name in self.settings if name == names[: len(name)]), key=len, default=None)

    def node(self, path: Path) -> tuple[yaml.Node | None, int | None]:
        """The YAML node at a path, and the line of it or of the nearest parent that stands in the file."""
        node, line = self.tree, None
        for part in path:
            if isinstance(node, yaml.MappingNode):
                found = [(key, value) for key, value in node.value if key.value == str(part)]
                if not found:
                    return None, line
                line, node = found[0][0].start_mark.line + 1, found[0][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
        return node, line

    def text(self, path: Path) -> str | None:
        """The scalar at a path as it was written."""
        if (name := self.setting(path)) is not None:
            return self.settings[name] if len(name) == len(path) else None
        node, _ = self.node(path)
        return node.value if isinstance(node, yaml.ScalarNode) else None

    def variants(self, path: Path) -> list[type[BaseModel]]:
        """The spec classes that may stand at a path; more than one where a union is tagged by `kind`."""
        models: list[type[BaseModel]] = [self.kind]
        place: Any = self.document
        for part in path:
            model = _tagged(models, place)
            place = _inside(place, part)
            if isinstance(part, int):  # an item of a list: what a list is of stands in its annotation
                continue
            if part not in model.model_fields:
                return []
            if not (models := list(_models_in(model.model_fields[part].annotation))):
                return []
        return models

    def model(self, path: Path) -> type[BaseModel] | None:
        """The spec class that stands at a path."""
        place: Any = self.document
        for part in path:
            place = _inside(place, part)
        models = self.variants(path)
        return _tagged(models, place) if models else None


def spec_error(
    kind: type[BaseModel],
    error: ValidationError,
    document: Mapping[str, Any],
    tree: yaml.Node | None,
    source: str,
    settings: Mapping[tuple[str, ...], str],
) -> SpecError:
    """Everything pydantic found, as one error. `settings` are the `--set` texts by path."""
    written = _Written(kind, document, tree, settings)
    groups: dict[Path, list[ErrorDetails]] = {}
    for problem in error.errors():
        groups.setdefault(_yaml_path(problem["loc"], document), []).append(problem)
    # A union of a text and a list reports both; of a list with a bad item, only the item counts.
    inner = [path for path in groups if not (_is_type(groups[path]) and any(path == other[: len(path)] != other for other in groups))]
    lines = [_describe(written, path, groups[path]) for path in inner]
    if len(lines) == 1:
        where, told, fix = lines[0]
        return SpecError(told, where=f"{source}: {where}" if where else source, fix=fix)
    text = "".join(f"\n  {where}: {told}" + (f"\n    try: {fix}" if fix else "") for where, told, fix in lines)
    return SpecError(f"{len(lines)} problems{text}", where=source)


def _is_type(problems: Sequence[ErrorDetails]) -> bool:
    return all(problem["type"] in NEEDED or problem["type"] == "literal_error" for problem in problems)


def _describe(written: _Written, path: Path, problems: Sequence[ErrorDetails]) -> tuple[str, str, str]:
    """(path and line, what is wrong, what would work)."""
    problem = problems[0]
    code, value, context = problem["type"], problem.get("input"), problem.get("ctx", {})
    where = ".".join(map(str, path)) + _origin(written, path)
    if code == "extra_forbidden":
        return where, "there is no such field here", _meant(written, path)
    if code == "missing":
        return where, "this field is needed", ""
    if code in ("union_tag_invalid", "union_tag_not_found"):
        choices = _tags(written, path)
        if code == "union_tag_not_found":
            return where, "`kind` is needed", f"kind: {' or '.join(choices)}"
        return where, f"there is no kind {context['tag']!r}", _near(str(context["tag"]), choices) or f"kind: {' or '.join(choices)}"
    if code == "literal_error" and len(problems) == 1:
        expected = str(context["expected"])
        rule = f"is none of {expected}" if " or " in expected else f"is not {expected}, the only choice here"
        return where, f"{_shown(value)} {rule}", _near(str(value), re.findall(r"'([^']*)'", expected))
    if code == "value_error":
        return where, problem["msg"].removeprefix("Value error, "), ""
    if _is_type(problems):
        nouns = [NEEDED.get(each["type"]) or str(each["ctx"]["expected"]) for each in problems]
        return where, f"{_shown(value, written.text(path))}: {' or '.join(nouns)} is needed", _as_intended(written, path, code, value)
    meant = _as_written(context["pattern"], value) if code == "string_pattern_mismatch" else _as_intended(written, path, code, value)
    return where, f"{_shown(value, written.text(path))}: {_rule(problem)}", meant


def _origin(written: _Written, path: Path) -> str:
    if written.setting(path) is not None:
        return " (--set)"
    node, line = written.node(path)
    if path and node is None and any(name[: len(path)] == tuple(map(str, path)) for name in written.settings):
        return " (--set)"
    return f" (line {line})" if line else ""


RULES = {DNS_LABEL: DNS_LABEL_RULE, MEMORY: MEMORY_RULE, MODEL_NAME: MODEL_NAME_RULE}


def _rule(problem: ErrorDetails) -> str:
    code, context = problem["type"], problem.get("ctx", {})
    if code == "string_pattern_mismatch" and (rule := RULES.get(context["pattern"])):
        return rule
    if code == "string_too_short":
        return "it should not be empty"
    if code == "too_short":
        return f"it has {context['actual_length']} items and should have at least {context['min_length']}"
    return problem["msg"].replace("Input should", "it should")


def _shown(value: object, text: str | None = None) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "nothing"
    return repr(value) if isinstance(value, str) else text or str(value)


def _as_intended(written: _Written, path: Path, code: str, value: object) -> str:
    """The value that was probably meant."""
    match code, value:
        case (("int_type" | "float_type" | "int_from_float"), str() | float()):
            return _number(str(value), whole=code != "float_type", quoted=isinstance(value, str))
        case "string_type", _ if written.setting(path) is not None and (text := written.text(path)):
            return f"--set '{'.'.join(map(str, path))}=\"{text}\"'"
        case "string_type", bool() | int() | float():
            return f'in quotes: "{written.text(path) or value}"'
        case (("model_type" | "model_attributes_type"), str()):
            if value in (tags := _tags(written, path)):
                return f"{path[-1]}: {{kind: {value}}}"
            if tags:
                return f"{path[-1]}: {{kind: ...}} with {' or '.join(tags)}"
            model = written.model(path)
            required = [name for name, field in model.model_fields.items() if field.is_required()] if model else []
            return f"{path[-1]}: {{{required[0]}: {value}}}" if len(required) == 1 else ""
    return ""


def _as_written(pattern: str, value: str) -> str:
    """The nearest text that a pattern takes, or nothing."""
    if pattern == MEMORY:
        amount = re.fullmatch(r"([0-9.]+) ?([MGT])i?B?", value, re.IGNORECASE)
        if amount is None or not _number(amount[1], whole=False, quoted=False):
            return ""
        number, unit = float(amount[1]), "MGT".index(amount[2].upper())
        while not number.is_integer() and unit:
            number, unit = number * 1024, unit - 1
        return f"{int(number)}{'MGT'[unit]}i" if number >= 1 else ""
    label = re.sub(r"[^a-z0-9]+", "-", value.lower()).lstrip("-0123456789")[:47].rstrip("-")
    found = (re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:63], label)
    return next((text for text in found if text and re.fullmatch(pattern, text)), "")


def _number(text: str, *, whole: bool, quoted: bool) -> str:
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    if whole and not (number.is_integer() and abs(number) < 1e15):
        return ""
    return f"{int(number) if number.is_integer() and abs(number) < 1e15 else number:.15g}" + (", without quotes" if quoted else "")


def _meant(written: _Written, path: Path) -> str:
    """What a misspelt, misplaced or foreign name stands for."""
    *here, name = path
    name = str(name)
    models = written.variants(tuple(here))
    model = written.model(tuple(here))
    prefix = "".join(f"{part}." for part in here)
    allowed = list(model.model_fields) if model else []
    everywhere = [path for path in _all_paths(written.kind) if path != prefix + name]
    if owners := [other for other in models if name in other.model_fields]:
        kind = model.model_fields["kind"].default if model else None
        return f"only kind: {' or '.join(other.model_fields['kind'].default for other in owners)} has it, and this is kind: {kind}"
    if hint := _hint(name, everywhere):
        return f"here that is {hint}"
    if elsewhere := [path for path in everywhere if path.rpartition(".")[2] == name]:
        return f"it belongs at {' or '.join(elsewhere[:3])}"
    if near := difflib.get_close_matches(name, allowed, n=1, cutoff=0.75):
        return f"did you mean {prefix}{near[0]}?"
    ends = {path.rpartition(".")[2]: path for path in everywhere}
    if near := difflib.get_close_matches(name, ends, n=1, cutoff=0.8):
        return f"did you mean {ends[near[0]]}?"
    return f"fields here: {', '.join(allowed)}" if allowed else ""


def _hint(name: str, paths: Sequence[str]) -> str:
    """What another tool's name is called here, if this kind of spec has it."""
    hint = HINTS.get(name, "")
    field = re.match(r"[a-z_.]+", hint)
    if not hint or field is None or hint.startswith("nothing"):
        return hint
    full = next((path for path in paths if path == field[0] or path.endswith("." + field[0])), None)
    return f"{full}{hint[field.end() :]}" if full else ""


def _near(value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1)
    return f"did you mean {near[0]}? choices: {', '.join(choices)}" if near else ""


def _tags(written: _Written, path: Path) -> list[str]:
    models = written.variants(path)
    return [str(model.model_fields["kind"].default) for model in models if "kind" in model.model_fields] if len(models) > 1 else []


def _tagged(models: Sequence[type[BaseModel]], place: object) -> type[BaseModel]:
    tag = place.get("kind") if isinstance(place, Mapping) else None
    return next((model for model in models if "kind" in model.model_fields and model.model_fields["kind"].default == tag), models[0])


def _yaml_path(location: tuple[int | str, ...], document: Any) -> Path:
    """pydantic's location without the tags of unions, which do not stand in the file."""
    path: list[int | str] = []
    place = document
    for i, part in enumerate(location):
        last = i + 1 == len(location)
        if (isinstance(place, Mapping) and part in place) or (isinstance(place, list) and isinstance(part, int) and part < len(place)):
            path.append(part)
            place = _inside(place, part)
        elif last and isinstance(place, Mapping) and "[" not in str(part) and part != place.get("kind"):
            path.append(part)
    return tuple(path)


def _inside(place: Any, part: int | str) -> Any:
    if isinstance(place, Mapping):
        return place.get(part)
    return place[part] if isinstance(place, list) and isinstance(part, int) and part < len(place) else None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list):
        for part in typing.get_args(annotation):
            yield from _models_in(part)


def _all_paths(kind: type[BaseModel], prefix: str = "") -> list[str]:
    paths: dict[str, None] = {}
    for name, field in kind.model_fields.items():
        paths[prefix + name] = None
        for model in _models_in(field.annotation):
            paths.update(dict.fromkeys(_all_paths(model, f"{prefix}{name}.")))
    return list(paths)
