"""Rows of every encoder task: formats as users have them, long texts whole, broken rows dropped with a reason or refused by number."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import Reader

from danlu.data.formats import read_rows
from danlu.errors import DataError
from danlu.spec.task import (
    Classification,
    Embed,
    MultiLabelClassification,
    MultipleChoice,
    Regression,
    TokenClassification,
)
from danlu.tasks.exchange import Choices, Words, join_words, split_words
from danlu.tasks.task import encoder_file

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
    for number, told in (("1e39", r"1e\+39 is too large for 32 bits"), ("9" * 400, "is no number")):
        with pytest.raises(DataError, match=f"row 3: .*{told}"):
            reader.given(Regression(), reader.write("a.csv", rows.replace("much", number)), columns={"label": "score"})
    with pytest.raises(DataError, match=r"row 1: '9+' is no number"):
        reader.given(Regression(), reader.write("c.jsonl", [{"text": "wheat", "label": 10**400 - 1}]))
    split = reader.given(Regression(), reader.write("b.csv", rows.replace("much", "1e-1")), columns={"label": "score"})
    assert split.labels is not None
    assert split.labels.tolist() == pytest.approx([3.2, 0.1])
    assert (split.texts.dropped_unlabelled, split.texts.pairs) == (1, ["corn", "port"])
    with pytest.raises(DataError, match="every row has the same number"):
        reader.splits(Regression(), reader.write("c.csv", "text,label\na,1\nb,1\n"))


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


def test_a_byte_level_tokenizer_reads_words_as_in_running_text() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate([*letters, "<s>", "</s>", "Ġp", "Ġpo"])}, [("Ġ", "p"), ("Ġp", "o")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 257), ("<s>", 256), add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<s>")
    found = encoder_file(TokenClassification()).encode_examples(
        [join_words(["a", "port"])], tokenizer, TokenClassification(), max_length=16
    )
    running = tokenizer("a port")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found.row(0)) == ["<s>", "Ġ", "a", "Ġpo", "r", "t", "</s>"]
    assert found.row(0).tolist()[-4:] == running[-4:]
    assert found.spans is not None
    assert found.spans[:, 0].tolist() == [-1, 0, -1, 2, -1, -1, -1]


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
