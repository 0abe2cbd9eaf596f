"""Where the rows come from, which columns matter and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import Fraction, NonNegativeInt, PositiveInt, Spec

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


Language = Literal["zh", "ja", "ko", "en", "de", "fr", "es", "it", "pt", "nl", "ru", "ar", "he", "el", "th", "hi", "bn", "ta", "und"]


class DropBroken(Spec):
    """Leave out rows that cannot be read: ragged, not JSON, not UTF-8. Without it or `repair_broken` the first one stops the job."""

    kind: Literal["drop_broken"] = "drop_broken"


class RepairBroken(Spec):
    """Read broken rows as what they most likely were meant to be (GB18030 bytes, missing last cells, a comma behind an object, half a
    surrogate pair); leave out the rest."""

    kind: Literal["repair_broken"] = "repair_broken"


class StripMarkup(Spec):
    """Texts without HTML tags, comments, scripts and styles; entities become their characters. Changes dev and test texts too.

    Requests to an endpoint are not cleaned: such a step fits where callers send texts without markup.
    """

    kind: Literal["strip_markup"] = "strip_markup"


class Normalize(Spec):
    """One form for one text. Changes dev and test texts too, and not the requests to an endpoint."""

    kind: Literal["normalize"] = "normalize"
    width: Literal["letters", "all", "keep"] = "letters"
    """`letters`: full-width letters, digits and spaces become half-width, Chinese punctuation stays; `all`: Unicode's NFKC."""
    collapse_whitespace: bool = True
    """Runs of blanks become one, control signs and signs of no width go; line ends stay."""


class FilterLength(Spec):
    """Keep training rows whose text has so many characters."""

    kind: Literal["filter_length"] = "filter_length"
    min_characters: NonNegativeInt = 1
    max_characters: PositiveInt | None = None

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.max_characters is not None and self.min_characters > self.max_characters:
            raise ValueError(f"min_characters={self.min_characters} is more than max_characters={self.max_characters}: no text is kept")
        return self


class FilterLanguage(Spec):
    """Keep training rows in these languages, told by script and common words; `und` is what cannot be told."""

    kind: Literal["filter_language"] = "filter_language"
    languages: Annotated[list[Language], Field(min_length=1)]


class DeduplicateExact(Spec):
    """Keep the first of the training rows whose texts are the same but for case, width, punctuation and spacing."""

    kind: Literal["deduplicate_exact"] = "deduplicate_exact"
    decontaminate: bool = True
    """Training rows that stand in the dev or test file go too."""


class DeduplicateNear(Spec):
    """Keep the first of the training rows whose texts are nearly the same, by MinHash over character n-grams."""

    kind: Literal["deduplicate_near"] = "deduplicate_near"
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 0.8
    """Jaccard similarity of the n-grams from which two texts count as one."""
    decontaminate: bool = True
    """Training rows that nearly stand in the dev or test file go too."""


CleanStep = Annotated[
    DropBroken | RepairBroken | StripMarkup | Normalize | FilterLength | FilterLanguage | DeduplicateExact | DeduplicateNear,
    Field(discriminator="kind"),
]


class Given(Spec):
    """Nothing is held out: `dev` names a file."""

    kind: Literal["given"] = "given"


class Drawn(Spec):
    """What the splits that are drawn from the training rows share."""

    dev_size: Fraction = 0.1
    """Share of the training rows that become the dev split; 0 where `dev` names a file."""
    test_size: Fraction = 0.0
    """Share of the training rows that become the test split; 0 where there is none or `test` names a file."""


class Ratio(Drawn):
    """Rows drawn evenly."""

    kind: Literal["ratio"] = "ratio"


class Stratified(Drawn):
    """Rows drawn so that each label keeps its share."""

    kind: Literal["stratified"] = "stratified"


class Group(Drawn):
    """Whole groups drawn: rows with the same value (of one author, one document, one customer) stay on one side."""

    kind: Literal["group"] = "group"
    column: Annotated[str, Field(min_length=1)]


class Time(Drawn):
    """The latest rows are held out, test after dev; rows of one moment stay together."""

    kind: Literal["time"] = "time"
    column: Annotated[str, Field(min_length=1)]
    """Numbers, or dates and times in ISO 8601."""


SplitRule = Annotated[Given | Ratio | Stratified | Group | Time, Field(discriminator="kind")]


class Data(Spec):
    """Files, globs, storage URIs or hub ids, and how a dev split is made."""

    train: str | Paths
    """A path, glob, storage URI or hub id (`org/name[:config][@split]`), or a list of them."""

    dev: str | Paths | None = None
    """The split that chooses settings and stops training. Unset: `dev_size` of the training rows."""

    test: str | Paths | None = None
    """The split that is scored once, at the end."""

    format: Literal["auto", "csv", "tsv", "jsonl", "json", "parquet", "arrow", "tab", "conll", "hub"] = "auto"
    """`auto` goes by the file name and the first rows; `tab` is Orange's format, `conll` a word and its tag a line. SQuAD's and C3's nested
    documents are json."""

    columns: Columns = Columns()

    dev_size: Fraction = 0.1
    """Share of the training rows held out when `dev` is unset: stratified by label, drawn with the job's seed."""

    max_rows: NonNegativeInt | None = None
    """Read at most this many rows of each split; for trying things out."""

    clean: list[CleanStep] = Field(default_factory=list)
    """Steps that rows go through in their order, before anything else; what each removed stands in the report and the lineage."""

    split: SplitRule | None = None
    """How dev and test rows are held out of the training rows. Unset: `dev_size` of them, each label by its share; no test rows."""

    streaming: bool = False
    """For training files larger than memory: rows are read and tokenised a shard at a time, and training reads their token ids from files
    in `cache_dir`. Dev and test rows are still held in memory, so a small `dev_size` fits; without a `split`, rows are drawn evenly.
    A `.json` document or a hub id is read whole."""

    cache_dir: str = ".cache/danlu"
    """Where tokenised rows are kept, by content, so that a second run does not tokenise again."""

    @model_validator(mode="after")
    def _broken_rows_have_one_answer(self) -> Self:
        kinds = [step.kind for step in self.clean]
        if {"drop_broken", "repair_broken"} <= set(kinds):
            raise ValueError("clean has drop_broken and repair_broken; repair_broken drops what it cannot repair, so one is enough")
        return self

    @model_validator(mode="after")
    def _each_split_comes_from_one_place(self) -> Self:
        if self.split is None:
            return self
        if self.dev_size != type(self).model_fields["dev_size"].default:
            raise ValueError("dev_size has no effect beside split; write it there: split: {kind: ..., dev_size: ...}")
        if isinstance(self.split, Given):
            if self.dev is None:
                raise ValueError("split.kind=given needs a file in dev; without one, split.kind=stratified or ratio draws it")
            return self
        for name in ("dev", "test"):
            size = getattr(self.split, f"{name}_size")
            if size and getattr(self, name) is not None:
                raise ValueError(f"split.{name}_size={size:g} draws {name} rows, and {name} names a file; set it to 0, or leave {name} out")
        if self.dev is None and not self.split.dev_size:
            raise ValueError("split.dev_size=0 leaves no dev row; name a file in dev, or hold some rows out")
        if self.split.dev_size + self.split.test_size >= 1:
            raise ValueError(f"split: dev_size + test_size = {self.split.dev_size + self.split.test_size:g} leaves no training row")
        return self
