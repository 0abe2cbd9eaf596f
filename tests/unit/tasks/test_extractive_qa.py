"""Rows of extractive question answering: SQuAD's forms, windows that hold every answer, broken questions dropped with a reason."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import Reader

from danlu.data.formats import read_rows
from danlu.errors import DataError, SpecError
from danlu.evaluate.analysis import score_of
from danlu.spec.task import ExtractiveQA
from danlu.tasks import extractive_qa
from danlu.tasks.exchange import Question

CONTEXT = "wheat rose and corn fell in the port of the new market"


def qa(question: str, answers: Any, context: str = CONTEXT) -> dict[str, Any]:
    return {"question": question, "context": context, "answers": answers}


def squad(*rows: dict[str, Any]) -> str:
    paragraphs = [
        {"context": row["context"], "qas": [{"id": str(i), "question": row["question"], "answers": row["answers"]}]}
        for i, row in enumerate(rows)
    ]
    return json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}, ensure_ascii=False)


def test_nested_and_flat_squad_rows_are_the_same_questions(reader: Reader) -> None:
    rows = [
        qa("what fell", [{"text": "corn", "answer_start": 15}]),
        qa("谁在北京", [{"text": "小明", "answer_start": 0}], "小明在北京大学读书"),
    ]
    forms = {
        "a.json": squad(*rows),
        "a.jsonl": rows,
        "b.jsonl": [
            row | {"answers": {"text": [row["answers"][0]["text"]], "answer_start": [row["answers"][0]["answer_start"]]}} for row in rows
        ],
        "c.jsonl": [row | {"answers": row["answers"][0]["text"]} for row in rows],
    }
    for name, content in forms.items():
        split = reader.given(ExtractiveQA(), reader.write(name, content))
        assert split.references == [("corn",), ("小明",)], name
        assert [one.context for one in split.examples if isinstance(one, Question)] == [CONTEXT, "小明在北京大学读书"]
    assert read_rows(str(reader.folder / "a.json")).format == "json, SQuAD's articles"


def test_broken_questions_are_dropped_each_with_its_reason(reader: Reader) -> None:
    rows = [
        qa("what fell", [{"text": "corn", "answer_start": 15}]),
        qa("what fell", [{"text": "corn", "answer_start": 2}]),  # misplaced: found where it stands
        qa("what rose", [{"text": "oil", "answer_start": 0}]),
        qa("", [{"text": "corn", "answer_start": 15}]),
        qa("what slept", []),
        qa("what rose", {"text": ["wheat"], "answer_start": [0]}),
        qa("what rose", {"text": ["wheat"], "answer_start": [0]}),
    ]
    path = reader.write("a.jsonl", rows)
    split = reader.given(ExtractiveQA(), path)
    assert (split.texts.row_numbers, [one[0] for one in split.references]) == ([1, 2, 6, 7], ["corn", "corn", "wheat", "wheat"])
    assert [one[0].start for one in split.texts.labels or []] == [15, 15, 0, 0]
    reasons = dict(split.texts.dropped)
    assert list(reasons.values()) == [1, 1, 1]
    assert "rows whose answer does not stand in the context" in reasons
    with_none = reader.given(ExtractiveQA(version_2_with_negative=True), path)
    assert with_none.texts.row_numbers == [1, 2, 5, 6, 7]
    with pytest.raises(DataError, match=r"paragraphs\[0\] has no context"):
        reader.given(ExtractiveQA(), reader.write("b.json", json.dumps({"data": [{"paragraphs": [{"qas": []}]}]})))
    with pytest.raises(DataError, match="too few are left"):
        reader.given(ExtractiveQA(), reader.write("c.jsonl", [qa("what", "oil"), qa("which", "corn")]))


@pytest.mark.parametrize("length", [16, 24])
def test_windows_are_transformers_and_hold_every_answer(reader: Reader, length: int) -> None:
    long = " ".join([CONTEXT] * 3) + " tanker"
    rows = [qa("wheat fell", [{"text": "tanker", "answer_start": long.index("tanker")}], long), qa("price rose", "wheat rose", CONTEXT)]
    task = ExtractiveQA(doc_stride=5)
    found = reader.given(task, reader.write("a.jsonl", rows), max_length=length).encoded
    theirs = reader.tokenizer(
        ["wheat fell", "price rose"],
        [long, CONTEXT],
        truncation="only_second",
        max_length=length,
        stride=5,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert found.groups is not None
    assert found.groups.tolist() == [0, theirs["overflow_to_sample_mapping"].count(0), len(theirs["input_ids"])]
    assert found.groups[1] > 2
    for i, ids in enumerate(theirs["input_ids"]):
        assert found.sequences.row(i).tolist() == ids
    train = reader.splits(
        task, reader.write("b.jsonl", rows + [qa("what", "port", CONTEXT + " " * i) for i in range(6)]), max_length=length
    ).train
    assert train.labels is not None
    assert len(train.labels) == len(train.encoded) > len(train.examples), "training rows are windows"
    spans, held = train.encoded.spans, 0
    assert spans is not None
    owner = -1
    for window, (first, last) in enumerate(train.labels):
        begins = train.encoded.offsets[window]
        context = spans[begins : train.encoded.offsets[window + 1]]
        owner += int(context[context[:, 0] >= 0][0, 0] == 0)
        example, gold = train.examples[owner], train.references[owner][0]
        assert isinstance(example, Question)
        if first == 0:
            continue
        held += 1
        assert example.context[spans[begins + first, 0] : spans[begins + last, 1]] == gold
    assert held >= len(train.examples)


def test_a_long_question_leaves_room_for_the_context(reader: Reader) -> None:
    rows = [qa("what fell " * 100, "corn"), qa("what rose", "wheat")]
    found = reader.given(ExtractiveQA(), reader.write("a.jsonl", rows), max_length=16).encoded
    assert found.sequences.lengths.max() <= 16
    assert found.spans is not None
    covered = found.spans[found.bounds[0] : found.bounds[1]]
    assert covered[:, 1].max() == len(CONTEXT), "no word of the context is lost"


@pytest.mark.parametrize(("length", "stride"), [(4, None), (6, None), (12, 6)])
def test_a_length_that_leaves_no_room_to_move_on_is_refused(reader: Reader, length: int, stride: int | None) -> None:
    path = reader.write("a.jsonl", [qa("what rose", "wheat")])
    with pytest.raises(SpecError, match=rf"model.max_length={length} holds {length // 4} tokens of a question, 3 special ones") as raised:
        reader.given(ExtractiveQA(doc_stride=stride), path, max_length=length)
    assert raised.value.where == "model.max_length"
    assert len(reader.given(ExtractiveQA(doc_stride=stride), path, max_length=length + 4).encoded) == 1


def test_questions_about_one_context_stay_on_one_side(reader: Reader) -> None:
    rows = [qa(f"what {word}", word) for word in CONTEXT.split()[:6]] + [qa("what", "b", f"a b {i}") for i in range(6)]
    found = reader.splits(ExtractiveQA(), reader.write("a.jsonl", rows))
    sides = [{one.context for one in split.examples if isinstance(one, Question)} for split in (found.train, found.dev)]
    assert not sides[0] & sides[1]
    assert all(sides)


def test_windows_come_out_of_the_cache_as_they_went_in(reader: Reader) -> None:
    path = reader.write("a.jsonl", [qa("what fell", "corn"), qa("what rose", "wheat")])
    first, again = (reader.given(ExtractiveQA(), path, max_length=16).encoded for _ in range(2))
    assert len(list((reader.folder / "cache").rglob("*.npz"))) == 1
    for name in ("input_ids", "offsets", "token_type_ids", "groups", "spans", "truncated"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_resampled_questions_are_scored_as_by_themselves(reader: Reader) -> None:
    task = ExtractiveQA(version_2_with_negative=True)
    rows = [qa(f"what {word}", [word] if word != "in" else []) for word in CONTEXT.split()]
    split = reader.given(
        task,
        reader.write(
            "a.jsonl",
            [{**row, "answers": {"text": row["answers"], "answer_start": [CONTEXT.index(one) for one in row["answers"]]}} for row in rows],
        ),
        max_length=16,
    )
    outputs = np.random.default_rng(0).normal(size=(len(split.encoded.sequences.input_ids), 2)).astype(np.float32)
    score = score_of(task, outputs, split, [])
    for some in ([3, 3, 0], list(range(len(split))), [len(split) - 1, 2]):
        places = split.encoded.sequences.tokens_of(split.encoded.sequences_of(np.array(some)))
        assert score(np.array(some)) == pytest.approx(extractive_qa.scores(outputs[places], split.take(np.array(some)), [], task).metrics())
    assert 0 < score(np.arange(len(split)))["f1"] < 1
