"""Files, globs, storage URIs and hub ids as rows. What cannot be read is said with the file and the line."""

from __future__ import annotations

import codecs
import csv
import difflib
import importlib.util
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.artifact.uris import UnknownScheme, filesystem_of
from danlu.data import arrow
from danlu.data.archives import opened, read, refuse_packed
from danlu.data.json_text import HALF_CHARACTER, half_character, line_of_item
from danlu.data.nested import c3_rows, conll, is_c3, is_squad, looks_tagged, squad_rows
from danlu.errors import DataError

EXTENSIONS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".tab": "tab", ".conll": "conll", ".bio": "conll", ".iob": "conll", ".bmes": "conll", ".bioes": "conll",
}  # fmt: skip
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w.\[\]:%-]+)?$")
ORANGE_TYPES = {"d", "discrete", "c", "continuous", "s", "string", "t", "time"}
ORANGE_FLAGS = {"class", "meta", "ignore", "i", "m", "c", "weight", ""}


@dataclass(frozen=True)
class Rows:
    """A table. `label_column` is the one a format itself marks as the class (Orange does), if any."""

    columns: Mapping[str, Sequence[object]]
    sources: tuple[str, ...]
    format: str
    label_column: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def read_rows(source: str | Sequence[str], *, format: str = "auto", max_rows: int | None = None, where: str = "data.train") -> Rows:
    """All rows of a source or of several with the same columns. Raises DataError, naming `where`, the file and the line."""
    sources = [source] if isinstance(source, str) else list(source)
    tables = [table for one in sources for table in _tables(one, format, max_rows, where)]
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            raise DataError(
                f"{first.sources[0]} has the columns {', '.join(first.columns)}, but {table.sources[0]} has {', '.join(table.columns)}",
                where=where,
                fix="files that are read together need the same columns",
            )
    columns = {name: [value for table in tables for value in table.columns[name]][:max_rows] for name in first.columns}
    formats = dict.fromkeys(table.format for table in tables)
    names = tuple(name for table in tables for name in table.sources)
    return Rows(columns, names, "+".join(formats), first.label_column)


def _tables(source: str, format: str, max_rows: int | None, where: str) -> Iterator[Rows]:
    if format == "hub" or (format == "auto" and _is_hub_id(source)):
        yield _hub(source, max_rows, where)
        return
    for path in _paths(source, where):
        yield _file(path, format, max_rows, where)


def _is_hub_id(source: str) -> bool:
    if "://" in source or Path(source).expanduser().exists() or Path(source).suffix.lower() in {*EXTENSIONS, ".gz", ".txt"}:
        return False
    return bool(HUB_ID.match(source)) and source.count("/") == 1 and not source.startswith(".")


def _paths(source: str, where: str) -> list[str]:
    """The files a path, glob or URI stands for."""
    if source.startswith("pkg://"):
        package, _, inside = source.removeprefix("pkg://").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"the Python package {package!r} is not installed", where=where, fix=f"pip install {package}")
        source = str(Path(spec.submodule_search_locations[0]) / inside)
    if "://" not in source:
        source = str(Path(source).expanduser())
    try:
        filesystem, path = filesystem_of(source)
        prefix = source.partition("://")[0] + "://" if "://" in source else ""
        if any(mark in source for mark in "*?[") and not filesystem.exists(path):
            found = sorted(file for file in filesystem.glob(path) if filesystem.isfile(file))
            if not found:
                raise DataError(f"no file matches {source!r}", where=where, fix="check the pattern and the working directory")
            return [prefix + file.removeprefix(prefix) if prefix else file for file in found]
        if filesystem.isdir(path):
            raise DataError(f"{source} is a folder", where=where, fix=f"name its files: {source.rstrip('/')}/*.jsonl")
        if not filesystem.exists(path):
            raise _missing(source, where)
    except UnknownScheme as error:
        raise DataError(error.problem, where=where, fix=error.fix) from error
    return [source]


def _missing(source: str, where: str) -> DataError:
    near: list[str] = []
    if "://" not in source and Path(source).is_symlink():
        return DataError(f"{source} is a link to {Path(source).readlink()}, where there is no file", where=where, fix="mend the link")
    if "://" not in source and Path(source).parent.is_dir():
        names = [path.name for path in Path(source).parent.iterdir()]
        near = [str(Path(source).parent / name) for name in difflib.get_close_matches(Path(source).name, names, n=3)]
    fix = f"did you mean {' or '.join(near)}?" if near else "check the path; it is looked up from the directory the command runs in"
    return DataError(f"the file {source} does not exist", where=where, fix=fix)


def _file(path: str, format: str, max_rows: int | None, where: str) -> Rows:
    with opened(path, where) as file:
        raw = read(file, -1, path, where)
    if not raw.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(f"{path} is empty", where=where, fix="a file with at least a header and some rows")
    kind = format if format != "auto" else told_format(path, raw, where)
    if kind in ("parquet", "arrow"):
        table, label = arrow.columns(raw, kind, path, where), None
    else:
        text = _decoded(raw, path, where)
        match kind:
            case "csv" | "tsv":
                table, label = _delimited(text, "," if kind == "csv" else "\t", path, where), None
            case "tab":
                table, label = _orange(text, path, where)
            case "conll":
                table, label = conll(text, path, where), None
            case "jsonl" | "json":
                (table, kind), label = _jsonl(text, path, where) if kind == "jsonl" else _json(text, path, where), None
            case _:
                known = "auto, csv, tsv, jsonl, json, parquet, arrow, tab, conll or hub"
                raise DataError(f"unknown format {kind!r}", where="data.format", fix=known)
    columns = {name: values[:max_rows] for name, values in table.items()}
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{path} has {'a header but ' if columns else ''}no rows", where=where, fix="a file with at least one row")
    return Rows(columns, (path,), kind, label)


def told_format(path: str, start: bytes, where: str) -> str:
    """The format of a file, by its first bytes and its name."""
    refuse_packed(path, start, where)
    suffix = Path(re.sub(r"\.(gz|bz2|xz|zip)$", "", path)).suffix.lower()
    return arrow.told_format(start) or EXTENSIONS.get(suffix) or _sniffed(start, path, where)


def _sniffed(raw: bytes, path: str, where: str) -> str:
    start = raw.lstrip()[:1]
    first_line = raw.split(b"\n", 1)[0]
    if start == b"[":
        return "json"
    if start == b"{":
        try:
            json.loads(first_line)
            return "jsonl"
        except ValueError:
            return "json"
    # A character of many bytes may be cut in half at the end.
    if looks_tagged(raw[:4000].decode("utf-8-sig", "ignore").rpartition("\n")[0]):
        return "conll"
    if b"\t" in first_line:
        return "tsv"
    if b"," in first_line:
        return "csv"
    raise DataError(
        f"{path}: the format cannot be told from its name or its first line",
        where=where,
        fix="data.format: csv, tsv, jsonl, json, parquet, arrow, tab or conll",
    )


def _decoded(raw: bytes, path: str, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        guess = _guessed_encoding(raw)
        raise DataError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} at offset {error.start} is not UTF-8",
            where=where,
            fix=f"convert it, for instance from {guess}: iconv -f {guess} -t UTF-8 {path} > {path}.utf8",
        ) from error


def _guessed_encoding(raw: bytes) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    try:
        raw.decode("gb18030")
        return "GB18030"
    except UnicodeDecodeError:
        return "LATIN1"


def _delimited(text: str, delimiter: str, path: str, where: str) -> dict[str, list[Any]]:
    header, rows = _cells(text, delimiter)
    _check_header(header, path, where)
    columns: dict[str, list[Any]] = {name: [] for name in header}
    for line, row in rows:
        if len(row) != len(header):
            raise _ragged(path, line, len(row), len(header), where)
        for name, value in zip(header, row, strict=True):
            columns[name].append(value)
    return columns


def _cells(text: str, delimiter: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    # One text may be megabytes long; the limit is the csv module's own, for the whole process.
    csv.field_size_limit(1 << 30)
    # Tab-separated text is not quoted: an inch mark in it opens nothing.
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines) if delimiter == "," else csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    header = [name.strip() for name in next(reader, [])]

    def numbered() -> Iterator[tuple[int, list[str]]]:
        # By the lines they begin at: a quote that is never closed takes in all lines after it.
        begins = reader.line_num + 1
        for row in reader:
            if row:
                yield begins, row
            begins = reader.line_num + 1

    return header, numbered()


def _check_header(header: Sequence[str], path: str, where: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} stands twice in the header", where=where, fix="give each column its own name")


def _ragged(path: str, line: int, cells: int, expected: int, where: str) -> DataError:
    return DataError(
        f"{path}, line {line}: {cells} cells, but the header has {expected}",
        where=where,
        fix="quote texts that hold the separator or a line break, close every quote, or use jsonl",
    )


def _orange(text: str, path: str, where: str) -> tuple[dict[str, list[Any]], str | None]:
    """Orange's tab files: names, types, flags (https://orange3.readthedocs.io/projects/orange-data-mining-library/en/latest/reference/data.io.html);
    or one header row whose names carry flags before a #."""
    header, rows = _cells(text, "\t")
    body = list(rows)
    header, label, skip = orange_header(header, [row for _, row in body[:2]])
    body = body[skip - 1 :]
    _check_header(header, path, where)
    columns: dict[str, list[Any]] = {name: [] for name in header}
    for line, row in body:
        if len(row) != len(header):
            raise _ragged(path, line, len(row), len(header), where)
        for name, value in zip(header, row, strict=True):
            columns[name].append(value)
    return columns, label


def orange_header(names: Sequence[str], following: Sequence[Sequence[str]]) -> tuple[list[str], str | None, int]:
    """Column names, the class column, and how many rows the header has, out of the first row and the one or two after it."""
    if any("#" in name for name in names):
        marks = [name.split("#", 1) if "#" in name else ("", name) for name in names]
        return [name for _, name in marks], next((name for flags, name in marks if "c" in flags), None), 1
    if not following:
        return list(names), None, 1
    types, flags = following[0], following[1] if len(following) > 1 else []
    has_flags = bool(flags) and _fits(flags, ORANGE_FLAGS, len(names))
    # A discrete column may name its values instead of its type: then the flags tell.
    if not (_fits(types, ORANGE_TYPES, len(names)) or (has_flags and any(flags) and any(_fits([cell], ORANGE_TYPES, 1) for cell in types))):
        return list(names), None, 1
    label = next((name for name, flag in zip(names, flags, strict=False) if has_flags and flag.strip() in ("class", "c")), None)
    return list(names), label, 3 if has_flags else 2


def _fits(cells: Sequence[str], allowed: set[str], number: int) -> bool:
    return len(cells) <= number and all(cell.strip().split(" ")[0].lower() in allowed or "=" in cell for cell in cells)


def _jsonl(text: str, path: str, where: str) -> tuple[dict[str, list[Any]], str]:
    records = []
    # Only \n ends a line of JSON: str.splitlines would also break at U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            told = f"{path}, line {number}: not JSON ({error}): {line[:80]!r}"
            raise DataError(told, where=where, fix="mend the line, or data.clean: [{kind: drop_broken}]") from error
        if HALF_CHARACTER.search(line) and (half := half_character(record)):
            raise DataError(
                f"{path}, line {number}: {half!r} holds half of a surrogate pair, which is no character",
                where=where,
                fix="data.clean: [{kind: repair_broken}], or drop_broken",
            )
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, line {number}: an object is needed, not {type(record).__name__}",
                where=where,
                fix='{"text": "...", "label": "..."}',
            )
        records.append(record)
    if is_squad(records):
        return _by_column(squad_rows(records, path, where)), "jsonl, SQuAD's articles"
    return _by_column(records), "jsonl"


def _json(text: str, path: str, where: str) -> tuple[dict[str, list[Any]], str]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}", where=where, fix="one object a line is jsonl: data.format=jsonl") from error
    if HALF_CHARACTER.search(text) and (half := half_character(document)):
        line = text[: text.find(json.dumps(half)[1:-1])].count("\n") + 1
        raise DataError(
            f"{path}, line {line}: {half!r} holds half of a surrogate pair, which is no character",
            where=where,
            fix="data.clean: [{kind: repair_broken}], or drop_broken",
        )
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if is_c3(document):
        return _by_column(c3_rows(document, path, where)), "json, C3's documents"
    if isinstance(document, list) and is_squad(document):
        return _by_column(squad_rows(document, path, where)), "json, SQuAD's articles"
    if isinstance(document, list) and all(isinstance(record, dict) for record in document):
        return _by_column(document), "json"
    if isinstance(document, dict) and all(isinstance(column, list) for column in document.values()):
        lengths = {name: len(column) for name, column in document.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{path}: its columns have different lengths: {lengths}", where=where)
        return document, "json"
    if isinstance(document, list):
        index = next(i for i, record in enumerate(document) if not isinstance(record, dict))
        raise DataError(
            f"{path}, line {line_of_item(text, index)}: an object is needed, not {json.dumps(document[index])[:40]}",
            where=where,
            fix='{"text": "...", "label": "..."}',
        )
    raise DataError(f"{path}: rows are needed", where=where, fix='a list of objects, {"data": [objects]}, or {"column": [values]}')


def _by_column(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _hub(source: str, max_rows: int | None, where: str) -> Rows:
    """`org/name[:config][@split]` through the datasets library."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source!r} is no file, and reading it from a hub needs the datasets library", where=where, fix="pip install 'danlu[hub]'"
        ) from error
    rest, _, split = source.partition("@")
    name, _, config = rest.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises anything, from ValueError to its network client's own
        raise DataError(
            f"{source!r} is no file here, and the hub did not give it: {type(error).__name__}: {str(error)[:200]}",
            where=where,
            fix="check the spelling and the network (HF_ENDPOINT sets a mirror), or name a local file",
        ) from error
    table = table if max_rows is None else table.select(range(min(max_rows, len(table))))
    columns = {}
    for column, feature in table.features.items():
        values = table[column]
        names, each = getattr(feature, "names", None), getattr(getattr(feature, "feature", None), "names", None)
        if names:
            columns[column] = [names[value] if value is not None and value >= 0 else None for value in values]
        elif each:  # a list of labels a row
            columns[column] = [None if value is None else [each[one] for one in value] for value in values]
        else:
            columns[column] = list(values)
    return Rows(columns, (source,), "hub")
