"""Columns are found by name; what is no text or no label is dropped and counted; ambiguity is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from danlu.data.columns import labelled
from danlu.data.formats import Rows
from danlu.errors import DataError
from danlu.spec.data import Columns


def rows(label_column: str | None = None, **columns: list[Any]) -> Rows:
    return Rows(columns, ("rows.csv",), "csv", label_column)


def refusal(table: Rows, columns: Columns | None = None, **options: Any) -> DataError:
    with pytest.raises(DataError) as raised:
        labelled(table, columns or Columns(), where="data.train", **options)
    return raised.value


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["text", "label"], {"text": "text", "label": "label"}),
        (["label", "TEXT", "id"], {"text": "TEXT", "label": "label"}),
        (["id", "sentence1", "sentence2", "label"], {"text": "sentence1", "text_pair": "sentence2", "label": "label"}),
        (["premise", "hypothesis", "target"], {"text": "premise", "text_pair": "hypothesis", "label": "target"}),
        (["标签内容", "label"], {"text": "标签内容", "label": "label"}),
        (["text", "评价"], {"text": "text", "label": "评价"}),
    ],
)
def test_columns_are_found_by_their_usual_names(names: list[str], chosen: dict[str, str]) -> None:
    found = labelled(rows(**{name: [f"{name} 1", f"{name} 2"] for name in names}), Columns(), where="data.train")
    assert found.chosen == chosen
    assert found.texts == [f"{chosen['text']} 1", f"{chosen['text']} 2"]
    assert found.labels == [f"{chosen['label']} 1", f"{chosen['label']} 2"]
    assert found.pairs == ([f"{chosen['text_pair']} 1", f"{chosen['text_pair']} 2"] if "text_pair" in chosen else None)


def test_named_columns_win_over_usual_names_and_the_formats_own_mark() -> None:
    table = rows("label", text=["a"], body=["b"], label=["c"], topic=["d"])
    found = labelled(table, Columns(text="body", label="topic"), where="data.train")
    assert (found.texts, found.labels) == (["b"], ["d"])
    assert labelled(rows("genre", text=["a"], genre=["b"], label=["c"]), Columns(), where="data.train").labels == ["b"]


def test_a_column_that_is_not_there_is_refused_with_the_nearest() -> None:
    error = refusal(rows(text=["a"], label=["b"]), Columns(label="lable"))
    assert error.where == "data.columns.label"
    assert error.problem == "data.train has no column 'lable'; it has 'text', 'label'"
    assert error.fix == "did you mean 'label'?"


@pytest.mark.parametrize(("names", "role"), [(["a", "b", "label"], "text"), (["text", "b", "c"], "label"), (["a", "b"], "text")])
def test_a_role_nobody_can_guess_is_asked_for(names: list[str], role: str) -> None:
    error = refusal(rows(**{name: ["x"] for name in names}))
    assert error.where == f"data.columns.{role}"
    assert f"is the {role}?" in error.problem
    assert all(repr(name) in error.problem for name in names)


def test_one_column_cannot_be_text_and_label() -> None:
    error = refusal(rows(text=["a"], label=["b"]), Columns(text="label", label="label"))
    assert "'label' is named as text and as label" in error.problem


def test_rows_without_text_or_label_are_dropped_and_counted() -> None:
    found = labelled(
        rows(
            text=["a", None, math.nan, "  \n", "e", "f", "g", "h", "i", "j", "k"],
            label=["x", "x", "x", "x", None, math.nan, " y ", "x", "x", "x", "x"],
        ),
        Columns(),
        where="data.train",
    )
    assert found.texts == ["a", "g", "h", "i", "j", "k"]
    assert found.labels == ["x", "y", "x", "x", "x", "x"]
    assert found.row_numbers == [1, 7, 8, 9, 10, 11]
    assert (found.dropped_empty, found.dropped_unlabelled) == (3, 2)


def test_a_pair_with_an_empty_half_is_dropped() -> None:
    found = labelled(rows(text=["a", "b", "c"], text_pair=["x", " ", "z"], label=["p", "q", "p"]), Columns(), where="data.train")
    assert (found.texts, found.pairs, found.dropped_empty) == (["a", "c"], ["x", "z"], 1)


def test_too_few_usable_rows_are_refused_with_the_counts() -> None:
    error = refusal(rows(text=["a", "", None, "d"], label=["x", "x", "x", None]))
    assert error.where == "data.train"
    assert error.problem == "2 of 4 rows have no text and 1 no label: too few are left"
    assert "data.columns.text" in error.fix


def test_labels_of_any_type_become_the_same_names() -> None:
    found = labelled(rows(text=list("abcdef"), label=[1, 1.0, "1", " 1", True, 0.5]), Columns(), where="data.train")
    assert found.labels == ["1", "1", "1", "1", "True", "0.5"]


def test_numbers_are_texts_too() -> None:
    assert labelled(rows(text=[12, 1.5], label=["a", "b"]), Columns(), where="data.train").texts == ["12", "1.5"]


def test_taken_rows_keep_their_numbers_and_order() -> None:
    found = labelled(rows(text=["a", "", "c", "d"], text_pair=list("pqrs"), label=list("wxyz")), Columns(), where="data.train").take([2, 0])
    assert (found.texts, found.pairs, found.labels, found.row_numbers) == (["d", "a"], ["s", "p"], ["z", "w"], [4, 1])
