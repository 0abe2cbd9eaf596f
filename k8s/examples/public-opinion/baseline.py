"""What needs no neural network: TF-IDF of character n-grams and a logistic regression (scikit-learn).

python k8s/examples/public-opinion/baseline.py .cache/public-opinion
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline

Rows = Sequence[tuple[str, str]]


def baseline(train: Rows, test: Rows) -> dict[str, float]:
    """Accuracy and macro F1 on the test rows (text, label)."""
    model = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
    model.fit([text for text, _ in train], [label for _, label in train])
    answers, truth = model.predict([text for text, _ in test]), [label for _, label in test]
    return {"accuracy": float(accuracy_score(truth, answers)), "macro_f1": float(f1_score(truth, answers, average="macro"))}


def read(path: Path) -> list[tuple[str, str]]:
    """The rows of a csv file with the columns text and label."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(baseline(read(folder / "train.csv"), read(folder / "test.csv")))
