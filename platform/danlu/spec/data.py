"""Where the rows come from, which columns matter and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from danlu.spec.base import Fraction, NonNegativeInt, Spec

Paths = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class Columns(Spec):
    """Which column holds what; unset ones are found by their usual names, and what was found is said aloud."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    """A label, a list of labels, a number, tags, or the right option (its letter, its number or its text), as the task has it."""

    question: str | None = None
    context: str | None = None
    answers: str | None = None
    """SQuAD's: {text: [...], answer_start: [...]}, or a list of {text, answer_start}."""
    options: str | Annotated[list[str], Field(min_length=2)] | None = None
    """The column of lists of options, or a column for each."""
    tokens: str | None = None
    """The column of lists of words."""
    positive: str | None = None
    negative: str | None = None
    """A text that belongs to `text`, and one, or a list of them, that does not."""


class Data(Spec):
    """Files, globs, storage URIs or hub ids, and how a dev split is made."""

    train: str | Paths
    """A path, glob, storage URI or hub id (`org/name[:config][@split]`), or a list of them."""

    dev: str | Paths | None = None
    """The split that chooses settings and stops training. Unset: `dev_size` of the training rows."""

    test: str | Paths | None = None
    """The split that is scored once, at the end."""

    format: Literal["auto", "csv", "tsv", "jsonl", "json", "parquet", "tab", "conll", "hub"] = "auto"
    """`auto` goes by the file name and the first rows; `tab` is Orange's format, `conll` a word and its tag a line. SQuAD's and C3's nested
    documents are json."""

    columns: Columns = Columns()

    dev_size: Fraction = 0.1
    """Share of the training rows held out when `dev` is unset: stratified by label, drawn with the job's seed."""

    max_rows: NonNegativeInt | None = None
    """Read at most this many rows of each split; for trying things out."""

    cache_dir: str = ".cache/danlu"
    """Where tokenised rows are kept, by content, so that a second run does not tokenise again."""
