"""Rows of every encoder task: formats as users have them, long texts whole, broken rows dropped with a reason or refused by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tokenizer

from danlu.data.formats import read_rows
from danlu.errors import DataError
from danlu.spec.data import Data
from danlu.spec.task import (
    Classification,
    Embed,
    EncoderTask,
    ExtractiveQA,
    MultiLabelClassification,
    MultipleChoice,
    Regression,
    TokenClassification,
)
from danlu.tasks.exchange import Choices, Question, Words, join_words, split_words
from danlu.tasks.rows import Split, Splits
from danlu.tasks.task import encoder_file
from danlu.tasks.tokenizer import load_tokenizer

ZH = "小明在北京大学读书他喜欢苹果和香蕉谁哪里"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, ZH)
    return folder


class Reader:
    """Writes files and reads them as a task does."""

    def __init__(self, tokenizer_folder: Path, folder: Path) -> None:
        self.tokenizer, self.folder = load_tokenizer(tokenizer_folder), folder

    def write(self, name: str, content: str | list[Any]) -> str:
        text = content if isinstance(content, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)

    def given(self, task: EncoderTask, path: str, names: list[str] | None = None, max_length: int = 32, **data: Any) -> Split:
        spec = Data.model_validate({"train": "-", "cache_dir": str(self.folder / "cache"), **data})
        return encoder_file(task).given_split(path, spec, task, self.tokenizer, names or [], max_length=max_length)

    def splits(self, task: EncoderTask, path: str, max_length: int = 32, **data: Any) -> Splits:
        spec = Data.model_validate({"train": path, "cache_dir": str(self.folder / "cache"), "dev_size": 0.25, **data})
        return encoder_file(task).splits(spec, task, self.tokenizer, max_length=max_length, seed=3)


@pytest.fixture
def reader(tokenizer_folder: Path, tmp_path: Path) -> Reader:
    return Reader(tokenizer_folder, tmp_path)


# several labels


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", [{"text": "wheat", "labels": ["x", "y"]}, {"text": "corn", "labels": []}, {"text": "port", "labels": ["z"]}]),
        ("a.csv", 'text,labels\nwheat,"y, x"\ncorn,\nport,z\n'),
        ("a.tsv", "text\tlabels\nwheat\tx,y\ncorn\t\nport\tz\n"),
    ],
)
def test_lists_and_separated_texts_are_the_same_labels(reader: Reader, name: str, content: Any) -> None:
    split = reader.given(MultiLabelClassification(), reader.write(name, content), ["x", "y", "z"])
    assert split.labels is not None
    assert split.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert split.references == [("x, y",), ("",), ("z",)]


def test_rows_without_labels_and_unknown_labels_are_told_apart(reader: Reader) -> None:
    rows: list[Any] = [{"text": "wheat", "labels": ["x"]}, {"text": "corn", "labels": None}, {"text": "port", "labels": ["y"]}]
    found = reader.splits(MultiLabelClassification(), reader.write("a.jsonl", rows), dev_size=0.5)
    assert found.report.splits["train"].dropped_unlabelled == 1
    assert dict(found.report.splits["train"].labels) == {"x": 1, "y": 1}
    with pytest.raises(DataError, match="row 3 has the label 'y'"):
        reader.given(MultiLabelClassification(), reader.write("b.jsonl", rows), ["x", "z"])
    with pytest.raises(DataError, match="multi_label_classification") as raised:
        reader.splits(Classification(), reader.write("c.jsonl", rows))
    assert "row 1 has list" in str(raised.value)


# numbers


def test_a_label_that_is_no_number_is_refused_by_its_row(reader: Reader) -> None:
    rows = "sentence1,sentence2,score\nwheat,corn,3.2\nport,cargo,\nship,port,much\n"
    with pytest.raises(DataError, match="row 3: 'much' is no number"):
        reader.given(Regression(), reader.write("a.csv", rows), columns={"label": "score"})
    split = reader.given(Regression(), reader.write("b.csv", rows.replace("much", "1e-1")), columns={"label": "score"})
    assert split.labels is not None
    assert split.labels.tolist() == pytest.approx([3.2, 0.1])
    assert (split.texts.dropped_unlabelled, split.texts.pairs) == (1, ["corn", "port"])
    with pytest.raises(DataError, match="every row has the same number"):
        reader.splits(Regression(), reader.write("c.csv", "text,label\na,1\nb,1\n"))


# questions

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


def test_questions_about_one_context_stay_on_one_side(reader: Reader) -> None:
    rows = [qa(f"what {word}", word) for word in CONTEXT.split()[:6]] + [qa("what", "b", f"a b {i}") for i in range(6)]
    found = reader.splits(ExtractiveQA(), reader.write("a.jsonl", rows))
    sides = [{one.context for one in split.examples if isinstance(one, Question)} for split in (found.train, found.dev)]
    assert not sides[0] & sides[1]
    assert all(sides)


# options

FIRST, SECOND = ({"question": question} for question in ("what rose", "what fell"))
FOUR = ["corn", "wheat", "port", "oil"]
C3 = [[["a", "b"], [{**FIRST, "choice": FOUR, "answer": "wheat"}, {**SECOND, "choice": FOUR, "answer": "corn"}], "0"]]
EVAL = "id,question,A,B,C,D,answer\n1,what rose,corn,wheat,port,oil,B\n2,what fell,corn,wheat,port,oil,A\n"
SWAG = "sent2,ending0,ending1,ending2,ending3,label\nwhat rose,corn,wheat,port,oil,1\nwhat fell,corn,wheat,port,oil,0\n"
OPTIONS: dict[str, tuple[str, Any, str]] = {
    "C-Eval and MMLU": ("a.csv", EVAL, "A, B, C, D"),
    "MMLU's jsonl": ("a.jsonl", [{**FIRST, "choices": FOUR, "answer": 1}, {**SECOND, "choices": FOUR, "answer": 0}], "choices"),
    "ARC": (
        "b.jsonl",
        [
            {**FIRST, "choices": {"text": FOUR, "label": list("ABCD")}, "answerKey": "B"},
            {**SECOND, "choices": {"text": FOUR, "label": list("ABCD")}, "answerKey": "A"},
        ],
        "choices",
    ),
    "texts": ("c.jsonl", [{**FIRST, "options": FOUR, "answer": "wheat"}, {**SECOND, "options": FOUR, "answer": "corn"}], "options"),
    "C3": ("c3.json", json.dumps(C3), "options"),
    "SWAG": ("swag.csv", SWAG, "ending0, ending1, ending2, ending3"),
}


@pytest.mark.parametrize(("name", "content", "told"), OPTIONS.values(), ids=OPTIONS)
def test_options_are_found_in_the_forms_that_users_have(reader: Reader, name: str, content: Any, told: str) -> None:
    split = reader.given(MultipleChoice(), reader.write(name, content))
    assert split.labels is not None
    assert split.labels.tolist() == [1, 0]
    assert [one.options for one in split.examples if isinstance(one, Choices)] == [("corn", "wheat", "port", "oil")] * 2
    assert split.texts.chosen["options"] == told
    assert [one.context for one in split.examples if isinstance(one, Choices)] == ["a\nb" if name == "c3.json" else ""] * 2


def test_answers_that_are_numbers_and_options_are_told_apart_by_the_whole_table(reader: Reader) -> None:
    rows = [
        {"question": "1 + 1", "options": ["1", "2", "3"], "answer": "2"},
        {"question": "1 + 2", "options": ["1", "2", "3"], "answer": "3"},
    ]
    split = reader.given(MultipleChoice(), reader.write("a.jsonl", rows))
    assert split.labels is not None
    assert split.labels.tolist() == [1, 2]
    numbers = [{**row, "answer": answer} for row, answer in zip(rows, (1, 2), strict=True)]
    split = reader.given(MultipleChoice(), reader.write("b.jsonl", numbers))
    assert split.labels is not None
    assert split.labels.tolist() == [1, 2]


def test_broken_options_are_dropped_or_refused(reader: Reader) -> None:
    good = {"question": "what", "options": ["a", "b"], "answer": "A"}
    rows = [good, good | {"options": ["a"]}, good | {"answer": None}, good | {"question": " "}, good, good, good]
    split = reader.given(MultipleChoice(), reader.write("a.jsonl", rows))
    assert split.texts.row_numbers == [1, 5, 6, 7]
    assert dict(split.texts.dropped) == {"rows with fewer than two options": 1, "rows without an answer": 1, "rows without a question": 1}
    with pytest.raises(DataError, match="row 2: the answer 'E' is none of its 2 options"):
        reader.given(MultipleChoice(), reader.write("b.jsonl", [good, good | {"answer": "E"}]))
    with pytest.raises(DataError, match="are the options"):
        reader.given(MultipleChoice(), reader.write("c.csv", "question,first,second,answer\nwhat,a,b,A\n"))
    split = reader.given(
        MultipleChoice(), reader.write("d.csv", "question,first,second,answer\nwhat,a,b,A\n"), columns={"options": ["first", "second"]}
    )
    assert split.references == [("a",)]


# words

TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_conll_and_jsonl_and_spans_are_the_same_tags(reader: Reader) -> None:
    tags = ["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "I-LOC", "I-LOC", "O", "O"]
    text = "小明在北京大学读书"
    conll = "\n".join(f"{letter}\t{tag}" for letter, tag in zip(text, tags, strict=True)) + "\n\nwheat O\nport B-LOC\n"
    second = {"tokens": ["wheat", "port"], "ner_tags": ["O", "B-LOC"]}
    forms: dict[str, Any] = {
        "a.txt": conll,
        "a.bio": "-DOCSTART- -X- O\n\n" + conll,
        "a.jsonl": [{"tokens": list(text), "ner_tags": tags}, second],
        "b.jsonl": [
            {"tokens": list(text), "ner_tags": [TAGS.index(tag) for tag in tags]},
            {"tokens": ["wheat", "port"], "ner_tags": [0, 1]},
        ],
        "c.jsonl": [{"text": text, "label": [[0, 2, "PER"], [3, 7, "LOC"]]}, {"text": "wheat port", "label": [[6, 10, "LOC"]]}],
        "d.jsonl": [
            {"text": text, "entities": [{"start": 3, "end": 7, "label": "LOC"}, {"start": 0, "end": 2, "type": "PER"}]},
            {"text": "wheat port", "entities": [{"start": 6, "end": 10, "label": "LOC"}]},
        ],
        "cluener.jsonl": [
            {"text": text, "label": {"PER": {"小明": [[0, 1]]}, "LOC": {"北京大学": [[3, 6]]}}},
            {"text": "wheat port", "label": {"LOC": {"port": [[6, 9]]}}},
        ],
    }
    for name, content in forms.items():
        split = reader.given(TokenClassification(), reader.write(name, content), TAGS)
        assert split.texts.labels == [tuple(tags), ("O", "B-LOC")], name
        assert [one.text for one in split.examples if isinstance(one, Words)] == [text, "wheat port"], name
    assert read_rows(str(reader.folder / "a.txt")).format == "conll"


def test_broken_tags_are_dropped_or_refused(reader: Reader) -> None:
    task = TokenClassification()
    for content, told in (
        ([{"tokens": ["a", "b"], "tags": ["O"]}], "row 1: 1 tags for 2 words"),
        ([{"tokens": ["a"], "tags": ["NN"]}], "'NN' is no BIO tag"),
        ([{"tokens": ["a"], "tags": [9]}], "the tag 9 is a number"),
        ([{"text": "a b", "label": [[0, 9, "X"]]}], "is outside of the 3 characters"),
        ([{"text": "a b", "label": [["x"]]}], "no list of entities"),
    ):
        with pytest.raises(DataError, match=told):
            reader.given(task, reader.write("a.jsonl", content), TAGS)
    with pytest.raises(DataError, match="line 3: 'corn' has no tag"):
        reader.given(task, reader.write("a.conll", "wheat O\nport B-LOC\ncorn\n"), TAGS)
    with pytest.raises(DataError, match="row 2 has the label 'B-GPE'"):
        reader.given(task, reader.write("b.conll", "wheat O\n\nport B-GPE\n"), TAGS)
    rows = [{"text": "wheat port", "label": [[0, 3, "LOC"]]}, *[{"text": "wheat port", "label": [[6, 10, "LOC"]]}] * 2]
    split = reader.given(task, reader.write("b.jsonl", rows), TAGS)
    assert (split.texts.row_numbers, dict(split.texts.dropped)) == ([2, 3], {"rows whose entities do not begin and end with words": 1})


def test_a_long_text_is_cut_into_windows_and_keeps_every_word(reader: Reader) -> None:
    words = [f"{letter}heat" for letter in "abcdefghijklmnopqrst"]
    tags = ["B-LOC" if i % 3 == 0 else "O" for i in range(len(words))]
    path = reader.write("a.jsonl", [{"tokens": words, "tags": tags}, {"tokens": ["wheat"], "tags": ["O"]}] * 3)
    split = reader.given(TokenClassification(), path, TAGS, max_length=16)
    encoded = split.encoded
    assert encoded.groups is not None
    assert np.diff(encoded.groups)[0] > 5
    assert encoded.sequences.lengths.max() <= 16
    assert encoded.token_labels is not None
    first = encoded.token_labels[: encoded.bounds[1]]
    assert [TAGS[label] for label in first if label != -100] == tags
    assert len(reader.splits(TokenClassification(), path, max_length=16).train.encoded) > 6, "training rows are windows"


def test_words_and_texts_say_the_same_characters() -> None:
    assert [("Mr. Li 在北京, ok"[a:b]) for a, b in split_words("Mr. Li 在北京, ok").spans] == ["Mr", ".", "Li", "在", "北", "京", ",", "ok"]
    words = join_words(["Mr", "Li", "在", "北", "京", "IBM", "公"])
    assert words.text == "Mr Li 在北京 IBM 公"
    assert [words.text[a:b] for a, b in words.spans] == ["Mr", "Li", "在", "北", "京", "IBM", "公"]


# pairs and triplets


def test_pairs_triplets_and_lists_are_rows_of_texts(reader: Reader) -> None:
    rows = [
        {"query": "wheat", "pos": ["corn", "maize"], "neg": ["port", "quota"]},
        {"query": "vessel", "pos": ["cargo"], "neg": []},
        {"query": "oil", "pos": [], "neg": ["port"]},
    ]
    split = reader.given(Embed(), reader.write("a.jsonl", rows))
    encoded = split.encoded
    assert encoded.groups is not None
    assert np.diff(encoded.groups).tolist() == [4, 4, 2]
    texts = [reader.tokenizer.decode(encoded.sequences.row(i), skip_special_tokens=True) for i in range(10)]
    assert texts == ["wheat", "corn", "port", "quota", "wheat", "maize", "port", "quota", "vessel", "cargo"]
    assert (split.texts.row_numbers, sum(split.texts.dropped.values())) == ([1, 1, 2], 1)
    plain = reader.given(Embed(), reader.write("a.csv", "anchor,positive,negative\nwheat,corn,port\nvessel,cargo,tariff\n"))
    assert plain.encoded.groups is not None
    assert np.diff(plain.encoded.groups).tolist() == [3, 3]


# all


def test_a_column_that_a_task_does_not_read_is_refused() -> None:
    from pydantic import ValidationError

    from danlu.spec.train import TrainJob

    job = {"name": "a", "model": {"model_name_or_path": "m"}, "data": {"train": "t.csv", "columns": {"question": "q"}}}
    with pytest.raises(ValidationError, match=r"data\.columns\.question has no effect with task\.kind=classification"):
        TrainJob.model_validate(job)
    TrainJob.model_validate(job | {"task": {"kind": "extractive_qa"}})


def test_windows_come_out_of_the_cache_as_they_went_in(reader: Reader) -> None:
    path = reader.write("a.jsonl", [qa("what fell", "corn"), qa("what rose", "wheat")])
    first, again = (reader.given(ExtractiveQA(), path, max_length=16).encoded for _ in range(2))
    assert len(list((reader.folder / "cache").rglob("*.npz"))) == 1
    for name in ("input_ids", "offsets", "token_type_ids", "groups", "spans", "truncated"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
