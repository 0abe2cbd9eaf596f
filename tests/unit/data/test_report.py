"""The data report counts what pandas counts, and warns of what would spoil a training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import make_rows

from danlu.data.columns import Labelled, labelled
from danlu.data.encode import Encoded, encode
from danlu.data.formats import Rows, read_rows
from danlu.data.report import DataReport, check_labels, data_report
from danlu.errors import DataError
from danlu.spec.data import Columns
from danlu.tasks.tokenizer import load_tokenizer

DIRTY = [("Wheat  rose", "grain"), ("wheat rose", "grain"), ("WHEAT\nrose", "trade"), ("port shut", "ship"), ("port shut ", "ship")]


def frame(seed: int, extra: Sequence[tuple[str, str]] = ()) -> pandas.DataFrame:
    return pandas.concat([pandas.DataFrame(make_rows(60, seed)), pandas.DataFrame(extra, columns=["text", "label"])], ignore_index=True)


def report(tiny_model: Path, folder: Path, max_length: int = 16, **frames: pandas.DataFrame) -> DataReport:
    tokenizer = load_tokenizer(tiny_model)
    rows: dict[str, Rows] = {}
    splits: dict[str, tuple[Labelled, Encoded]] = {}
    for name, table in frames.items():
        table.to_csv(folder / f"{name}.csv", index=False)
        rows[name] = read_rows(str(folder / f"{name}.csv"))
        texts = labelled(rows[name], Columns(), where=f"data.{name}")
        splits[name] = (texts, encode(texts.texts, texts.pairs, tokenizer, max_length=max_length, cache_dir=None))
    return data_report(splits, rows, max_length=max_length)


def test_counts_are_those_of_pandas(tiny_model: Path, tmp_path: Path) -> None:
    train = frame(1, [*DIRTY, ("", "grain"), ("no label", "")])
    test = frame(2, [*DIRTY[2:], ("the new port", "ship"), (train["text"][0].upper(), "ship")])
    found = report(tiny_model, tmp_path, train=train, test=test)
    tokenizer = load_tokenizer(tiny_model)
    kept = {"train": train[(train["text"] != "") & (train["label"] != "")], "test": test}
    keys = {name: table["text"].str.lower().str.split().str.join(" ") for name, table in kept.items()}
    for name, table in kept.items():
        split, key = found.splits[name], keys[name]
        assert split.rows == len(table)
        assert split.labels == table["label"].value_counts().sort_index().to_dict()
        assert split.duplicates == key.duplicated().sum()
        assert split.conflicting == (table["label"].groupby(key).transform("nunique") > 1).sum()
        whole = np.array([len(ids) for ids in tokenizer(list(table["text"]))["input_ids"]])
        lengths = np.minimum(whole, 16)
        assert (split.length_p50, split.length_p90, split.length_p99, split.length_max) == tuple(
            int(value) for value in [*np.percentile(lengths, [50, 90, 99]), lengths.max()]
        )
        assert split.truncated == pytest.approx((whole > 16).mean())
        assert split.sources == (str(tmp_path / f"{name}.csv"),)
        assert split.columns == {"text": "text", "label": "label"}
    assert found.splits["train"].overlap_with_train == 0
    assert found.splits["test"].overlap_with_train == keys["test"].isin(set(keys["train"])).sum() >= 4
    assert (found.splits["train"].dropped_empty, found.splits["train"].dropped_unlabelled) == (1, 1)
    assert found.splits["train"].conflicting == 3  # counted by hand: the three rows about wheat
    assert 0 < found.splits["train"].truncated < 1


def test_warnings_name_the_split_and_the_number(tiny_model: Path, tmp_path: Path) -> None:
    rare = pandas.DataFrame([("rare", "odd"), ("", "odd")], columns=["text", "label"])
    train = pandas.concat([frame(1, DIRTY), *[frame(seed) for seed in range(10, 13)], rare], ignore_index=True)
    found = report(tiny_model, tmp_path, max_length=6, train=train, test=frame(2, [("port shut", "ship")]))
    warnings = "\n".join(found.warnings)
    assert "train: 3 rows share their text with a row of another label" in warnings
    assert "test: 1 rows (1.6%) stand in train too" in warnings
    assert "train: 1 rows without text or label were dropped" in warnings
    assert "of the rows are cut at model.max_length" in warnings
    assert "label 'odd' has 1 rows" in warnings
    assert all(f"  warning: {warning}" in found.text() for warning in found.warnings)


def test_clean_rows_give_no_warning(tiny_model: Path, tmp_path: Path) -> None:
    train = frame(1).drop_duplicates("text")
    test = frame(2).drop_duplicates("text")
    test = test[~test["text"].isin(train["text"])]
    assert report(tiny_model, tmp_path, max_length=64, train=train, test=test).warnings == ()


def test_the_same_text_with_another_pair_is_no_duplicate(tiny_model: Path, tmp_path: Path) -> None:
    table = pandas.DataFrame([("a", "b", "x"), ("a", "c", "y"), ("A", "B", "x")], columns=["text", "text_pair", "label"])
    split = report(tiny_model, tmp_path, train=table).splits["train"]
    assert (split.duplicates, split.conflicting) == (1, 0)


def test_it_goes_into_json_and_onto_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    found = report(tiny_model, tmp_path, train=frame(1), test=frame(2))
    document = json.loads(json.dumps(found.to_dict()))
    assert document["splits"]["test"]["rows"] == 60
    lines = found.text().splitlines()
    assert next(line.split() for line in lines if line.split()[:1] == ["rows"]) == ["rows", "60", "60"]
    assert next(line.split() for line in lines if "label grain" in line) == ["label", "grain", "20", "20"]


def others(*labels: str) -> dict[str, Labelled]:
    return {"test": Labelled(["text"] * len(labels), None, list(labels), list(range(1, len(labels) + 1)), {})}


def test_label_names_are_sorted_or_as_the_task_says() -> None:
    assert check_labels(["b", "a", "c", "a"], others("c"), None) == ["a", "b", "c"]
    assert check_labels(["b", "a"], others("z"), ["z", "b", "a"]) == ["z", "b", "a"]


def test_a_test_label_that_train_lacks_is_refused_with_its_row() -> None:
    with pytest.raises(DataError) as raised:
        check_labels(["a", "b"], others("a", "B", "B"), None)
    assert raised.value.where == "data.test"
    assert "row 2 has the label 'B' (2 rows), which no training row has; trained labels: a, b" in raised.value.problem
    assert raised.value.fix


def test_a_label_the_task_does_not_name_is_refused() -> None:
    with pytest.raises(DataError) as raised:
        check_labels(["a", "b", "c", "c"], {}, ["a", "b"])
    assert raised.value.where == "task.labels"
    assert "data.train has the label 'c' (2 rows)" in raised.value.problem


def test_one_class_is_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="every row has the same label, 'a'") as raised:
        check_labels(["a", "a"], {}, None)
    assert raised.value.where == "data.train"
    assert "two labels" in raised.value.fix
