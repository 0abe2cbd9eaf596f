"""YAML as version 1.2 has it (https://yaml.org/spec/1.2.2/#103-core-schema): `2e-4` is a number, `yes`, `010` and `1:30` are not odd ones.

PyYAML speaks 1.1; here its safe reader gets 1.2's numbers and booleans, and no key may stand twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from danlu.errors import SpecError

_TAG = "tag:yaml.org,2002:"
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", "-+.0123456789"),
    ("merge", r"^<<$", "<"),
)
_FIXES = {
    "mapping values are not allowed here": 'quote a value that has ": " in it',
    "that cannot start any token": "indent with spaces, and quote a value that begins with a special character",
    "but found another document": "one spec a file: no second `---`",
}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, first in _SCALARS:
        for letter in [*first, ""] if name == "null" else first:
            table.setdefault(letter, []).append((_TAG + name, re.compile(pattern)))
    return table


class _Reader(yaml.SafeLoader):
    """1.2's numbers and booleans, JSON's types and no others, and no key twice."""

    yaml_implicit_resolvers = _resolvers()
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "str", "seq")
    }


class Writer(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something other than a text; also `n`, which Kubernetes' reader takes for false."""

    yaml_implicit_resolvers = {
        letter: [*yaml.SafeDumper.yaml_implicit_resolvers.get(letter, []), *_resolvers().get(letter, [])]
        for letter in {*yaml.SafeDumper.yaml_implicit_resolvers, *_resolvers()}
    }


Writer.add_implicit_resolver(_TAG + "bool", re.compile(r"^[yYnN]$"), list("yYnN"))


def read(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """The document and its nodes, which know their lines. SpecError names the line and the column of what is not YAML."""
    try:
        # Safe: _Reader is SafeLoader with other numbers and fewer types.
        return yaml.load(text, Loader=_Reader), yaml.compose(text, Loader=_Reader)
    except SpecError as error:
        raise SpecError(error.problem, where=f"{source}, {error.where}", fix=error.fix) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError(f"not YAML: a control character (#x{error.character:04x})", where=f"{source}, line {line}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = (error.problem or str(error)).removeprefix("but ")
        fix = next((fix for told, fix in _FIXES.items() if told in (error.problem or "")), "")
        raise SpecError(f"not YAML: {problem}", where=f"{source}{at}", fix=fix) from error
    except RecursionError as error:
        raise SpecError("not a spec: nested hundreds of levels deep", where=source) from error


def write(document: object) -> str:
    """YAML that 1.1 and 1.2 read alike, keys in their order."""
    return yaml.dump(document, Dumper=Writer, sort_keys=False, allow_unicode=True)


def _mapping(reader: _Reader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == _TAG + "merge":
            continue
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise SpecError("a mapping or a list stands where a name should", where=f"line {line}", fix='quote a template: "{{ name }}"')
        if key_node.tag != _TAG + "str":
            raise SpecError(f"{key_node.value} stands where a name should", where=f"line {line}", fix=f'in quotes: "{key_node.value}"')
        if (key := key_node.value) in seen:
            raise SpecError(f"{key!r} stands twice, in lines {seen[key]} and {line}", where=f"line {line}", fix="keep one of them")
        seen[key] = line
    # Only now: what `<<` brings in may be overridden.
    reader.flatten_mapping(node)
    return reader.construct_mapping(node, deep=True)


def _int(text: str) -> int:
    return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _bool(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _scalar(name: str, of: Callable[[str], object]) -> None:
    def construct(reader: _Reader, node: yaml.ScalarNode) -> object:
        text = reader.construct_scalar(node)
        try:
            return of(text.lower())
        except (ValueError, KeyError) as error:  # an explicit tag, or thousands of digits
            raise yaml.constructor.ConstructorError(problem=f"{text[:40]!r} is no {name}", problem_mark=node.start_mark) from error

    _Reader.add_constructor(_TAG + name, construct)


_Reader.add_constructor(_TAG + "map", _mapping)
for _name, _of in (("int", _int), ("float", _float), ("bool", _bool)):
    _scalar(_name, _of)
