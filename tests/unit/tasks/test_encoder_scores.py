"""Every encoder task's scores, against scikit-learn, SciPy's definitions, SQuAD's and conlleval's formulas written plainly, and seqeval."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from typing import Any

import numpy as np
import pytest
from conftest import split_of
from sklearn import metrics

from danlu.data.columns import Labelled
from danlu.data.encode import Encoded
from danlu.spec.task import Embed, ExtractiveQA, MultiLabelClassification, MultipleChoice, Regression
from danlu.tasks import embedding, extractive_qa, multi_label, multiple_choice, regression
from danlu.tasks.exchange import Choices, Question
from danlu.tasks.rows import Split
from danlu.tasks.token_classification import entities, tag_scores

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_multi_label_scores_are_scikit_learns(threshold: float) -> None:
    truth = DRAW.integers(0, 2, (60, 4))
    truth[:, 3] = 0  # a label that this split has not
    logits = (DRAW.normal(size=(60, 4)) + truth).astype(np.float32)
    given = 1 / (1 + np.exp(-logits.astype(np.float64))) >= threshold
    task = MultiLabelClassification(threshold=threshold)
    found = multi_label.scores(logits, split_of(truth.astype(np.float32)), list("abcd"), task)
    assert found.micro_f1 == pytest.approx(metrics.f1_score(truth, given, average="micro"))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(truth[:, :3], given[:, :3], average="macro"))
    assert found.subset_accuracy == metrics.accuracy_score(truth, given)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    losses = [metrics.log_loss(truth[:, i], probabilities[:, i], labels=[0, 1]) for i in range(4)]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert "subset accuracy" in found.text()
    (one, *_) = multi_label.predictions(logits, split_of(truth).encoded, [], list("abcd"), task)
    assert one.labels == tuple(name for name, there in zip("abcd", given[0], strict=True) if there)
    assert one.margin == pytest.approx(np.abs(probabilities[0] - threshold).min(), rel=1e-5)


def test_regression_scores_are_what_their_names_say() -> None:
    truth = DRAW.integers(0, 6, 80).astype(np.float32)  # with ties
    given = (truth + DRAW.normal(size=80)).astype(np.float32)
    found = regression.scores(given[:, None], split_of(truth), [], Regression())
    ranks = [np.array([(row < one).sum() + ((row == one).sum() + 1) / 2 for one in row]) for row in (truth, given)]
    assert found.pearson == pytest.approx(np.corrcoef(truth, given)[0, 1], abs=1e-6)
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)
    assert found.mae == pytest.approx(metrics.mean_absolute_error(truth, given), rel=1e-6)
    assert found.mse == pytest.approx(metrics.mean_squared_error(truth, given), rel=1e-5)
    flat = regression.scores(np.ones((80, 1), np.float32), split_of(truth), [], Regression())
    assert (flat.pearson, flat.spearman) == (0.0, 0.0)


def test_choices_are_scored_over_each_rows_own_options() -> None:
    groups, labels = np.array([0, 3, 5, 9]), [1, 0, 3]
    outputs = DRAW.normal(size=(9, 1)).astype(np.float32)
    encoded = Encoded(np.zeros(9, np.int32), np.arange(10), np.zeros(3, bool), groups=groups)
    examples = [Choices("q", tuple("abc")), Choices("q", tuple("de")), Choices("q", tuple("fghi"))]
    split = Split(encoded, np.array(labels), Labelled(["q"] * 3, None, None, [1, 2, 3], {}), examples)
    found = multiple_choice.scores(outputs, split, [], MultipleChoice())
    answers = multiple_choice.predictions(outputs, encoded, examples, [], MultipleChoice())
    for i, answer in enumerate(answers):
        row = outputs[groups[i] : groups[i + 1], 0].astype(np.float64)
        assert answer.probabilities == pytest.approx(np.exp(row) / np.exp(row).sum())
        assert answer.label == examples[i].options[int(row.argmax())]
    assert found.accuracy == np.mean([answer.index == label for answer, label in zip(answers, labels, strict=True)])
    assert found.loss == pytest.approx(-np.mean([np.log(a.probabilities[label]) for a, label in zip(answers, labels, strict=True)]))


# SQuAD


def squad_f1(answer: str, gold: str) -> tuple[float, float]:
    """The official evaluate-v2.0.py: exact match and F1."""

    def normal(text: str) -> str:
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    found, right = normal(answer).split(), normal(gold).split()
    common = Counter(found) & Counter(right)
    same = sum(common.values())
    exact = float(normal(answer) == normal(gold))
    if not found or not right:
        return exact, float(found == right)
    if same == 0:
        return exact, 0.0
    precision, recall = same / len(found), same / len(right)
    return exact, 2 * precision * recall / (precision + recall)


def test_exact_match_and_f1_are_the_official_scripts() -> None:
    draw = random.Random(0)
    words = ["The", "a", "an", "wheat", "Wheat,", "corn", "U.S.", "1,000", "ship's", "(port)", "", "-"]
    for _ in range(300):
        answer, gold = (" ".join(draw.choices(words, k=draw.randint(0, 4))) for _ in range(2))
        assert (extractive_qa.exact_match(answer, gold), extractive_qa.f1_score(answer, gold)) == pytest.approx(squad_f1(answer, gold))


def test_chinese_answers_are_compared_by_character() -> None:
    assert extractive_qa.f1_score("北京大学", "北京") == pytest.approx(2 * (2 / 4) * 1 / (2 / 4 + 1))
    assert extractive_qa.exact_match("《北京》。", "北京") == 1.0
    assert extractive_qa.answer_tokens("在1998年,IBM 公司") == ["在", "1998", "年", "ibm", "公", "司"]
    assert extractive_qa.f1_score("上海", "北京") == 0.0


def reading_split(outputs: np.ndarray, lengths: list[int], groups: list[int], texts: list[str]) -> tuple[Encoded, list[Question]]:
    """Windows whose tokens are [CLS], question, then a character of the context each."""
    spans = []
    at = 0
    for row in range(len(groups) - 1):
        start = 0
        for length in lengths[groups[row] : groups[row + 1]]:
            spans += [(-1, -1), (-1, -1), *((i, i + 1) for i in range(start, start + length - 2))]
            start += (length - 2) // 2  # windows overlap
            at += length
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    encoded = Encoded(np.zeros(at, np.int32), offsets, np.zeros(len(texts), bool), groups=np.array(groups), spans=np.array(spans, np.int32))
    assert len(outputs) == at
    return encoded, [Question("?", text) for text in texts]


@pytest.mark.parametrize("negative", [False, True])
def test_the_best_spans_are_those_of_trying_all(negative: bool) -> None:
    lengths, groups = [12, 12, 10, 12], [0, 2, 4]
    texts = ["abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    outputs = DRAW.normal(size=(sum(lengths), 2)).astype(np.float32)
    encoded, examples = reading_split(outputs, lengths, groups, texts)
    task = ExtractiveQA(max_answer_length=4, n_best_size=3, version_2_with_negative=negative)
    found = extractive_qa.predictions(outputs, encoded, examples, [], task)
    assert encoded.spans is not None
    for row, text in enumerate(texts):
        every: dict[tuple[int, int], float] = {}
        nothing = []
        for window in range(groups[row], groups[row + 1]):
            first, last = encoded.offsets[window : window + 2]
            nothing.append(float(outputs[first].sum()))
            for i in range(first + 2, last):
                for j in range(i, min(i + 4, last)):
                    place = int(encoded.spans[i, 0]), int(encoded.spans[j, 1])
                    every[place] = max(every.get(place, -np.inf), float(outputs[i, 0] + outputs[j, 1]))
        best = sorted(every, key=lambda place: -every[place])[:3]
        assert [(span.start, span.end, span.text) for span in found[row].spans] == [(a, b, text[a:b]) for a, b in best]
        scores = [every[place] for place in best] + ([min(nothing)] if negative else [])
        shares = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose([span.score for span in found[row].spans], shares[:3], rtol=1e-5)
        says_nothing = negative and min(nothing) > every[best[0]]
        assert found[row].label == ("" if says_nothing else text[best[0][0] : best[0][1]])


def test_no_answer_counts_as_the_official_script_has_it() -> None:
    lengths, groups = [4, 4, 4], [0, 1, 2, 3]
    outputs = np.zeros((12, 2), np.float32)
    outputs[0] = 5  # the first question: no answer is best, and right
    outputs[4 + 2 : 4 + 4] = 5  # the second: an answer where there is none
    outputs[8] = 5  # the third: none where there is one
    encoded, examples = reading_split(outputs, lengths, groups, ["xy", "xy", "xy"])
    split = Split(encoded, None, Labelled(["?"] * 3, None, None, [1, 2, 3], {}), examples, [(), (), ("xy",)])
    found = extractive_qa.scores(outputs, split, [], ExtractiveQA(version_2_with_negative=True))
    assert (found.exact_match, found.f1) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert (found.has_answer_f1, found.no_answer_f1) == (0.0, 0.5)


# entities

SEQEVAL: dict[str, list[tuple[str, int, int]]] = {
    "S-LOC B-LOC O S-PER O": [("LOC", 0, 0), ("LOC", 1, 1), ("PER", 3, 3)],
    "O I-LOC O I-PER O O I-PER": [("LOC", 1, 1), ("PER", 3, 3), ("PER", 6, 6)],
    "I-LOC S-LOC E-PER I-LOC O I-LOC O B-PER I-LOC": [
        ("LOC", 0, 0),
        ("LOC", 1, 1),
        ("PER", 2, 2),
        ("LOC", 3, 3),
        ("LOC", 5, 5),
        ("PER", 7, 7),
        ("LOC", 8, 8),
    ],
    "B-PER O O B-LOC": [("PER", 0, 0), ("LOC", 3, 3)],
    "E-PER O I-LOC O O E-LOC I-LOC E-PER I-PER": [("PER", 0, 0), ("LOC", 2, 2), ("LOC", 5, 5), ("LOC", 6, 6), ("PER", 7, 7), ("PER", 8, 8)],
    "I-PER B-LOC I-LOC I-PER B-PER E-LOC E-PER": [("PER", 0, 0), ("LOC", 1, 2), ("PER", 3, 3), ("PER", 4, 4), ("LOC", 5, 5), ("PER", 6, 6)],
    "O B-LOC I-PER B-LOC": [("LOC", 1, 1), ("PER", 2, 2), ("LOC", 3, 3)],
    "B-PER S-LOC O I-PER E-LOC O": [("PER", 0, 0), ("LOC", 1, 1), ("PER", 3, 3), ("LOC", 4, 4)],
    "I-PER S-LOC O I-LOC E-LOC S-PER": [("PER", 0, 0), ("LOC", 1, 1), ("LOC", 3, 4), ("PER", 5, 5)],
    "E-PER I-LOC I-LOC I-PER S-PER": [("PER", 0, 0), ("LOC", 1, 2), ("PER", 3, 3), ("PER", 4, 4)],
    "I-PER E-PER O E-LOC E-PER": [("PER", 0, 1), ("LOC", 3, 3), ("PER", 4, 4)],
    "S-PER B-PER B-LOC E-PER O I-PER O O": [("PER", 0, 0), ("PER", 1, 1), ("LOC", 2, 2), ("PER", 3, 3), ("PER", 5, 5)],
}
"""Written by seqeval 1.2.2's get_entities (default mode)."""


def conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """conlleval.pl's rules, one after the other: https://www.clips.uantwerpen.be/conll2000/chunking/conlleval.txt."""
    found, first = set(), None
    for i in range(len(tags) + 1):
        last_tag, last_kind = [*tags[i - 1].split("-", 1), ""][:2] if i else ("O", "")
        tag, kind = [*tags[i].split("-", 1), ""][:2] if i < len(tags) else ("O", "")
        end = (last_tag, tag) in {("B", "B"), ("B", "S"), ("B", "O"), ("I", "B"), ("I", "S"), ("I", "O")}
        end = end or last_tag in ("E", "S") or (last_tag != "O" and last_kind != kind)
        start = tag in ("B", "S") or (last_tag, tag) in {("E", "E"), ("E", "I"), ("S", "E"), ("S", "I"), ("O", "E"), ("O", "I")}
        start = start or (tag != "O" and last_kind != kind)
        if end and first is not None:
            found.add((last_kind, first, i - 1))
            first = None
        if start:
            first = i
    return found


def random_tags(number: int, seed: int) -> list[list[str]]:
    draw = random.Random(seed)
    names = ["O", "O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC"))]
    return [draw.choices(names, k=draw.randint(1, 12)) for _ in range(number)]


def test_entities_are_conllevals_for_any_tags() -> None:
    for tags in random_tags(500, 0):
        assert set(entities(tags)) == conlleval(tags), tags


@pytest.mark.parametrize("tags", SEQEVAL)
def test_entities_are_seqevals(tags: str) -> None:
    assert entities(tags.split()) == SEQEVAL[tags]


def test_span_scores_are_micro_averaged_over_whole_entities() -> None:
    truth, given = random_tags(50, 1), random_tags(50, 2)
    given = [[*one, *["O"] * len(other)][: len(other)] for one, other in zip(given, truth, strict=True)]
    given[:20] = truth[:20]
    found = tag_scores(given, truth)
    pairs = [(conlleval(one), conlleval(other)) for one, other in zip(given, truth, strict=True)]
    both, answered, right = (sum(len(part(a, b)) for a, b in pairs) for part in (set.__and__, lambda a, b: a, lambda a, b: b))
    assert 0.2 < found.f1 < 0.9
    assert found.precision == pytest.approx(both / answered)
    assert found.recall == pytest.approx(both / right)
    assert found.f1 == pytest.approx(2 * found.precision * found.recall / (found.precision + found.recall))
    assert found.per_class["PER"]["support"] == sum(1 for _, b in pairs for kind, _, _ in b if kind == "PER")
    flat = [[tag for row in table for tag in row] for table in (truth, given)]
    assert found.accuracy == metrics.accuracy_score(*flat)


# retrieval


def test_retrieval_scores_are_scikit_learns() -> None:
    rows, size = 30, 8
    ids = np.arange(2 * rows, dtype=np.int32)  # a text is a token: row i is (i, rows + i), and rows 0 and 1 ask the same
    texts = np.stack([ids[:rows], ids[rows:]], axis=1)
    texts[1, 0] = texts[0, 0]
    flat = texts.reshape(-1)
    vectors = DRAW.normal(size=(2 * rows, size)).astype(np.float32)
    vectors = vectors + np.repeat(DRAW.normal(size=(rows, size)), 2, axis=0).astype(np.float32)
    outputs = np.stack([vectors[text] for text in flat])
    outputs /= np.linalg.norm(outputs, axis=1, keepdims=True)
    encoded = Encoded(flat.astype(np.int32), np.arange(2 * rows + 1), np.zeros(rows, bool), groups=np.arange(0, 2 * rows + 1, 2))
    split = Split(encoded, None, Labelled([""] * rows, None, None, list(range(rows)), {}))
    found = embedding.scores(outputs, split, [], Embed())
    queries, documents = outputs[0::2][[0, *range(2, rows)]], outputs[1::2]
    cosines = queries @ documents.T
    relevant = np.zeros((rows - 1, rows))
    relevant[0, :2] = 1
    relevant[np.arange(1, rows - 1), np.arange(2, rows)] = 1
    assert (found.num_rows, found.num_documents) == (rows - 1, rows)
    assert found.ndcg_at_10 == pytest.approx(metrics.ndcg_score(relevant, cosines, k=10))
    single: Any = slice(1, None)
    # With one right document a query, average precision is 1 / its place.
    places = [1 + int((row > row[want.argmax()]).sum()) for row, want in zip(cosines[single], relevant[single], strict=True)]
    assert metrics.label_ranking_average_precision_score(relevant[single], cosines[single]) == pytest.approx(
        np.mean([1 / p for p in places])
    )
    first = 1 + min(int((cosines[0] > cosines[0, i]).sum()) for i in (0, 1))
    assert found.mrr == pytest.approx(np.mean([1 / first, *(1 / p for p in places)]))
    share = np.mean([(cosines[0] > cosines[0, i]).sum() < 10 for i in (0, 1)])
    assert found.recall_at_10 == pytest.approx(np.mean([share, *(p <= 10 for p in places)]))
