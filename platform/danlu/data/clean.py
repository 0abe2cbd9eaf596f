"""The steps of `data.clean`: each takes a row and gives it back, changed or not, or nothing."""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from danlu.data.language import language
from danlu.data.near import Seen
from danlu.data.row_texts import row_text
from danlu.errors import DataError
from danlu.spec import data as spec

Values = dict[str, Any]
Step = Callable[[Values, int], Values | None]
"""(values, number of the row) -> the values that go on, or None if the row goes no further."""

CHANGES = (spec.StripMarkup, spec.Normalize)
"""Steps that change texts, and so apply to every split; the others leave out training rows."""

_FULL_WIDTH = {0xFF00 + i: 0x20 + i for i in range(1, 0x5F) if chr(0x20 + i).isalnum()} | {0x3000: 0x20}
_NO_WIDTH = dict.fromkeys([*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF, 0xAD])
_CONTROL = dict.fromkeys(i for i in range(0xA0) if (i < 32 or i > 126) and chr(i) not in "\t\n\r")
_UNSEEN = {code: None for code in (_NO_WIDTH | _CONTROL) if code not in (0x200C, 0x200D)}
"""U+200C and U+200D stay: between two visible signs they are part of emoji and of Indic letters."""
_LOST_TAG = re.compile(r"</?[A-Za-z][^<>\n]{0,200}$")


def make_step(
    step: spec.CleanStep, roles: Mapping[str, str], connection: sqlite3.Connection, number: int, *, where: str
) -> tuple[Step, Seen | None]:
    """The function of a step, and what it remembers. `number` is the step's place in the list, which names what it remembers."""
    match step:
        case spec.StripMarkup():
            return _changing(strip_markup, roles, step.kind, where), None
        case spec.Normalize():
            width, collapse = step.width, step.collapse_whitespace
            return _changing(lambda text: normalize(text, width=width, collapse_whitespace=collapse), roles, step.kind, where), None
        case spec.FilterLength():
            low, high = step.min_characters, step.max_characters
            return lambda values, _: values if low <= len(row_text(values, roles)) <= (high or 1 << 60) else None, None
        case spec.FilterLanguage():
            kept = frozenset(step.languages)
            return lambda values, _: values if language(row_text(values, roles)) in kept else None, None
        case spec.DeduplicateExact() | spec.DeduplicateNear():
            seen = Seen(connection, f"seen_{number}", step.threshold if isinstance(step, spec.DeduplicateNear) else None)
            return lambda values, at: values if seen.add(row_text(values, roles), at) is None else None, seen
        case spec.DropBroken() | spec.RepairBroken():
            return lambda values, _: values, None  # the reader has done it


def strip_markup(text: str) -> str:
    """The text of an HTML fragment: block elements end lines, scripts and styles say nothing."""
    if "<" not in text and "&" not in text:
        return text
    parser = _Text()
    parser.feed(_LOST_TAG.sub("", text))
    parser.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(parser.parts)).strip()


class _Text(HTMLParser):
    BLOCKS = frozenset(
        "p div br li ul ol tr table h1 h2 h3 h4 h5 h6 section article header footer blockquote pre hr".split()  # noqa: SIM905
    )
    SILENT = frozenset({"script", "style", "head", "template"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.silent += tag in self.SILENT
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in self.SILENT))
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data)


def normalize(text: str, *, width: str = "letters", collapse_whitespace: bool = True) -> str:
    """One width for letters and digits, one blank for many, no signs that cannot be seen."""
    if width == "all":
        text = unicodedata.normalize("NFKC", text)
    elif width == "letters":
        text = text.translate(_FULL_WIDTH)
    if collapse_whitespace:
        text = text.translate(_UNSEEN).replace("\r\n", "\n").replace("\r", "\n")
        text = "\n".join(re.sub(r"[^\S\n]+", " ", line).strip() for line in text.split("\n")).strip("\n")
    return text


def _changing(change: Callable[[str], str], roles: Mapping[str, str], kind: str, where: str) -> Step:
    def changed(value: Any) -> Any:
        match value:
            case str():
                return change(value)
            case {"answer_start": _} | {"start": _, "end": _} | [int(), int(), str()]:
                counted = "[start, end, ...]" if isinstance(value, list) else "answer_start" if "answer_start" in value else "start"
                raise DataError(
                    f"the step {kind} moves texts, and rows with `{counted}` count their characters",
                    where=where,
                    fix="leave that step out of data.clean for this task",
                )
            case list():
                return [changed(inner) for inner in value]
            case dict():
                return {name: changed(inner) for name, inner in value.items()}
            case _:
                return value

    def step(values: Values, _: int) -> Values:
        if "text" in roles:
            names = {roles[role] for role in ("text", "text_pair") if role in roles}
        else:
            names = values.keys() - {roles.get("label")}
        return {name: changed(value) if name in names else value for name, value in values.items()}

    return step


@dataclass(frozen=True)
class Cleaned:
    """What the steps did. `removed`: split -> step -> rows; `changed`: split -> step -> rows whose text another form was found for."""

    rows_in: Mapping[str, int] = field(default_factory=dict)
    rows_out: Mapping[str, int] = field(default_factory=dict)
    removed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    changed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reasons: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Split -> the first broken rows that were dropped or repaired, and why."""

    def text(self) -> str:
        """For the terminal."""
        lines = []
        for name in self.rows_in:
            lines.append(f"  {name:<6} {self.rows_in[name]:,} rows in the files, {self.rows_out.get(name, 0):,} kept")
            for verb, counts in (("removed", self.removed), ("changed", self.changed)):
                lines += [f"         {step}: {verb} {count:,}" for step, count in counts.get(name, {}).items() if count]
            lines += [f"         {reason}" for reason in self.reasons.get(name, ())]
        drawn = [f"{name} {number:,}" for name, number in self.rows_out.items() if name not in self.rows_in]
        return "\n".join(lines + ([f"         held out of train: {', '.join(drawn)}"] if drawn else []))
