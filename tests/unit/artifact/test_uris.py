"""An object store that refuses says who, where and what would work; and its files are read like any others."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
import stores

from danlu import on_local
from danlu.artifact.runs import open_run, run_numbers
from danlu.artifact.store import Store, ensure_writable
from danlu.artifact.uris import ObjectStoreError, UnknownScheme, filesystem_of
from danlu.data.formats import read_rows
from danlu.data.stream import find, stream
from danlu.errors import DataError, StorageError

FRAME = pandas.DataFrame({"text": ["小麦", 'a "quoted" one', "three"], "label": ["grain", "ship", "ship"]})


@pytest.fixture
def refused(s3_uri: str, s3_endpoint: str) -> Iterator[str]:
    """A place that this key may not see."""
    stores.ask_who(s3_endpoint, True)
    yield s3_uri
    stores.ask_who(s3_endpoint, False)


@pytest.mark.parametrize(("uri", "told"), [("abfs://box@account/runs", "adlfs"), ("nosuch://x", "Protocol not known: nosuch")])
def test_a_uri_without_a_client_is_told_wherever_it_is_named(uri: str, told: str, tmp_path: Path) -> None:
    """A folder for which there is no client is an error where it is listed, shown or compared, too, and not only where it is written."""
    for ask in (
        lambda: on_local.jobs(uri),
        lambda: on_local.status(uri, "topics"),
        lambda: Store(uri),
        lambda: Store(str(tmp_path)).resolve(uri),
        lambda: ensure_writable(uri),
    ):
        with pytest.raises(UnknownScheme, match=told) as raised:
            ask()
        assert "s3://" in raised.value.fix
    with pytest.raises(DataError, match=told) as in_data:
        read_rows(f"{uri}/rows.csv", where="data.train")
    assert in_data.value.where == "data.train"


def test_a_uri_with_one_slash_makes_no_folder_of_its_schemes_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownScheme) as raised:
        ensure_writable("s3:/bucket/runs")
    assert raised.value.fix == "s3://bucket/runs"
    ensure_writable(f"file:{tmp_path}/runs")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_key_that_is_not_known_is_told_with_the_uri_and_what_it_needs(refused: str) -> None:
    for ask in (
        lambda: ensure_writable(refused),
        lambda: Store(refused).versions("topics"),
        lambda: run_numbers(refused, "topics"),
        lambda: open_run(refused, "topics", "digest").set_status("running"),
        lambda: read_rows(f"{refused}/rows.csv"),
        lambda: read_rows(f"{refused}/*.csv"),
    ):
        with pytest.raises(StorageError) as raised:
            ask()
        assert raised.value.where.startswith(refused)
        assert raised.value.fix.startswith("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or in a pod")
        assert f"s3:ListBucket on {stores.BUCKET}" in raised.value.fix


def test_a_bucket_that_does_not_exist_is_no_empty_folder(s3_uri: str, s3_endpoint: str) -> None:
    for ask in (lambda: ensure_writable("s3://no-such-bucket/runs"), lambda: run_numbers("s3://no-such-bucket/runs", "topics")):
        with pytest.raises(StorageError, match="NO_SUCH_BUCKET") as raised:
            ask()
        assert raised.value.fix == f"make the bucket no-such-bucket, or name another; asked was {s3_endpoint}"
    with pytest.raises(StorageError, match="names no bucket"):
        filesystem_of("s3://")


def test_its_refusal_travels_between_processes_and_is_what_a_full_disk_is() -> None:
    error = ObjectStoreError("refused", where="s3://b/x", fix="a key")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, OSError)
    assert (type(again), str(again)) == (ObjectStoreError, "s3://b/x: refused\n  try: a key")


def test_rows_of_every_format_come_from_an_object_store(s3_uri: str, tmp_path: Path) -> None:
    filesystem, path = filesystem_of(s3_uri)
    FRAME.to_parquet(tmp_path / "rows.parquet")
    filesystem.put_file(str(tmp_path / "rows.parquet"), f"{path}/rows.parquet")
    filesystem.pipe_file(f"{path}/part-0.csv", FRAME.head(1).to_csv(index=False).encode())
    filesystem.pipe_file(f"{path}/part-1.csv", FRAME.tail(2).to_csv(index=False).encode())
    filesystem.pipe_file(f"{path}/rows.jsonl.gz", gzip.compress(FRAME.to_json(orient="records", lines=True, force_ascii=False).encode()))
    expected = FRAME.to_dict("records")
    for name in ("part-*.csv", "rows.jsonl.gz", "rows.parquet"):
        table = pandas.DataFrame(dict(read_rows(f"{s3_uri}/{name}").columns))
        assert table.to_dict("records") == expected, name
        assert [row.values for source in find(f"{s3_uri}/{name}") for row in stream(source)] == expected
    with pytest.raises(DataError, match=f"{s3_uri}/nothing.csv does not exist"):
        read_rows(f"{s3_uri}/nothing.csv")
