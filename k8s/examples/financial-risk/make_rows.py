"""Synthetic loan notes: made up, of nobody. `python make_rows.py FOLDER` writes train.csv and test.csv there.

Each note is a few sentences; some of them move the odds of a default by a known amount, and the label is drawn with the chance they
add up to, the column `chance`. So what a model should say is known, and nothing can tell more than that: a note with a chance of 0.3 is
repaid seven times in ten.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from pathlib import Path

BASE = -1.6
"""Log odds of a default of a note that says nothing else."""
SIGNS = [
    (
        1.6,
        [
            "{n} payments were late in the past year",
            "the bank notes {n} missed instalments since spring",
            "he fell behind on {n} instalments",
        ],
    ),
    (1.2, ["debt service takes {high} percent of the income", "repayments already eat up {high} percent of what comes in"]),
    (1.0, ["the largest customer has given notice", "the main contract ends this quarter and is not renewed"]),
    (0.9, ["the auditor doubts that the firm goes on", "the auditor's opinion was qualified"]),
    (0.8, ["a tax claim is in dispute", "the tax office has put a lien on the account"]),
    (0.5, ["the loan is to cover running costs", "the money is for salaries that are due"]),
    (-0.6, ["the same employer for {n} years", "{n} years with one employer"]),
    (-0.8, ["savings cover {n} months of expenses", "{n} months of costs lie on a savings account"]),
    (-1.0, ["debt service takes {low} percent of the income", "repayments are {low} percent of what comes in"]),
    (-1.2, ["all earlier loans were repaid on time", "no instalment was ever late in {n} years"]),
    (-1.4, ["the loan is secured by a house without a mortgage", "a paid-off flat stands as security"]),
]
"""(what it adds to the log odds, ways to say it)."""
OTHERS = [
    "the application came in by post",
    "the branch in {town} keeps the file",
    "the interview took half an hour",
    "the applicant asks for {amount} euros over {n} years",
    "a co-applicant signs, too",
    "the statement of {month} is attached",
    "the applicant has moved to {town}",
    "the papers are complete",
]
TOWNS = ["Bremen", "Lyon", "Graz", "Turin", "Gent", "Malaga"]
MONTHS = ["January", "March", "June", "October"]


def make_rows(number: int, seed: int) -> list[dict[str, str]]:
    """`number` rows: text, label (default or repaid), chance."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        signs = draw.sample(SIGNS, draw.choice([0, 1, 1, 2, 2, 3]))
        odds = BASE + sum(weight for weight, _ in signs)
        sentences = [draw.choice(ways) for _, ways in signs] + draw.sample(OTHERS, draw.randint(1, 4))
        draw.shuffle(sentences)
        chance = 1 / (1 + math.exp(-odds))
        label = "default" if draw.random() < chance else "repaid"
        text = " ".join(f"{one[0].upper()}{one[1:]}." for one in (_filled(sentence, draw) for sentence in sentences))
        rows.append({"text": text, "label": label, "chance": f"{chance:.6f}"})
    return rows


def _filled(sentence: str, draw: random.Random) -> str:
    return sentence.format(
        n=draw.randint(2, 9),
        high=draw.randint(45, 70),
        low=draw.randint(8, 25),
        amount=draw.randrange(5_000, 80_000, 1_000),
        town=draw.choice(TOWNS),
        month=draw.choice(MONTHS),
    )


def write(folder: Path, *, num_train: int = 3000, num_test: int = 3000, seed: int = 17) -> None:
    """train.csv and test.csv; a text of the test stands there once, and not in training."""
    train = make_rows(num_train, seed)
    seen = {row["text"] for row in train}
    test = []
    for row in make_rows(2 * num_test, seed + 1):
        if row["text"] not in seen and len(test) < num_test:
            seen.add(row["text"])
            test.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label", "chance"])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
