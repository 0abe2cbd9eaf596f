"""The grammar of an answer that may call tools: text as it comes, and calls whose arguments follow their schemas. Pure.

It is llguidance's Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md). Whatever it lets through is read by
`danlu.serve.openai.tools.ToolCallParser` either as text or as a call that is written out here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from danlu.serve.openai.tools import CLOSE, OPEN, PYTHON_TAG

Schema = Mapping[str, Any]

JSON: dict[str, Any] = {"whitespace_pattern": r"( |\n {0,16})?"}
"""Between two parts of a document: a space, or a new line and its indentation. Without a limit a model can write spaces for ever."""

SPACE = r"[ \t\n\r]{0,16}"
ANY = r"(.|\n)*"
# The parser's notion of a space is Python's, and so is this one, which says what is no text.
_WHITE = r"[\s\x1c-\x1f]*"


@dataclass(frozen=True)
class Markers:
    """Tokens of a vocabulary that stand for a whole marker, as ids: a grammar of texts does not let them through by itself."""

    open: frozenset[int] = frozenset()
    close: frozenset[int] = frozenset()
    before: frozenset[int] = frozenset()
    """Those that may stand before a call without tags: the Python tag; and an opening tag that texts do not show."""
    after: frozenset[int] = frozenset()
    """A closing tag that texts do not show."""
    others: frozenset[int] = frozenset()
    """Those that texts show and that mark no call, such as `<think>`."""

    hide_tags: bool = False
    """Whether a call with tags cannot be told from text: one of them is a token that is not shown."""


def tool_grammar(tools: Mapping[str, Schema], answer: Schema | None, markers: Markers) -> str:
    """Of tools by name, each with the schema of its arguments. With the schema of an `answer` what is no call is a document of that kind,
    and all calls have their tags; else it is any text."""
    lines = ["%llguidance {}", ""]
    lines += _answering(markers) if answer is not None else _talking(len(tools), markers)
    if not markers.hide_tags:
        lines.append("call: " + " | ".join(f"HEAD_{i} arguments_{i} close" for i in range(len(tools))))
        lines.append(f"close: CLOSE{_or('BRACE', markers.close)}")
    for i, (name, schema) in enumerate(tools.items()):
        lines.append(f"HEAD_{i}: /{SPACE}{_head(name)}/")
        lines.append(f"arguments_{i}: {_document(schema)}")
        if answer is None:
            lines.append(f"BARE_{i}: /{SPACE}({_text(PYTHON_TAG)})?{SPACE}{_head(name)}/")
    if answer is not None:
        lines.append(f"answer: {_document(answer)}")
    lines.append(rf"CLOSE: /{SPACE}\}}{SPACE}{_text(CLOSE)}/")
    lines.append(rf"BRACE: /{SPACE}\}}{SPACE}/")
    return "\n".join(lines) + "\n"


def answer_grammar(answer: Schema) -> str:
    """Of a document alone."""
    return f"%llguidance {{}}\n\nstart: {_document(answer)}\n"


def _answering(markers: Markers) -> list[str]:
    """A document, or calls and nothing between them."""
    return [
        "start: answer | opened call (opened call)*",
        f"opened: OPEN{_or('SPACES', markers.open)}",
        f"OPEN: /{SPACE}{_text(OPEN)}/",
        f"SPACES: /{SPACE}/",
    ]


def _talking(num_tools: int, markers: Markers) -> list[str]:
    """Text with calls in it; or calls alone, without their tags."""
    other, tag, after = _ids(markers.others), _ids(markers.before), _ids(markers.after)
    # Behind a token that is a marker of its own a text goes on as it likes: only its beginning can be a call without a tag.
    first, more = ("FIRST", "MORE") if not other else (f"FIRST ({other} MORE)*", f"MORE ({other} MORE)*")
    opened = ["first_open", *([f"FIRST ({other} MORE)* {other} more_open"] if other else [])]
    again = ["more_open", *([f"MORE ({other} MORE)* {other} more_open"] if other else [])]
    if markers.open:
        opened.append(f"{first} {_ids(markers.open)}")
        again.append(f"{more} {_ids(markers.open)}")
    bare = " | ".join(f"BARE_{i} arguments_{i} END{after and f' {after}?'}" for i in range(num_tools))
    # What the parser takes for the head of a call, or may: one with another name's arguments would pass by unread.
    head = rf'{_WHITE}({_text(PYTHON_TAG)})?{_WHITE}\{{{_WHITE}"(type|name|arguments|parameters)"{ANY}'
    unopened = f"/{ANY}/ & ~/{ANY}{_text(OPEN)}{ANY}/"
    calls = [
        "calls: opened call (again call)* more",
        f"more: {more}",
        f"opened: {' | '.join(opened)}",
        f"again: {' | '.join(again)}",
        f"first_open[lazy]: /{ANY}{_text(OPEN)}/ & ~/{head}/",
        f"more_open[lazy]: /{ANY}{_text(OPEN)}/",
    ]
    return [
        f"start: {tag and f'{tag}? '}({'' if markers.hide_tags else 'calls | '}bares | first)",
        *([] if markers.hide_tags else calls),
        f"bares: bare (SEPARATOR?{f' {tag}?' if tag else ''} bare)*",
        f"bare: {bare}",
        f"first: {first}",
        f"FIRST: {unopened} & ~/{head}/",
        f"MORE: {unopened}",
        rf"END: /{SPACE}\}}/",
        f"SEPARATOR: /{SPACE}[;,]/",
    ]


def _head(name: str) -> str:
    """A call up to its arguments, behind the spaces before it."""
    kind = rf'"type"{SPACE}:{SPACE}"function"{SPACE},{SPACE}'
    return rf'\{{{SPACE}({kind})?"name"{SPACE}:{SPACE}"{_text(name)}"{SPACE},{SPACE}"(arguments|parameters)"{SPACE}:{SPACE}'


def _document(schema: Schema) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON})


def _text(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace(r"\-", "-")


def _or(before: str, ids: frozenset[int]) -> str:
    return f" | {before} {_ids(ids)}" if ids else ""


def _ids(ids: Iterable[int]) -> str:
    """As Lark names tokens: `<[5,9-12]>`; nothing for none."""
    ranges: list[list[int]] = []
    for one in sorted(ids):
        if ranges and one == ranges[-1][1] + 1:
            ranges[-1][1] = one
        else:
            ranges.append([one, one])
    return f"<[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in ranges)}]>" if ranges else ""
