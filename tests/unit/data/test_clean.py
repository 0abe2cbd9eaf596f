"""Cleaning: each step does what its name says, removes what it says it removed, and a run that is stopped goes on to the same rows."""

from __future__ import annotations

import json
import os
import random
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from conftest import make_rows

from danlu.data import prepare as module
from danlu.data.clean import normalize, strip_markup
from danlu.data.prepare import needs_preparing, prepare, prepare_given
from danlu.data.split import draw_split
from danlu.errors import DataError
from danlu.spec.data import Data, Group, Ratio, Stratified, Time
from danlu.spec.train import TrainJob
from danlu.tasks.task import read_splits
from danlu.tasks.tokenizer import load_tokenizer


def data_of(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Data:
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    return Data.model_validate({"train": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache"), **fields})


def rows_of(shards: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for shard in shards or [] for line in Path(shard).read_text().splitlines()]


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("<p>Wheat &amp; corn</p>", "Wheat & corn"), ("a<br>b", "a\nb"), ("<script>x = '<p>'</script>after", "after"),
        ("<style>p{}</style>小麦<b>上涨</b>了", "小麦上涨了"), ("3 < 5 and 7 > 2", "3 < 5 and 7 > 2"), ("no markup", "no markup"),
        ("<!-- gone -->kept", "kept"), ("<ul><li>one</li><li>two</li></ul>", "one\n\ntwo"),
        ("&lt;tag&gt;", "<tag>"), ("cut <a href='", "cut"),
    ],
)  # fmt: skip
def test_markup_is_stripped_and_what_only_looks_like_it_stays(markup: str, plain: str) -> None:
    assert strip_markup(markup) == plain


def test_letters_get_one_width_and_chinese_punctuation_stays() -> None:
    text = "ＧＤＰ　增长５．２％，符合预期！"
    assert normalize(text) == "GDP 增长5．2％，符合预期！"
    assert normalize(text, width="all", collapse_whitespace=False) == unicodedata.normalize("NFKC", text)
    assert normalize(text, width="keep", collapse_whitespace=False) == text
    for code in range(0xFF10, 0xFF5B):
        folded = unicodedata.normalize("NFKC", chr(code))
        assert normalize(chr(code)) == (folded if folded.isalnum() else chr(code))


def test_blanks_are_collapsed_and_unseen_signs_go() -> None:
    assert normalize("a \t b\u200bc\x00\ufeff  \r\n  d\u3000\u3000e ") == "a bc\nd e"
    assert normalize("👨\u200d👩") == "👨\u200d👩"


ROWS = [
    {"text": "<b>Wheat</b>  rose in the market today", "label": "grain"},
    {"text": "Ｗheat rose in the market today!", "label": "grain"},
    {"text": "港口今天关闭了，船只无法进入", "label": "ship"},
    {"text": "no", "label": "ship"},
    {"text": "the vessel left the port with its cargo of corn on monday", "label": "ship"},
    {"text": "the vessel left the port with its cargo of corn on tuesday", "label": "ship"},
    {"text": "a tariff on exports is in the new law", "label": "trade"},
]
STEPS = [
    {"kind": "strip_markup"},
    {"kind": "normalize"},
    {"kind": "filter_length", "min_characters": 5},
    {"kind": "filter_language", "languages": ["en"]},
    {"kind": "deduplicate_exact"},
    {"kind": "deduplicate_near", "threshold": 0.7},
]


def test_each_step_says_what_it_removed(tmp_path: Path) -> None:
    made, cleaned = prepare(data_of(tmp_path, ROWS, clean=STEPS), 0)
    assert cleaned.removed["train"] == {"filter_length": 1, "filter_language": 1, "deduplicate_exact": 1, "deduplicate_near": 1}
    assert cleaned.changed["train"] == {"strip_markup": 1, "normalize": 2, "filter_length": 0, "filter_language": 0,
                                        "deduplicate_exact": 0, "deduplicate_near": 0}  # fmt: skip
    assert [row["text"] for row in rows_of(made.train)] == ["Wheat rose in the market today", ROWS[4]["text"], ROWS[6]["text"]]
    assert (cleaned.rows_in, cleaned.rows_out) == ({"train": 7}, {"train": 3})
    for told in ("7 rows in the files, 3 kept", "deduplicate_near: removed 1", "normalize: changed 2"):
        assert told in cleaned.text()
    assert not needs_preparing(made)


def test_exact_duplicates_are_those_of_pandas(tmp_path: Path) -> None:
    rows = make_rows(200, 1) + make_rows(200, 1)[::2] + [{**row, "text": row["text"].upper() + "."} for row in make_rows(20, 1)]
    random.Random(0).shuffle(rows)
    made, cleaned = prepare(data_of(tmp_path, rows, clean=[{"kind": "deduplicate_exact"}]), 0)
    keys = pandas.Series([row["text"] for row in rows]).str.lower().str.rstrip(".")
    assert rows_of(made.train) == [row for row, again in zip(rows, keys.duplicated(), strict=True) if not again]
    assert cleaned.removed["train"]["deduplicate_exact"] == keys.duplicated().sum()


def test_training_rows_that_stand_in_test_go_and_test_rows_stay(tmp_path: Path) -> None:
    test = [{"text": "A  tariff on exports is in the new law", "label": "trade"}] * 2
    pandas.DataFrame(test).to_json(tmp_path / "test.jsonl", orient="records", lines=True)
    fields = {"test": str(tmp_path / "test.jsonl"), "clean": [{"kind": "normalize"}, {"kind": "deduplicate_exact"}]}
    made, cleaned = prepare(data_of(tmp_path, ROWS, **fields), 0)
    assert ROWS[6] not in rows_of(made.train)
    assert rows_of(made.test) == [{"text": "A tariff on exports is in the new law", "label": "trade"}] * 2
    assert cleaned.removed["test"] == {}
    fields["clean"] = [{"kind": "deduplicate_exact", "decontaminate": False}]
    assert ROWS[6] in rows_of(prepare(data_of(tmp_path, ROWS, **fields), 0)[0].train)


def test_other_files_get_the_steps_that_change_texts_only(tmp_path: Path) -> None:
    source, made = prepare_given(str(tmp_path / "train.jsonl"), data_of(tmp_path, ROWS, clean=STEPS), 0)
    assert [row["text"] for row in rows_of(source)][:2] == ["Wheat rose in the market today", "Wheat rose in the market today!"]
    assert len(rows_of(source)) == 7
    assert made.format == "jsonl"


def test_rows_that_share_a_part_are_no_duplicates(tmp_path: Path) -> None:
    def talk(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    steps = [{"kind": "deduplicate_exact"}, {"kind": "deduplicate_near"}]
    choice = {"question": "What is it about?", "options": ["wheat prices in spring", "ships in the harbour"], "label": 0}
    for task_rows in (
        [talk("Where is Lima?", "In Peru, on its coast."), talk("Who wrote Faust?", "Goethe did, over sixty years.")],
        [choice, choice | {"options": ["a new tariff on corn", "an election in autumn"]}],
        [{"query": "wheat", "pos": "grain exports rose in May"}, {"query": "wheat", "pos": "a harvest was lost to rain"}],
    ):
        rows = [*task_rows, task_rows[0]]
        made, cleaned = prepare(data_of(tmp_path, rows, clean=steps), 0, of_texts=False)
        assert rows_of(made.train) == task_rows
        assert cleaned.removed["train"]["deduplicate_exact"] == 1


def test_answers_that_count_characters_are_not_moved(tmp_path: Path) -> None:
    answer = {"context": "<b>wheat</b> rose", "question": "what rose?", "answers": {"text": ["wheat"], "answer_start": [3]}}
    data = data_of(tmp_path, [answer], clean=[{"kind": "strip_markup"}])
    made = prepare(data.model_copy(update={"columns": data.columns.model_copy(update={"text": "question"})}), 0, of_texts=False)[0]
    assert rows_of(made.train) == [answer], "the column that is named as the text has no markup"
    tagged = {"text": "<b>Ada</b> spoke", "entities": [{"start": 3, "end": 6, "label": "PER"}]}
    for row, counted in ((answer, "answer_start"), (tagged, "start"), (tagged | {"entities": [[3, 6, "PER"]]}, "\\[start, end")):
        with pytest.raises(DataError, match=f"`{counted}"):
            prepare(data_of(tmp_path, [row], clean=[{"kind": "strip_markup"}]), 0, of_texts=False)


def test_a_filter_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="left no training row"):
        prepare(data_of(tmp_path, ROWS, clean=[{"kind": "filter_length", "min_characters": 500}]), 0)


class Stopped(Exception):
    pass


def test_a_run_that_is_stopped_goes_on_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(300, 1) + make_rows(300, 1) + make_rows(300, 2)
    monkeypatch.setattr(module, "SHARD_ROWS", 40)
    data = data_of(tmp_path, rows, clean=[{"kind": "deduplicate_exact"}, {"kind": "deduplicate_near"}])
    expected, told = prepare(data.model_copy(update={"cache_dir": str(tmp_path / "whole")}), 0)
    finish = module._Writer.finish
    read_again = []
    for shards in (1, 3, 4):
        left = [shards]

        def stop(writer: Any, left: list[int] = left) -> str:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return finish(writer)

        monkeypatch.setattr(module._Writer, "finish", stop)
        with pytest.raises(Stopped):
            prepare(data, 0)
        (folder,) = (tmp_path / "cache" / "clean").glob("*/")
        read_again.append(len(list(folder.glob("train-*.jsonl"))))
        assert not (folder / "manifest.json").exists()
    assert read_again == [1, 4, 8]
    monkeypatch.setattr(module._Writer, "finish", finish)
    made, cleaned = prepare(data, 0)
    assert rows_of(made.train) == rows_of(expected.train)
    assert cleaned == told
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *(Path(shard).name for shard in made.train)}
    before = [os.stat(shard).st_mtime_ns for shard in made.train]
    prepare(data, 0)
    assert [os.stat(shard).st_mtime_ns for shard in made.train] == before, "what is done is not done again"


# Splits.

KEYS = [str(key) for key in np.random.default_rng(0).integers(0, 40, 1000)]


@pytest.mark.parametrize("kind", ["ratio", "stratified", "group", "time"])
def test_every_row_is_on_one_side_and_the_seed_decides(kind: str) -> None:
    split = {
        "ratio": Ratio(dev_size=0.2, test_size=0.1), "stratified": Stratified(dev_size=0.2, test_size=0.1),
        "group": Group(column="a", dev_size=0.2, test_size=0.1), "time": Time(column="a", dev_size=0.2, test_size=0.1),
    }[kind]  # fmt: skip
    sides = draw_split(split, 1000, KEYS, 3)
    assert np.array_equal(sides, draw_split(split, 1000, KEYS, 3))
    assert (kind == "time") == np.array_equal(sides, draw_split(split, 1000, KEYS, 4))
    assert (sides == 1).mean() == pytest.approx(0.2, abs=0.02)
    assert (sides == 2).mean() == pytest.approx(0.1, abs=0.02)
    keys = np.asarray(KEYS)
    on = {side: set(keys[sides == side]) for side in (0, 1, 2)}
    if kind == "group":
        assert sum(map(len, on.values())) == len(set.union(*on.values()))
    if kind == "stratified":
        for key, count in Counter(KEYS).items():
            assert abs((keys[sides == 1] == key).sum() - 0.2 * count) <= 1.5
    if kind == "time":
        assert max(map(int, on[0])) < min(map(int, on[1]))
        assert max(map(int, on[1])) < min(map(int, on[2]))


def test_times_are_numbers_or_iso_8601() -> None:
    days = [f"2026-01-{day:02d}" for day in range(1, 21)]
    assert np.flatnonzero(draw_split(Time(column="day", dev_size=0.1), 20, days, 0)).tolist() == [18, 19]
    with pytest.raises(DataError, match="'yesterday' in the column 'day' is no number and no date"):
        draw_split(Time(column="day"), 20, [*days[1:], "yesterday"], 0)
    with pytest.raises(DataError, match="none is later"):
        draw_split(Time(column="day"), 5, ["1"] * 5, 0)


def test_a_single_group_cannot_be_held_out() -> None:
    with pytest.raises(DataError, match="no whole group comes near"):
        draw_split(Group(column="author"), 10, ["a"] * 10, 0)


def test_a_job_is_trained_on_the_cleaned_rows(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{**row, "author": f"a{i % 30}"} for i, row in enumerate(make_rows(120, 1))] + [{**make_rows(1, 1)[0], "author": "a0"}]
    data = data_of(tmp_path, rows, clean=[{"kind": "deduplicate_exact"}], split={"kind": "group", "column": "author", "test_size": 0.2})
    job = TrainJob.model_validate(
        {"name": "a", "model": {"model_name_or_path": str(tiny_model), "max_length": 16}, "data": data.model_dump(exclude={"dev_size"})}
    )
    splits = read_splits(job, load_tokenizer(tiny_model), max_length=16)
    author = {row["text"]: row["author"] for row in reversed(rows)}
    sides = [{author[text] for text in split.texts.texts} for split in (splits.train, splits.dev, splits.test) if split is not None]
    assert len(sides) == 3
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert splits.report.cleaned is not None
    assert splits.report.cleaned.removed["train"]["deduplicate_exact"] >= 1
    assert "deduplicate_exact: removed" in splits.report.text()
    assert sum(splits.report.cleaned.rows_out.values()) == sum(map(len, (splits.train, splits.dev, splits.test)))  # type: ignore[arg-type]
