"""Rows as a source and a target text: summaries, translations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from danlu.data.conversations import BadRow, Row
from danlu.data.formats import Rows
from danlu.errors import DataError

COLUMNS = (("document", "summary"), ("source", "target"), ("article", "highlights"), ("text", "summary"))


@dataclass(frozen=True)
class TextPair:
    """What is read, and what is to be written."""

    source: str
    target: str


def text_pair_columns(rows: Rows, source_lang: str | None, target_lang: str | None, *, where: str) -> tuple[str, ...]:
    """The columns of source and target; of translations, ("translation", key, key)."""
    if "translation" in rows.columns:
        first = next((row for row in rows.columns["translation"] if isinstance(row, Mapping) and len(row) > 1), None)
        if first is None:
            raise DataError("no row's translation holds two languages", where=where, fix='{"translation": {"zh": "...", "en": "..."}}')
        languages = list(first)
        chosen = (source_lang or languages[0], target_lang or next(name for name in languages if name != (source_lang or languages[0])))
        for field, language in zip(("source_lang", "target_lang"), chosen, strict=True):
            if language not in first:
                there = ", ".join(languages)
                raise DataError(f"no translation into {language!r}; there are {there}", where=f"task.{field}", fix="one of those")
        return ("translation", *chosen)
    if source_lang or target_lang:
        raise DataError(
            f"the columns {', '.join(map(repr, rows.columns))} hold no translations by language",
            where="task.source_lang",
            fix="leave source_lang and target_lang out, or rows like {translation: {zh, en}}",
        )
    for names in COLUMNS:
        if set(names) <= set(rows.columns):
            return names
    raise DataError(
        f"which of the columns {', '.join(map(repr, rows.columns))} is read, and which is to be written?",
        where=where,
        fix="document + summary, source + target, or translation",
    )


def text_pair_reader(columns: tuple[str, ...]) -> Callable[[Row], list[TextPair]]:
    """What reads a row; it raises BadRow."""

    def read(row: Row) -> list[TextPair]:
        place: object = row.get(columns[0]) if len(columns) == 3 else row
        if not isinstance(place, Mapping):
            raise BadRow("translation has to be an object of texts by language")
        texts = [place.get(name) for name in columns[-2:]]
        for name, text in zip(columns[-2:], texts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise BadRow(f"{name} is empty")
        return [TextPair(str(texts[0]), str(texts[1]))]

    return read
