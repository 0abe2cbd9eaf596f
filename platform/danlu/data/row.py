"""A row as it is read, the line it begins at, and what in it can be kept."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from danlu.data.json_text import is_whole
from danlu.errors import DataError


@dataclass(frozen=True)
class Row:
    """A row: its values by column, the file it stands in and the line (of parquet, Arrow and hub ids: the row) it begins at, from 1."""

    values: dict[str, Any]
    source: str
    line: int


@dataclass(frozen=True)
class Broken:
    """A row that cannot be taken as it is; `repaired` is what it most likely was meant to be, or None where that is not plain."""

    reason: str
    source: str
    line: int
    repaired: dict[str, Any] | None = None

    def refusal(self, where: str) -> DataError:
        """The error of whoever takes no broken row."""
        return DataError(
            f"{self.source}, line {self.line}: {self.reason}",
            where=where,
            fix="correct that line, or let a step of data.clean drop or repair such rows: {kind: drop_broken} or {kind: repair_broken}",
        )


def sound(row: Row | Broken) -> Row | Broken:
    """The row with values that JSON can hold; broken if a text holds half a character, which no tokenizer takes."""
    if isinstance(row, Broken):
        return row if row.repaired is None else Broken(row.reason, row.source, row.line, _plain(row.repaired, []))
    wrong: list[str] = []
    values = _plain(row.values, wrong)
    return Broken(wrong[0], row.source, row.line, values) if wrong else Row(values, row.source, row.line)


def _plain(value: Any, wrong: list[str]) -> Any:
    match value:
        case str():
            if is_whole(value):
                return value
            wrong.append("a text holds half of a surrogate pair, which is no character")
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case None | bool() | int():
            return value
        case float():
            return None if math.isnan(value) else value
        case dict():
            return {str(name): _plain(inner, wrong) for name, inner in value.items()}
        case list() | tuple():
            return [_plain(inner, wrong) for inner in value]
        case bytes():
            text, told = decoded(value)
            if told:
                wrong.append(told)
            return text
        case datetime.date() | datetime.time():
            return value.isoformat()
        case Decimal():
            return float(value)
        case _:
            return _plain(value.item(), wrong) if hasattr(value, "item") else str(value)


def strings(value: object) -> Iterator[str]:
    """Every text in a value, however deep."""
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from strings(inner)
        case list():
            for inner in value:
                yield from strings(inner)


def decoded(line: bytes) -> tuple[str, str | None]:
    """The text of a line, and what is wrong with its bytes. Bytes that are not UTF-8 are taken as GB18030 where they can be."""
    try:
        return line.decode("utf-8"), None
    except UnicodeDecodeError as error:
        reason = f"byte {line[error.start]:#04x} is not UTF-8"
        for encoding in ("gb18030", "latin-1"):
            try:
                return line.decode(encoding), f"{reason} (it can be read as {encoding.upper()})"
            except UnicodeDecodeError:
                continue
        raise AssertionError("latin-1 decodes any bytes") from error


# Tables of cells
