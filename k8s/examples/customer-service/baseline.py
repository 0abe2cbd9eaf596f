"""What needs no neural network: the training question that looks most alike, and how its answers stood in their pages.

python k8s/examples/customer-service/baseline.py .cache/customer-service
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer

from danlu.tasks.extractive_qa import exact_match, f1_score

Rows = Sequence[dict[str, Any]]
SENTENCE = re.compile(r"[^.。]+[.。]")


def by_sentence(train: Rows, test: Rows) -> list[str]:
    """The nearest training question says which sentences held its answers; one of those in the page, whatever stands in the answer's
    place, gives the answer. Without one there is none."""
    frames: dict[str, set[str]] = {}
    for row in train:
        frames.setdefault(row["question"], set()).update(_frame(row["context"], *answer) for answer in _answers(row))

    def found(question: str, context: str) -> str:
        return next(
            (match[1] for frame in sorted(frames[question]) for one in _sentences(context) if (match := re.fullmatch(frame, one))), ""
        )

    return [found(near, row["context"]) for near, row in zip(_nearest(list(frames), test), test, strict=True)]


def by_shape(train: Rows, test: Rows) -> list[str]:
    """The nearest training question says what its answers look like ("9 days"); the first piece of the page that looks so is the answer,
    of the sentence that is most like the question. Without one there is none."""
    shapes: dict[str, set[str]] = {}
    for row in train:
        shapes.setdefault(row["question"], set()).update(re.sub(r"\d+", r"\\d+", re.escape(text)) for text, _ in _answers(row))

    def found(near: str, question: str, context: str) -> str:
        shape = re.compile("|".join(sorted(shapes[near])) or r"(?!)")
        some = [one for one in _sentences(context) if shape.search(one)]
        best = some[_likeness(some, [question]).argmax()] if some else ""
        match = shape.search(best)
        return match.group() if match else ""

    near = _nearest(list(shapes), test)
    return [found(one, row["question"], row["context"]) for one, row in zip(near, test, strict=True)]


def _answers(row: dict[str, Any]) -> list[tuple[str, int]]:
    return list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))


def _sentences(context: str) -> list[str]:
    return [found.group().strip() for found in SENTENCE.finditer(context)]


def _frame(context: str, text: str, start: int) -> str:
    """The sentence around an answer, as a pattern that takes anything for it."""
    sentence = next(found for found in SENTENCE.finditer(context) if found.start() <= start < found.end())
    before, after = context[sentence.start() : start].lstrip(), context[start + len(text) : sentence.end()]
    return f"{re.escape(before)}([^.。]+){re.escape(after)}"


def _nearest(questions: list[str], rows: Rows) -> list[str]:
    return [questions[i] for i in _likeness(questions, [row["question"] for row in rows]).argmax(axis=0)]


def _likeness(texts: list[str], to: list[str]) -> Any:
    """Cosines of TF-IDF vectors of character n-grams, [texts, to]."""
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    return (vectorizer.fit_transform(texts) @ vectorizer.transform(to).T).toarray()


def scores(found: Sequence[str], rows: Rows) -> dict[str, float]:
    """SQuAD's F1 and exact match, as the evaluation has them."""
    pairs = [(answer, (row["answers"]["text"] or [""])[0]) for answer, row in zip(found, rows, strict=True)]
    return {name: sum(score(*pair) for pair in pairs) / len(pairs) for name, score in (("f1", f1_score), ("exact_match", exact_match))}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    train, test = read(folder / "train.jsonl"), read(folder / "test.jsonl")
    ways = {"by sentence": by_sentence(train, test), "by shape": by_shape(train, test), "never an answer": [""] * len(test)}
    for way, found in ways.items():
        print(f"{way}: {scores(found, test)}")
        for part in sorted({row["part"] for row in test}):
            some = [i for i, row in enumerate(test) if row["part"] == part]
            print(f"  {part}: {len(some)} questions, {scores([found[i] for i in some], [test[i] for i in some])}")
