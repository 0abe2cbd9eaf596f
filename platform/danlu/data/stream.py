"""Rows one by one, with the line each begins at: what a file larger than memory is read through, and what says which rows are broken.

Files are read in pieces; only `.json` (one document) and hub ids are held whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.artifact.uris import ObjectStoreError, open_file
from danlu.data import arrow, formats
from danlu.data.row import Broken, Row, decoded, sound
from danlu.errors import DataError

MAX_LINE = 64 << 20
"""Bytes of a line. A longer one is a file without line ends, or not text."""
MAX_RECORD_LINES = 1000
"""Lines of one csv row. A quote that is never closed would take in the rest of the file."""
_TOO_LONG = f"longer than {MAX_LINE >> 20} MiB: its end is missing, or it is no text"


@dataclass(frozen=True)
class Source:
    """What a path, glob, URI or hub id stands for: one file. `label_column` is the one the format itself marks as the class."""

    path: str
    format: str
    label_column: str | None = None


def find(source: str | Sequence[str], *, format: str = "auto", where: str = "data.train") -> list[Source]:
    """The files that are meant, each with its format; DataError for one that is missing, empty or of no known format."""
    found = []
    for one in [source] if isinstance(source, str) else source:
        if format == "hub" or (format == "auto" and formats._is_hub_id(one)):
            found.append(Source(one, "hub"))
            continue
        for path in formats._paths(one, where):
            with _opened(path, where) as file:
                start = _read(file, 1 << 16, path, where)
            if not start.removeprefix(b"\xef\xbb\xbf").strip():
                raise DataError(f"{path} is empty", where=where, fix="a file with at least a header and some rows")
            kind = format if format != "auto" else formats.told_format(path, start, where)
            label = _Tab(path, where).label if kind == "tab" else None
            found.append(Source(path, kind, label))
    return found


def stream(source: Source, *, where: str = "data.train") -> Iterator[Row | Broken]:
    """Every row of a file in its order. DataError only for what makes the whole file unreadable."""
    match source.format:
        case "csv":
            rows = _csv(source.path, where)
        case "tsv":
            rows = _Delimited(source.path, where).rows()
        case "tab":
            rows = _Tab(source.path, where).rows()
        case "jsonl":
            rows = _jsonl(source.path, where)
        case "json":
            rows = _json(source.path, where)
        case "parquet" | "arrow":
            tables = arrow.rows(source.path, source.format, where)
            rows = (Row(values, source.path, number) for number, values in enumerate(tables, 1))
        case "hub":
            table = formats._hub(source.path, None, where)
            rows = (Row({name: column[i] for name, column in table.columns.items()}, source.path, i + 1) for i in range(len(table)))
        case _:
            raise DataError(
                f"unknown format {source.format!r}", where="data.format", fix="auto, csv, tsv, jsonl, json, parquet, arrow, tab or hub"
            )
    yield from (sound(row) for row in rows)


def _opened(path: str, where: str) -> Any:
    try:
        return open_file(path)
    except ObjectStoreError:
        raise
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}", where=where, fix="check its permissions, or copy it again") from error


def _read(file: Any, size: int, path: str, where: str) -> bytes:
    try:
        data: bytes = file.read(size)
    except ObjectStoreError:
        raise
    except formats.UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}", where=where, fix="check its permissions, or copy it again") from error
    return data


def _lines(path: str, where: str) -> Iterator[tuple[int, bytes | None]]:
    """(number, line without its end); None for a line too long to be one. Only \\n ends a line, with \\r before it or without."""
    number, rest, skipping = 1, b"", False
    with _opened(path, where) as file:
        while chunk := _read(file, 1 << 20, path, where):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield number, None if skipping or len(line) > MAX_LINE else _bare(line, number)
                number, skipping = number + 1, False
            if len(rest) > MAX_LINE:
                rest, skipping = b"", True
    if rest or skipping:
        yield number, None if skipping else _bare(rest, number)


def _bare(line: bytes, number: int) -> bytes:
    line = line.removesuffix(b"\r")
    return line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


class _Delimited:
    """A tab-separated file, which is not quoted: an inch mark in it opens nothing."""

    def __init__(self, path: str, where: str) -> None:
        self.path, self.where = path, where
        self.header, self.skip = self._header()
        formats._check_header(self.header, path, where)

    def _header(self) -> tuple[list[str], int]:
        first = next(iter(self._split()), None)
        return ([name.strip() for name in first[1]], 1) if first else ([], 1)

    def _split(self) -> Iterator[tuple[int, list[str], str | None]]:
        """(line, cells, what is wrong) of the lines that are not empty."""
        for number, raw in _lines(self.path, self.where):
            if raw is None:
                yield number, [], _TOO_LONG
            elif raw:
                text, wrong = decoded(raw)
                yield number, text.split("\t"), wrong

    def rows(self) -> Iterator[Row | Broken]:
        for i, (line, cells, wrong) in enumerate(self._split()):
            if i >= self.skip:
                yield _cells(self.header, cells, wrong, self.path, line)


class _Tab(_Delimited):
    """Orange's tab files: up to three header rows."""

    label: str | None = None

    def _header(self) -> tuple[list[str], int]:
        first: list[list[str]] = []
        for _, cells, _ in self._split():
            first.append(cells)
            if len(first) == 3:
                break
        header, self.label, skip = formats.orange_header([name.strip() for name in first[0]], first[1:])
        return header, skip


def _csv(path: str, where: str) -> Iterator[Row | Broken]:
    csv.field_size_limit(1 << 30)
    header: list[str] | None = None
    for line, cells, wrong in _csv_records(path, where):
        if header is None:
            if wrong is not None:
                raise DataError(f"{path}, line {line}: {wrong}", where=where, fix="save the file as UTF-8, with a header row")
            header = [name.strip() for name in cells]
            formats._check_header(header, path, where)
        elif cells or wrong:
            yield _cells(header, cells, wrong, path, line)


def _csv_records(path: str, where: str) -> Iterator[tuple[int, list[str], str | None]]:
    """(line it begins at, cells, what is wrong) of each row. A quote that stays open costs its own line, not those after it."""
    lines = _lines(path, where)
    again: list[tuple[int, bytes | None]] = []
    while (now := again.pop() if again else next(lines, None)) is not None:
        number, raw = now
        if raw is None:
            yield number, [], _TOO_LONG
            continue
        text, wrong = decoded(raw)
        taken: list[tuple[int, bytes | None]] = []
        is_open = _is_open(text)
        while is_open and len(taken) < MAX_RECORD_LINES and (following := again.pop() if again else next(lines, None)) is not None:
            taken.append(following)
            if following[1] is None:
                break
            more, also_wrong = decoded(following[1])
            text, wrong = f"{text}\n{more}", wrong or also_wrong
            is_open = '"' not in more or _is_open(text)
        if is_open:
            again += reversed(taken)
            text, wrong = decoded(raw)
            yield number, [], wrong or "a quote is opened and never closed"
            continue
        try:
            rows = list(csv.reader([text.replace("\r\n", "\n")]))
        except csv.Error as error:
            yield number, [], f"not CSV: {error}"
            continue
        yield number, rows[0] if rows else [], wrong


def _is_open(text: str) -> bool:
    """True if the text ends inside a quoted cell."""
    if '"' not in text:
        return False
    try:
        list(csv.reader([text], strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _cells(header: Sequence[str], cells: list[str], wrong: str | None, path: str, line: int) -> Row | Broken:
    if not cells and wrong:
        return Broken(wrong, path, line)
    number = len(cells)
    while len(cells) > len(header) and not cells[-1].strip():
        cells = cells[:-1]
    fits = len(cells) <= len(header)
    values = dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=True)) if fits else None
    if number != len(header):
        also = f"; {wrong}" if wrong else ""
        return Broken(f"{number} cell{'s' if number != 1 else ''}, but the header has {len(header)}{also}", path, line, values)
    assert values is not None
    return Broken(wrong, path, line, values) if wrong else Row(values, path, line)


# Objects


def _jsonl(path: str, where: str) -> Iterator[Row | Broken]:
    for line, raw in _lines(path, where):
        if raw is None:
            yield Broken(_TOO_LONG, path, line)
        elif raw.strip():
            text, wrong = decoded(raw)
            yield _object(text, wrong, path, line)


def _object(text: str, wrong: str | None, path: str, line: int) -> Row | Broken:
    try:
        record = json.loads(text)
    except RecursionError:
        return Broken("nested too deeply to be a row", path, line)
    except ValueError as error:
        told = f"not JSON ({str(error).partition(': line')[0]}): {text[:60]!r}"
        return Broken(told if wrong is None else f"{told}; {wrong}", path, line, _mended(text))
    if not isinstance(record, dict):
        return Broken(f"an object is needed, not {_noun(record)}", path, line)
    return Row(record, path, line) if wrong is None else Broken(wrong, path, line, record)


def _mended(text: str) -> dict[str, Any] | None:
    """The object in a line that other programs' habits broke: a comma behind it, a control character inside a text."""
    try:
        record = json.loads(text.strip().removesuffix(",").strip("\x00\x1e"), strict=False)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _json(path: str, where: str) -> Iterator[Row | Broken]:
    with _opened(path, where) as file:
        raw = _read(file, -1, path, where)
    text = formats._decoded(raw, path, where)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        table, _ = formats._json(text, path, where)
        length = len(next(iter(table.values()), ()))
        yield from (Row({name: column[i] for name, column in table.items()}, path, i + 1) for i in range(length))
        return
    decoder, at, line, counted = json.JSONDecoder(), start + 1, 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # What follows cannot be told apart any more: where this item ends is what is broken.
            raise DataError(
                f"{path}, line {line}: not JSON: {str(error).partition(': line')[0]}",
                where=where,
                fix="one object a line is jsonl, of which single lines may be broken",
            ) from error
        yield Row(record, path, line) if isinstance(record, dict) else Broken(f"an object is needed, not {_noun(record)}", path, line)


def stem(source: Source) -> str:
    """A short name of a file."""
    return Path(source.path).name


def _noun(value: object) -> str:
    nouns = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}
    return nouns.get(type(value), type(value).__name__)
