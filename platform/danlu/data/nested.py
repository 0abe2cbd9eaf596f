"""Formats whose rows do not stand in a table: SQuAD's and C3's documents, and a word and its tag a line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from danlu.errors import DataError

TAGGED_LINE = re.compile(r"\S+\s(.*\s)?(O|[BIES]-\S+)")
MARKS = ("-DOCSTART-", "#")
"""What begins a line that is no word: CoNLL-2003's documents and CoNLL-U's comments."""


def is_squad(records: Sequence[object]) -> bool:
    """True for SQuAD's articles."""
    return bool(records) and all(isinstance(one, Mapping) and isinstance(one.get("paragraphs"), list) for one in records)


def squad_rows(articles: Sequence[Mapping[str, Any]], path: str, where: str) -> list[dict[str, Any]]:
    """A row for each question of SQuAD's articles (CMRC 2018 and DRCD too): https://rajpurkar.github.io/SQuAD-explorer/."""
    rows = []
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(article["paragraphs"]):
            place = f"{path}: data[{i}].paragraphs[{j}]"
            if not isinstance(paragraph, Mapping) or "context" not in paragraph or not isinstance(paragraph.get("qas"), list):
                raise DataError(
                    f"{place} has no context or no qas", where=where, fix='{"context": "...", "qas": [{"question", "answers"}]}'
                )
            for k, asked in enumerate(paragraph["qas"]):
                if not isinstance(asked, Mapping) or "question" not in asked:
                    raise DataError(f"{place}.qas[{k}] has no question", where=where)
                answers = [] if asked.get("is_impossible") else asked.get("answers") or []
                told = {"id": asked.get("id"), "title": article.get("title"), "context": paragraph["context"]}
                rows.append(told | {"question": asked["question"], "answers": answers})
    return rows


def is_c3(document: object) -> bool:
    """True for C3's list of [[paragraphs], [questions], id]."""
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(one, list) and len(one) >= 2 and isinstance(one[0], list) and isinstance(one[1], list) for one in document)
    )


def c3_rows(document: Sequence[Any], path: str, where: str) -> list[dict[str, Any]]:
    """A row for each question: https://github.com/nlpdata/c3."""
    rows = []
    for i, (paragraphs, questions, *_) in enumerate(document):
        for asked in questions:
            if not isinstance(asked, Mapping) or not {"question", "choice"} <= set(asked):
                raise DataError(f"{path}: [{i}] has a question without question or choice", where=where)
            context = "\n".join(map(str, paragraphs))
            rows.append({"context": context, "question": asked["question"], "options": asked["choice"], "answer": asked.get("answer")})
    return rows


def looks_tagged(text: str) -> bool:
    """True if the first lines are words with a BIO tag behind each."""
    lines = [line for line in text.splitlines()[:40] if line.strip() and not _is_mark(line)]
    return len(lines) > 1 and all(TAGGED_LINE.fullmatch(line.strip()) for line in lines[:20])


def conll(text: str, path: str, where: str) -> dict[str, list[Any]]:
    """A row for each sentence: a word a line, its tag last in it, an empty line between two sentences."""
    tokens: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for number, line in enumerate(text.split("\n"), 1):
        cells = line.split()
        if not cells or _is_mark(line):
            if tokens[-1]:
                tokens.append([])
                tags.append([])
            continue
        if len(cells) < 2:
            raise DataError(
                f"{path}, line {number}: {line.strip()!r} has no tag", where=where, fix="a word, a space or tab, and its tag in each line"
            )
        tokens[-1].append(cells[0])
        tags[-1].append(cells[-1])
    whole = [i for i, row in enumerate(tokens) if row]
    return {"tokens": [tokens[i] for i in whole], "ner_tags": [tags[i] for i in whole]}


def _is_mark(line: str) -> bool:
    first = line.split(maxsplit=1)[:1]
    # In Chinese corpora # may be a tagged character: alone with a tag it is one.
    return bool(first) and first[0] in MARKS and not (first[0] == "#" and TAGGED_LINE.fullmatch(line.strip()))
