"""Tables that Arrow's library reads: parquet, and Arrow's own IPC files and streams (`.arrow`, as the datasets library keeps them; Feather
V2 is an IPC file). Whole, or in batches of rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from danlu.artifact.uris import open_file
from danlu.errors import DataError

if TYPE_CHECKING:
    import pyarrow

IPC_FILE = b"ARROW1"
IPC_STREAM = b"\xff\xff\xff\xff"
"""What an IPC stream begins with since Arrow 0.15, before the length of its first message:
https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format."""
ROWS_AT_ONCE = 1024
"""Rows that become Python's objects at once. A batch of a file may be as large as the file."""


def told_format(start: bytes) -> str | None:
    """parquet or arrow, by a file's first bytes."""
    if start.startswith(b"PAR1"):
        return "parquet"
    return "arrow" if start.startswith((IPC_FILE, IPC_STREAM)) else None


def columns(raw: bytes, format: str, path: str, where: str) -> dict[str, list[Any]]:
    """The columns of a whole file."""
    import pyarrow

    with _refusing(format, path, where):
        schema, batches = _opened(io.BytesIO(raw), format)
        _check_names(schema, path, where)
        table = pyarrow.Table.from_batches(batches, schema)
        for index, field in enumerate(table.schema):
            if pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
                table = table.set_column(index, field.name, table.column(index).cast(pyarrow.string()))
        found: dict[str, list[Any]] = table.to_pydict()
    return found | {column: [_named(value, names) for value in found[column]] for column, names in _label_names(schema).items()}


def rows(path: str, format: str, where: str) -> Iterator[dict[str, Any]]:
    """Rows one by one; a batch of the file, or of a parquet's row group, is in memory at once."""
    with _refusing(format, path, where), open_file(path) as file:
        schema, batches = _opened(file, format)
        _check_names(schema, path, where)
        labels = _label_names(schema)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                for row in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                    yield row | {column: _named(row[column], names) for column, names in labels.items()}


def _check_names(schema: pyarrow.Schema, path: str, where: str) -> None:
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(f"{path}: the column {twice[0]!r} stands there twice", where=where, fix="give each column its own name")


def _label_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """The names of columns whose labels are numbers, by column, where the datasets library wrote them down (its ClassLabel)."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    found = {column: _names_of(feature) for column, feature in features.items() if column in schema.names}
    return {column: names for column, names in found.items() if names}


def _names_of(feature: Any) -> list[str] | None:
    """A label's names, or those of a list's labels; lists were written in three ways."""
    match feature:
        case {"_type": "ClassLabel", "names": [*names]}:
            return names
        case {"_type": "List" | "LargeList" | "Sequence", "feature": inner} | [inner]:
            return _names_of(inner)
        case _:
            return None


def _named(value: Any, names: list[str]) -> Any:
    """A label's name, of each in a list of them; None for a label that is not known (-1)."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if value is not None and value >= 0 else None


def _opened(file: BinaryIO, format: str) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """The schema of a file and its batches, which are read as they are asked for."""
    import pyarrow.parquet

    if format == "parquet":
        parquet = pyarrow.parquet.ParquetFile(file)
        return parquet.schema_arrow, parquet.iter_batches(batch_size=ROWS_AT_ONCE)
    is_file = file.read(len(IPC_FILE)) == IPC_FILE
    file.seek(0)
    if is_file:
        batches = pyarrow.ipc.open_file(file)
        return batches.schema, map(batches.get_batch, range(batches.num_record_batches))
    stream = pyarrow.ipc.open_stream(file)
    return stream.schema, iter(stream)


@contextmanager
def _refusing(format: str, path: str, where: str) -> Iterator[None]:
    import pyarrow

    noun = "parquet file" if format == "parquet" else "Arrow file or stream"
    try:
        yield
    except pyarrow.ArrowInvalid as error:
        bytes_ = "utf8" in str(error).lower()
        raise DataError(
            f"{path} {'has bytes in a column that are not UTF-8' if bytes_ else f'is not a whole {noun}'}: {error}",
            where=where,
            fix="write it again",
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole {noun}: {error}", where=where, fix="write it again") from error
