"""Rows that are broken, of forty kinds: each is refused with its line, or dropped with a reason, and nothing of it crashes later."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from danlu.data.columns import labelled
from danlu.data.encode import encode
from danlu.data.formats import read_rows
from danlu.data.prepare import prepare
from danlu.data.profile import profile
from danlu.data.row import Broken, Row
from danlu.data.stream import find, stream
from danlu.errors import DataError
from danlu.spec.data import Columns, Data, DropBroken, RepairBroken
from danlu.tasks.tokenizer import load_tokenizer

GOOD = [("wheat rose", "grain"), ("port shut", "ship"), ("tariff fell", "trade"), ("corn fell", "grain")]


def csv_with(row: str | bytes) -> bytes:
    lines = [b"text,label", b"wheat rose,grain", row if isinstance(row, bytes) else row.encode(), b"port shut,ship", b"corn,grain"]
    return b"\n".join(lines) + b"\n"


def tsv_with(row: str | bytes) -> bytes:
    return csv_with(row).replace(b"text,label", b"text\tlabel").replace(b",grain", b"\tgrain").replace(b",ship", b"\tship")


def tab_with(row: str | bytes) -> bytes:
    return tsv_with(row).replace(b"text\tlabel\n", b"text\tlabel\nstring\td\n\tclass\n")


def jsonl_with(row: str | bytes) -> bytes:
    good = [json.dumps({"text": text, "label": label}).encode() for text, label in GOOD]
    return b"\n".join([good[0], row if isinstance(row, bytes) else row.encode(), *good[1:]]) + b"\n"


def json_with(row: str) -> bytes:
    good = [json.dumps({"text": text, "label": label}) for text, label in GOOD]
    return ("[\n" + ",\n".join([good[0], row, *good[1:]]) + "\n]\n").encode()


def parquet_with(text: Any, label: Any = "grain", type_: Any = None) -> bytes:
    file = io.BytesIO()
    texts = [GOOD[0][0], text, *(text for text, _ in GOOD[1:])]
    if type_ is not None:
        texts = [one.encode() if isinstance(one, str) and type_ == pyarrow.binary() else one for one in texts]
    labels = ["grain", label, "ship", "trade", "grain"]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, type=type_), "label": labels}), file)
    return file.getvalue()


def of(value: Any, label: Any = "grain") -> str:
    return json.dumps({"text": value, "label": label})


# name -> (file, contents, line of the broken row, word of the reason; None: the row is empty and dropped later, is it repaired?)
KINDS: dict[str, tuple[str, bytes, int, str | None, bool]] = {
    "csv: a cell too few": ("a.csv", csv_with("alone"), 3, "1 cell, but the header has 2", True),
    "csv: a cell too many": ("a.csv", csv_with("wheat, corn,grain"), 3, "3 cells, but the header has 2", False),
    "csv: empty cells too many": ("a.csv", csv_with("wheat,grain,,"), 3, "4 cells, but the header has 2", True),
    "csv: a quote that is never closed": ("a.csv", csv_with('"wheat,grain'), 3, "never closed", False),
    "csv: GB18030 bytes": ("a.csv", csv_with("小麦,grain".encode("gb18030")), 3, "is not UTF-8", True),
    "csv: Latin-1 bytes": ("a.csv", csv_with("caf\xe9 wheat,grain".encode("latin-1")), 3, "is not UTF-8", True),
    "csv: an empty text": ("a.csv", csv_with(",grain"), 3, None, False),
    "csv: a blank text": ("a.csv", csv_with(" \t ,grain"), 3, None, False),
    "csv: an empty label": ("a.csv", csv_with("wheat,"), 3, None, False),
    "csv: only signs of no width": ("a.csv", csv_with("\u200b\ufeff\u2060,grain"), 3, None, False),
    "csv: only control signs": ("a.csv", csv_with("\x01\x02\x7f,grain"), 3, None, False),
    "csv: a NUL in a text": ("a.csv", csv_with("wheat\x00corn,grain"), 3, "", True),
    "csv.gz: a cell too few": ("a.csv.gz", gzip.compress(csv_with("alone")), 3, "1 cell", True),
    "tsv: a cell too few": ("a.tsv", tsv_with("alone"), 3, "1 cell, but the header has 2", True),
    "tsv: a cell too many": ("a.tsv", tsv_with("a\tb\tc"), 3, "3 cells, but the header has 2", False),
    "tsv: bytes": ("a.tsv", tsv_with(b"\xff\xfe\tgrain"), 3, "byte 0xff is not UTF-8", True),
    "tsv: an empty text": ("a.tsv", tsv_with("\tgrain"), 3, None, False),
    "tab: a cell too few": ("a.tab", tab_with("alone"), 5, "1 cell, but the header has 2", True),
    "tab: a cell too many": ("a.tab", tab_with("a\tb\tc"), 5, "3 cells, but the header has 2", False),
    "tab: an empty label": ("a.tab", tab_with("wheat\t"), 5, None, False),
    "jsonl: half an object": ("a.jsonl", jsonl_with('{"text": "wheat", "lab'), 2, "not JSON", False),
    "jsonl: a comma behind it": ("a.jsonl", jsonl_with(of("wheat") + ","), 2, "not JSON", True),
    "jsonl: single quotes": ("a.jsonl", jsonl_with("{'text': 'wheat', 'label': 'grain'}"), 2, "not JSON", False),
    "jsonl: two objects": ("a.jsonl", jsonl_with(of("wheat") + of("corn")), 2, "not JSON", False),
    "jsonl: a raw line end sign": ("a.jsonl", jsonl_with('{"text": "a\tb", "label": "grain"}'), 2, "not JSON", True),
    "jsonl: a list": ("a.jsonl", jsonl_with('["wheat", "grain"]'), 2, "an object is needed, not a list", False),
    "jsonl: a text": ("a.jsonl", jsonl_with('"wheat"'), 2, "an object is needed, not a text", False),
    "jsonl: null": ("a.jsonl", jsonl_with("null"), 2, "an object is needed, not nothing", False),
    "jsonl: a number of 5,000 digits": ("a.jsonl", jsonl_with('{"text": ' + "9" * 5000 + ', "label": "grain"}'), 2, "not JSON", False),
    "jsonl: nested 100,000 deep": ("a.jsonl", jsonl_with('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"), 2, "nested", False),
    "jsonl: half a surrogate pair": ("a.jsonl", jsonl_with('{"text": "wheat \\ud83d", "label": "grain"}'), 2, "surrogate", True),
    "jsonl: GB18030 bytes": ("a.jsonl", jsonl_with('{"text": "小麦", "label": "grain"}'.encode("gb18030")), 2, "not UTF-8", True),
    "jsonl: a missing text": ("a.jsonl", jsonl_with('{"label": "grain"}'), 2, None, False),
    "jsonl: a null text": ("a.jsonl", jsonl_with(of(None)), 2, None, False),
    "jsonl: a list as text": ("a.jsonl", jsonl_with(of(["wheat"])), 2, None, False),
    "jsonl: an object as label": ("a.jsonl", jsonl_with(of("wheat", {"a": 1})), 2, None, False),
    "jsonl: NaN as text": ("a.jsonl", jsonl_with('{"text": NaN, "label": "grain"}'), 2, None, False),
    "json: an item that is no object": ("a.json", json_with("3"), 3, "an object is needed, not a number", False),
    "json: half a surrogate pair": ("a.json", json_with('{"text": "\\udc00 wheat", "label": "grain"}'), 3, "surrogate", True),
    "json: a null text": ("a.json", json_with(of(None)), 3, None, False),
    "parquet: a null text": ("a.parquet", parquet_with(None), 2, None, False),
    "parquet: a null label": ("a.parquet", parquet_with("wheat", None), 2, None, False),
    "parquet: bytes that are no text": ("a.parquet", parquet_with(b"\xff\xfe", type_=pyarrow.binary()), 2, "is not UTF-8", True),
}  # fmt: skip
WHOLE = {
    "json: cut off": ("a.json", json_with(of("wheat"))[:-40], "line 6: not JSON"),
    "parquet: cut off": ("a.parquet", parquet_with("wheat")[:-30], "not a whole parquet file"),
    "csv: a header twice": ("a.csv", b"text,text\na,b\n", "'text' stands twice"),
    "csv: only a header": ("a.csv", b"text,label\n", "a header but no rows"),
    "jsonl: nothing": ("a.jsonl", b"\n\n", "is empty"),
    "gz: cut off": ("a.csv.gz", gzip.compress(csv_with("a,b") * 5000)[:200], "cannot be read"),
}


def written(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def test_there_are_forty_kinds() -> None:
    assert len(KINDS) >= 40


@pytest.mark.parametrize("name", KINDS)
def test_a_broken_row_is_refused_with_its_line_or_dropped_with_a_reason(name: str, tmp_path: Path, tiny_model: Path) -> None:
    file, content, line, reason, repaired = KINDS[name]
    path = written(tmp_path, file, content)
    (source,) = find(path)
    items = list(stream(source))
    broken = [item for item in items if isinstance(item, Broken)]
    rows = [item for item in items if isinstance(item, Row)]
    if reason:
        assert [item.line for item in broken] == [line]
        assert reason in broken[0].reason
        assert (broken[0].repaired is not None) == repaired
    else:
        assert broken == []
    sound = [row for row in rows if row.line != line]
    assert len(sound) == len(rows) - (not reason), "no other row is lost with it"

    # Left out, what is left can be learned from.
    data = Data(train=path, clean=[DropBroken()], cache_dir=str(tmp_path / "cache"))
    cleaned, told = prepare(data, 0)
    texts = labelled(read_rows(cleaned.train, format="jsonl"), cleaned.columns, where="data.train")
    assert all(text.strip() and text.isprintable() for text in texts.texts if "\x00" not in text)
    assert len(encode(texts.texts, None, load_tokenizer(tiny_model), max_length=16, cache_dir=None)) == len(texts.texts)
    dropped = told.removed["train"].get("drop_broken", 0) + texts.dropped_empty + texts.dropped_unlabelled
    assert dropped == (1 if reason != "" else 0)
    if reason:
        assert told.reasons["train"][0].startswith(f"{file}, line {line}: ")
        mended, also = prepare(data.model_copy(update={"clean": [RepairBroken()]}), 0)
        assert also.changed["train"].get("repair_broken", 0) == repaired
        again = read_rows(mended.train, format="jsonl")
        encode([str(text) for text in again.columns["text"]], None, load_tokenizer(tiny_model), max_length=16, cache_dir=None)
        with pytest.raises(DataError, match=rf"line {line}: "):
            prepare(data.model_copy(update={"clean": [], "split": None, "max_rows": 50}), 0)

    # The reader of today's tasks refuses it, or the task drops it; and a report says it.
    try:
        whole, refusal = labelled(read_rows(path), Columns(), where="data.train"), None
    except DataError as error:
        refusal = error.problem
    if refusal is not None:
        assert reason
        assert f"line {line}" in refusal or "parquet" in file
    else:
        assert whole.dropped_empty + whole.dropped_unlabelled == (0 if reason == "" else 1)
        encode(whole.texts, None, load_tokenizer(tiny_model), max_length=16, cache_dir=None)
    split = profile({"train": path}, Columns(), near_threshold=None).splits["train"]
    found = split.broken.rows + split.empty.rows + split.unlabelled.rows
    assert found == (reason != "")


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_broken_as_a_whole_is_refused(name: str, tmp_path: Path) -> None:
    file, content, reason = WHOLE[name]
    path = written(tmp_path, file, content)
    for read in (
        lambda: profile({"train": path}, Columns(), near_threshold=None),
        lambda: prepare(Data(train=path, clean=[DropBroken()], cache_dir=str(tmp_path / "cache")), 0),
    ):
        with pytest.raises(DataError) as raised:
            read()
        assert file in raised.value.problem
        assert reason in raised.value.problem
