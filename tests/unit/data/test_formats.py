"""Every format gives the rows pandas and pyarrow read from the same file; bad files are refused with the line and what would work."""

from __future__ import annotations

import gzip
import io
import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from danlu.data.formats import read_rows
from danlu.data.row import Row
from danlu.data.stream import find, stream
from danlu.errors import DataError

FRAME = pandas.DataFrame(
    {
        "text": ["wheat rose", 'a "quoted", comma', "two\nlines", "中文的新闻，涨了", "tab\tinside", "line\u2028separator"],
        "label": ["grain", "ship", "ship", "trade", "grain", "trade"],
    }
)
PLAIN = FRAME[~FRAME["text"].str.contains('\n|\t|"')].reset_index(drop=True)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "text,label\na,b\n")
    return file.getvalue()


def as_dict(frame: pandas.DataFrame) -> dict[str, list[Any]]:
    return {str(name): list(column) for name, column in frame.items()}


def read(source: str | list[str], **options: Any) -> dict[str, list[Any]]:
    return {name: list(values) for name, values in read_rows(source, **options).columns.items()}


def refusal(source: str | list[str], **options: Any) -> DataError:
    with pytest.raises(DataError) as raised:
        read_rows(source, **options)
    assert raised.value.where == options.get("where", "data.train")
    return raised.value


def test_csv_is_read_as_pandas_reads_it(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "rows.csv", index=False)
    assert read(str(tmp_path / "rows.csv")) == as_dict(pandas.read_csv(tmp_path / "rows.csv")) == as_dict(FRAME)


def test_crlf_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "rows.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    assert (tmp_path / "rows.csv").read_bytes().startswith(b"\xef\xbb\xbftext,label\r\n")
    assert read(str(tmp_path / "rows.csv")) == as_dict(FRAME)
    records = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in FRAME.to_dict("records"))
    assert read(write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + records.encode())) == as_dict(FRAME)


def test_tsv_is_not_quoted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", 'text\tlabel\na 3" pipe\tship\n"wheat\tgrain\n')
    expected = pandas.read_csv(path, sep="\t", quoting=3)
    assert read(path) == as_dict(expected) == {"text": ['a 3" pipe', '"wheat'], "label": ["ship", "grain"]}


def test_jsonl_keeps_line_separators_inside_a_text(tmp_path: Path) -> None:
    FRAME.to_json(tmp_path / "rows.jsonl", orient="records", lines=True, force_ascii=False)
    assert "\u2028" in (tmp_path / "rows.jsonl").read_text()
    assert read(str(tmp_path / "rows.jsonl")) == as_dict(FRAME)


def test_jsonl_rows_without_a_field_get_none(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a"}\n\n{"label": 1, "text": "b"}\n')
    assert read(path) == {"text": ["a", "b"], "label": [None, 1]}


@pytest.mark.parametrize("shape", ["records", "data", "columns"])
def test_json_in_its_three_shapes(tmp_path: Path, shape: str) -> None:
    document: Any = FRAME.to_dict("list") if shape == "columns" else FRAME.to_dict("records")
    path = write(tmp_path / "rows.json", json.dumps({"data": document} if shape == "data" else document, ensure_ascii=False))
    assert read(path) == as_dict(FRAME)


def test_parquet_is_read_as_pyarrow_reads_it_whatever_its_name(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", None, "c"], "label": [1, 2, 3], "score": [0.5, None, float("inf")]})
    for name in ("rows.parquet", "rows.csv"):
        pyarrow.parquet.write_table(table, tmp_path / name)
        assert read(str(tmp_path / name)) == pyarrow.parquet.read_table(tmp_path / name).to_pydict()


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, path := str(tmp_path / "rows.parquet"))
    assert "the column 'text' stands there twice" in refusal(path).problem
    with pytest.raises(DataError, match="the column 'text' stands there twice"):
        list(stream(find(path)[0]))


@pytest.mark.parametrize("new", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream], ids=["file", "stream"])
def test_arrow_is_read_as_pyarrow_reads_it_whatever_its_name(tmp_path: Path, new: Any) -> None:
    texts, sorts = pyarrow.array(["a", None, "中文"] * 2, pyarrow.large_string()), pyarrow.array(list("xyz") * 2).dictionary_encode()
    table = pyarrow.table({"text": texts, "label": [1, 2, 3] * 2, "sort": sorts, "spans": [[1], [], None] * 2})
    expected = table.to_pydict()
    for name, compression in (("rows.arrow", None), ("rows.csv", "zstd"), ("rows.arrow.gz", "lz4")):
        buffer = io.BytesIO()
        with new(buffer, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(table, max_chunksize=2)
        path = write(tmp_path / name, gzip.compress(buffer.getvalue()) if name.endswith("gz") else buffer.getvalue())
        rows = read_rows(path)
        assert (rows.format, {name: list(values) for name, values in rows.columns.items()}) == ("arrow", expected)
        (source,) = find(path)
        streamed = [row for row in stream(source) if isinstance(row, Row)]
        assert [row.values for row in streamed] == [dict(zip(expected, row, strict=True)) for row in zip(*expected.values(), strict=True)]
        assert [row.line for row in streamed] == [1, 2, 3, 4, 5, 6]


def test_what_the_datasets_library_saves_is_read_with_the_names_of_its_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["grain", "ship", "trade"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "labels": datasets.List(names)})
    rows = {"text": list(FRAME["text"]), "label": [0, 1, 1, 2, -1, 2], "labels": [[0, 1], [], [2], [1], [0], [2]]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    named = ["grain", "ship", "ship", "trade", None, "trade"]
    expected = rows | {"label": named, "labels": [["grain", "ship"], [], ["trade"], ["ship"], ["grain"], ["trade"]]}
    for path in (*(tmp_path / "saved").glob("*.arrow"), tmp_path / "rows.parquet"):
        assert read(str(path)) == expected
        (source,) = find(str(path))
        assert [row.values["label"] for row in stream(source) if isinstance(row, Row)] == named


def test_orange_tab_with_three_header_rows_names_its_class(tmp_path: Path) -> None:
    path = write(tmp_path / "r8.tab", "content\ttopic\nstring\tgrain ship\nmeta\tclass\nwheat rose\tgrain\nport shut\tship\n")
    rows = read_rows(path)
    body = pandas.read_csv(path, sep="\t", skiprows=[1, 2])
    assert dict(rows.columns) == as_dict(body)
    assert (rows.label_column, rows.format, len(rows)) == ("topic", "tab", 2)


@pytest.mark.parametrize("flags", ["\t\n", "\n", ""])
def test_orange_tab_without_flags_loses_no_row(tmp_path: Path, flags: str) -> None:
    path = write(tmp_path / "r8.tab", f"content\ttopic\nstring\td\n{flags}wheat rose\tgrain\nport shut\tship\n")
    assert read(path) == {"content": ["wheat rose", "port shut"], "topic": ["grain", "ship"]}


def test_orange_tab_with_flags_before_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "r8.tab", "mS#content\tcD#topic\nwheat rose\tgrain\nport shut\tship\n")
    rows = read_rows(path)
    assert rows.label_column == "topic"
    assert dict(rows.columns) == {"content": ["wheat rose", "port shut"], "topic": ["grain", "ship"]}


def test_a_tab_file_with_a_single_header_row_loses_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.tab", "text\tlabel\nwheat\tgrain\nport\tship\n")
    assert read(path) == as_dict(pandas.read_csv(path, sep="\t"))


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zip"])
def test_compressed_files_are_read_as_their_contents(tmp_path: Path, compression: str) -> None:
    FRAME.to_csv(tmp_path / f"rows.csv.{compression}", index=False)
    PLAIN.to_csv(tmp_path / f"rows.tsv.{compression}", index=False, sep="\t", quoting=3)
    assert read(str(tmp_path / f"rows.csv.{compression}")) == as_dict(FRAME)
    assert read(str(tmp_path / f"rows.tsv.{compression}")) == as_dict(PLAIN)


@pytest.mark.parametrize(
    ("content", "format"),
    [("text,label\na,b\n", "csv"), ("text\tlabel\na\tb\n", "tsv"), ('{"text": "a", "label": "b"}\n', "jsonl"),
     ('[{"text": "a", "label": "b"}]', "json"), ('{\n "text": ["a"], "label": ["b"]}', "json")],
)  # fmt: skip
def test_a_file_without_a_telling_name_is_told_by_its_first_line(tmp_path: Path, content: str, format: str) -> None:
    rows = read_rows(write(tmp_path / "rows.txt", content))
    assert (rows.format, dict(rows.columns)) == (format, {"text": ["a"], "label": ["b"]})


def test_several_files_and_globs_are_read_in_order(tmp_path: Path) -> None:
    for i in range(3):
        FRAME.iloc[2 * i : 2 * i + 2].to_csv(tmp_path / f"part-{i}.csv", index=False)
    FRAME[["label", "text"]].to_json(tmp_path / "more.jsonl", orient="records", lines=True)
    assert read(str(tmp_path / "part-*.csv")) == as_dict(FRAME)
    rows = read_rows([str(tmp_path / "part-*.csv"), str(tmp_path / "more.jsonl")])
    assert dict(rows.columns) == as_dict(pandas.concat([FRAME, FRAME]))
    assert (rows.format, len(rows.sources)) == ("csv+jsonl", 4)
    assert read(str(tmp_path / "part-*.csv"), max_rows=3) == as_dict(FRAME.head(3))


def test_a_name_with_brackets_is_the_file_of_that_name(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "rows[1].csv", index=False)
    assert read(str(tmp_path / "rows[1].csv")) == as_dict(FRAME)


def test_storage_uris_go_through_fsspec() -> None:
    memory = fsspec.filesystem("memory")
    for i in range(2):
        memory.pipe_file(f"/formats/part-{i}.csv", FRAME.iloc[3 * i : 3 * i + 3].to_csv(index=False).encode())
    memory.pipe_file("/formats/rows.jsonl.gz", gzip.compress(FRAME.to_json(orient="records", lines=True).encode()))
    assert read("memory://formats/part-*.csv") == as_dict(FRAME)
    assert read("memory://formats/rows.jsonl.gz") == as_dict(FRAME)
    assert "memory://formats/part-9.csv does not exist" in str(refusal("memory://formats/part-9.csv"))
    assert "no file matches" in str(refusal("memory://formats/no-*.csv"))


def test_a_package_folder_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a_package_of_rows" / "data"
    folder.mkdir(parents=True)
    write(folder.parent / "__init__.py", "")
    FRAME.to_csv(folder / "rows.csv", index=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert read("pkg://a_package_of_rows/data/rows.csv") == as_dict(FRAME)
    assert read("pkg://a_package_of_rows/data/*.csv") == as_dict(FRAME)
    assert "a_package_of_rows" not in sys.modules
    assert "pip install no_such_package" in refusal("pkg://no_such_package/rows.csv").fix


def test_hub_rows_come_through_datasets_with_the_names_of_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = sorted(set(FRAME["label"]))
    table = datasets.Dataset.from_dict({"text": list(FRAME["text"]), "label": [names.index(label) for label in FRAME["label"]]})
    table = table.cast_column("label", datasets.ClassLabel(names=names))
    (tmp_path / "org" / "topics").mkdir(parents=True)
    table.to_parquet(tmp_path / "org" / "topics" / "test.parquet")
    monkeypatch.chdir(tmp_path)
    rows = read_rows("org/topics@test", format="hub")  # the datasets library takes a folder for a repository
    assert dict(rows.columns) == as_dict(FRAME)
    assert read("org/topics@test", max_rows=2) == as_dict(FRAME.head(2))


def test_a_hub_id_without_a_network_is_refused_at_once() -> None:
    pytest.importorskip("datasets")
    began = time.perf_counter()
    error = refusal("no-such-org/no-such-rows:config@test", where="data.test")
    assert "'no-such-org/no-such-rows:config@test' is no file here, and the hub did not give it" in error.problem
    assert "HF_ENDPOINT" in error.fix
    assert time.perf_counter() - began < 20


def test_a_long_line_is_read_whole_and_quickly(tmp_path: Path) -> None:
    long = "wheat rose, " * 250_000
    path = write(tmp_path / "rows.csv", f'text,label\n"{long}",grain\nshort,ship\n')
    began = time.perf_counter()
    assert read(path)["text"] == [long, "short"]
    assert time.perf_counter() - began < 2


def test_a_missing_file_is_named_with_its_near_ones(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,b\n")
    error = refusal(str(tmp_path / "trian.csv"))
    assert str(tmp_path / "trian.csv") in error.problem
    assert error.fix == f"did you mean {tmp_path / 'train.csv'}?"
    (tmp_path / "round.csv").symlink_to(tmp_path / "round.csv")
    assert "round.csv is a link to" in refusal(str(tmp_path / "round.csv")).problem
    assert "no file matches" in refusal(str(tmp_path / "*.parquet"), where="data.dev").problem
    assert refusal(str(tmp_path)).fix.endswith("/*.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "problem", "fix"),
    [
        ("a.csv", "", "a.csv is empty", "header"),
        ("a.csv", " \n\n", "a.csv is empty", "header"),
        ("a.csv", b"\xef\xbb\xbf", "a.csv is empty", "header"),
        ("a.csv", "text,label\n", "a header but no rows", "at least one row"),
        ("a.json", "[]", "a.json has no rows", "at least one row"),
        ("a.tab", "text\tlabel\nstring\tdiscrete\nmeta\tclass\n", "a header but no rows", "at least one row"),
        ("a.csv", "text,label\na,b\nc,d,e\n", "a.csv, line 3: 3 cells, but the header has 2", "quote"),
        ("a.csv", 'text,label\n"two\nlines",b\nc\n', "a.csv, line 4: 1 cells, but the header has 2", "quote"),
        ("a.csv", 'text,label\na,b\n"open,c\nd,e\nf,g\n', "a.csv, line 3: 1 cells, but the header has 2", "quote"),
        ("a.tsv", "text\tlabel\nc\n", "a.tsv, line 2: 1 cells", "jsonl"),
        ("a.csv", "text,text\na,b\n", "'text' stands twice", "own name"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON", "drop_broken"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "a.jsonl, line 2: an object is needed, not list", '{"text"'),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', "line 2", "jsonl"),
        ("a.json", '{"text": ["a"], "label": []}', "different lengths: {'text': 1, 'label': 0}", ""),
        ("a.json", '{"text": "a"}', "rows are needed", "a list of objects"),
        ("a.parquet", b"PAR1 and then nothing", "not a whole parquet file", ""),
        ("a.parquet", "text,label\na,b\n", "not a whole parquet file", ""),
        ("a.arrow", b"ARROW1 and then nothing", "not a whole Arrow file or stream", "again"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\0\0\0", "not a whole Arrow file or stream", "again"),
        ("a.arrow", "text,label\na,b\n", "not a whole Arrow file or stream", "again"),
        ("a.csv.gz", gzip.compress(b"text,label\n" + b"a,b\n" * 99, mtime=0)[:30], "a.csv.gz cannot be read", "again"),
        ("a.csv.gz", b"text,label\na,b\n", "a.csv.gz cannot be read", ""),
        ("a.csv.zip", b"text,label\na,b\n", "a.csv.zip cannot be read", "again"),
        ("a.csv.zip", zipped("a.csv", "b.csv"), "holds 2 files, not one: a.csv, b.csv", "unzip"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}\n', mtime=0), "a.jsonl is packed with gzip", ".gz"),
        ("a.xlsx", zipped("sheet1.xml", "sheet2.xml"), "a.xlsx is packed with zip", "csv"),
        ("a.json.zst", b"\x28\xb5\x2f\xfd and more", "packed with zstd", "unzstd"),
        ("a.bin", "no separators", "cannot be told", "data.format"),
        ("a.csv", b"text,label\na,b\nc,d \n" + "中,g\n".encode("gb18030"), "a.csv, line 4: byte 0xd6", "iconv -f GB18030 -t UTF-8"),
        ("a.csv", b"text,label\ncaf\xe9 au lait,b\n", "a.csv, line 2: byte 0xe9", "iconv -f LATIN1 -t UTF-8"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "a.csv, line 1: byte 0xff", "iconv -f UTF-16 -t UTF-8"),
    ],
)  # fmt: skip
def test_bad_contents_are_refused_with_the_line_and_what_would_work(
    tmp_path: Path, name: str, content: str | bytes, problem: str, fix: str
) -> None:
    error = refusal(write(tmp_path / name, content))
    assert problem in error.problem
    assert str(tmp_path / name) in error.problem
    assert fix in error.fix


def test_files_with_different_columns_are_not_put_together(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.csv", "text,label\na,b\n"), write(tmp_path / "b.csv", "text,topic\na,b\n")
    error = refusal([one, other])
    assert error.problem == f"{one} has the columns text, label, but {other} has text, topic"
    assert "same columns" in error.fix
