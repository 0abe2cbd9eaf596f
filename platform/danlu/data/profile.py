"""What a file of rows holds and what is wrong with it, whatever its columns are: one pass, in memory that does not grow with the file."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from danlu.data.columns import is_empty
from danlu.data.conversations import BadRow
from danlu.data.language import language
from danlu.data.near import Seen, database
from danlu.data.personal import masked, personal
from danlu.data.row import Broken
from danlu.data.row_texts import ANY, Reader, Reading, Values, roles_of, row_text
from danlu.data.stream import Source, find, stream
from danlu.errors import DataError
from danlu.spec.data import Columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 20
"""Lines of a finding that are named; the others are counted."""
MAX_DISTINCT = 1000
"""Values of a column that are told apart."""
LONG_TEXT = 400_000
"""Characters of a text that are tokenised to learn its length."""


@dataclass(frozen=True)
class Spread:
    """How numbers are spread."""

    mean: float
    p50: int
    p90: int
    p99: int
    max: int


@dataclass(frozen=True)
class Found:
    """Rows with something: how many, and the first of them, each as `line` or `file:line` and what there is to say."""

    rows: int = 0
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ColumnProfile:
    """One column. `distinct` is None where there are more values than are told apart."""

    types: Mapping[str, int]
    missing: int
    distinct: int | None
    characters: Spread | None


@dataclass(frozen=True)
class SplitProfile:
    """One split: rows that could be read, and everything that was noticed on the way."""

    rows: int
    sources: tuple[str, ...]
    format: str
    roles: Mapping[str, str]
    """What the columns were taken for; empty where that cannot be told: then every text of a row counts."""
    columns: Mapping[str, ColumnProfile]
    labels: Mapping[str, int]
    characters: Spread
    tokens: Spread | None
    truncated: float | None
    """Share of the rows longer than the model takes."""
    broken: Found
    empty: Found
    unlabelled: Found
    exact: Found
    near: Found | None
    conflicting: Found
    in_train: Found | None
    languages: Mapping[str, int]
    personal: Mapping[str, Found]


@dataclass(frozen=True)
class Example:
    """The first row as the model reads it. `text`: of a language model's, what it learns between ⟦ and ⟧."""

    tokens: tuple[str, ...]
    input_ids: tuple[int, ...]
    target: str
    text: str | None = None


@dataclass(frozen=True)
class Profile:
    """The report on a file, or on all the files of a job."""

    splits: Mapping[str, SplitProfile]
    max_length: int | None
    near_threshold: float | None
    example: Example | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def profile(
    sources: Mapping[str, str | Sequence[str]],
    columns: Columns,
    *,
    format: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    cuts: bool = True,
    near_threshold: float | None = 0.8,
    max_rows: int | None = None,
    reading: Reading = ANY,
) -> Profile:
    """Read every split once. `near_threshold=None` leaves near duplicates out, which take most of the time; `reading`: as a task does."""
    splits = {}
    with TemporaryDirectory(prefix="danlu-report-") as folder:
        connection = database(Path(folder) / "seen.sqlite")
        try:
            names = sorted(sources, key=lambda name: name != "train")  # what else there is, is looked up in train
            train: tuple[Seen, Seen | None] | None = None
            for name in names:
                found = find(sources[name], format=format, where=f"data.{name}")
                seen = Seen(connection, f"exact_{name}"), Seen(connection, f"near_{name}", near_threshold) if near_threshold else None
                builder = _Builder(name, found, columns, tokenizer, max_length if cuts else None, seen, train, reading)
                for source in found:
                    for item in _first(stream(source, where=f"data.{name}"), max_rows):
                        builder.add(item)
                splits[name] = builder.build()
                train = seen if name == "train" else train
        finally:
            connection.close()
    return Profile(splits, max_length, near_threshold, None, tuple(_warnings(splits)))


def _first(items: Iterator[Any], number: int | None) -> Iterator[Any]:
    for i, item in enumerate(items):
        if number is not None and i >= number:
            return
        yield item


@dataclass
class _Counted:
    rows: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, at: str, told: str = "") -> None:
        self.rows += 1
        if len(self.examples) < SHOWN:
            self.examples.append((at, told))

    def found(self) -> Found:
        return Found(self.rows, tuple(self.examples))


class _Column:
    def __init__(self) -> None:
        self.types: Counter[str] = Counter()
        self.lengths = array("I")
        self.values: set[str] | None = set()

    def add(self, value: Any) -> None:
        if value is None or value == "":
            return
        self.types[_type(value)] += 1
        if isinstance(value, str):
            self.lengths.append(len(value))
        if self.values is not None:
            self.values.add(str(value)[:200])
            if len(self.values) > MAX_DISTINCT:
                self.values = None


def _type(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "integer", float: "number", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


class _Builder:
    """Takes the rows of one split."""

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        columns: Columns,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        seen: tuple[Seen, Seen | None],
        train: tuple[Seen, Seen | None] | None,
        reading: Reading,
    ) -> None:
        self.reading = reading
        self.reader: Reader | None = None
        self.name, self.sources, self.wanted, self.tokenizer, self.max_length = name, sources, columns, tokenizer, max_length
        self.exact_seen, self.near_seen = seen
        self.train = train
        self.index = {source.path: i for i, source in enumerate(sources)}
        self.roles: dict[str, str] | None = None
        self.rows = 0
        self.columns: dict[str, _Column] = {}
        self.labels: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.characters, self.tokens = array("I"), array("I")
        self.waiting: list[tuple[str, str | None]] = []
        self.broken, self.empty, self.unlabelled, self.conflicting = _Counted(), _Counted(), _Counted(), _Counted()
        self.exact, self.near, self.in_train = _Counted(), _Counted(), _Counted()
        self.personal: dict[str, _Counted] = {}
        self.label_at: dict[int, str] = {}

    def add(self, item: Any) -> None:
        at = self._at(item.source, item.line)
        if isinstance(item, Broken):
            self.broken.add(at, item.reason)
            return
        self.rows += 1
        if self.roles is None:
            label = next((source.label_column for source in self.sources if source.path == item.source), None)
            self.roles = roles_of(item.values, self.wanted, label, f"data.{self.name}", of_texts=self.reading.of_texts)
            self.reader = self.reading.reader_for(item.values)
        for name, value in item.values.items():
            self.columns.setdefault(name, _Column()).add(value)
        text = row_text(item.values, self.roles)
        if is_empty(text):
            self.empty.add(at)
            return
        try:
            read = None if self.reader is None else self.reader(item.values)
        except BadRow as error:
            self.broken.add(at, str(error))
            return
        label = None
        if "label" in self.roles and self.reading.labels_of is not None:
            names = self.reading.labels_of(item.values.get(self.roles["label"]))
            label = ", ".join(names)
            self.labels.update(names)
            if not names:
                self.unlabelled.add(at)
        self._lengths(item.values, text, read)
        self.languages[language(text)] += 1
        for kind, hit in dict(personal(text)).items():
            self.personal.setdefault(kind, _Counted()).add(at, masked(hit))
        self._repeats(text, label, at, item)

    def _repeats(self, text: str, label: str | None, at: str, item: Any) -> None:
        number = self.index[item.source] << 40 | item.line
        same = self.exact_seen.add(text, number)
        if same is not None:
            self.exact.add(at, f"like {self._told(same)}")
            if label and (first := self.label_at.get(same)) not in (None, label):
                self.conflicting.add(at, f"{label!r}, and {first!r} in {self._told(same)}")
        elif label:
            self.label_at[number] = label
        if self.near_seen is not None and same is None and (like := self.near_seen.add(text, number)) is not None:
            self.near.add(at, f"nearly like {self._told(like)}")
        if self.train is not None:
            exact, near = self.train
            if exact.find(text) is not None:
                self.in_train.add(at, "the same text")
            elif near is not None and near.find(text) is not None:
                self.in_train.add(at, "nearly the same text")

    def _lengths(self, values: Values, text: str, read: Sequence[str] | None) -> None:
        self.characters.append(len(text))
        if self.tokenizer is None:
            return
        if read is not None:
            # The chat template has written the special tokens already.
            ids = self.tokenizer(list(read), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            self.tokens.extend(len(row) for row in ids)
            return
        assert self.roles is not None
        pair = values.get(self.roles["text_pair"]) if "text_pair" in self.roles and "text" in self.roles else None
        first = values.get(self.roles["text"]) if pair is not None else text
        self.waiting.append((str(first)[:LONG_TEXT], None if pair is None else str(pair)[:LONG_TEXT]))
        if len(self.waiting) == 256:
            self._tokenise()

    def _tokenise(self) -> None:
        assert self.tokenizer is not None
        for group in ([row for row in self.waiting if row[1] is None], [row for row in self.waiting if row[1] is not None]):
            if group:
                pairs = [pair for _, pair in group] if group[0][1] is not None else None
                ids = self.tokenizer([text for text, _ in group], pairs, truncation=False, verbose=False)["input_ids"]
                self.tokens.extend(len(row) for row in ids)
        self.waiting.clear()

    def _at(self, source: str, line: int) -> str:
        return str(line) if len(self.sources) == 1 else f"{Path(source).name}:{line}"

    def _told(self, number: int) -> str:
        return self._at(self.sources[number >> 40].path, number & ((1 << 40) - 1))

    def build(self) -> SplitProfile:
        if not self.rows and not self.broken.rows:
            raise DataError(
                f"{self.sources[0].path} has a header but no rows", where=f"data.{self.name}", fix="a file with at least one row"
            )
        if self.waiting:
            self._tokenise()
        tokens = np.asarray(self.tokens)
        return SplitProfile(
            rows=self.rows,
            sources=tuple(source.path for source in self.sources),
            format="+".join(dict.fromkeys(source.format for source in self.sources)),
            roles=self.roles or {},
            columns={
                name: ColumnProfile(
                    dict(column.types),
                    self.rows - column.types.total(),
                    None if column.values is None else len(column.values),
                    spread(column.lengths) if len(column.lengths) else None,
                )
                for name, column in self.columns.items()
            },
            labels=dict(sorted(self.labels.items(), key=lambda pair: (-pair[1], pair[0]))),
            characters=spread(self.characters),
            tokens=spread(self.tokens) if len(tokens) else None,
            truncated=float((tokens > self.max_length).mean()) if len(tokens) and self.max_length is not None else None,
            broken=self.broken.found(),
            empty=self.empty.found(),
            unlabelled=self.unlabelled.found(),
            exact=self.exact.found(),
            near=None if self.near_seen is None else self.near.found(),
            conflicting=self.conflicting.found(),
            in_train=None if self.train is None else self.in_train.found(),
            languages=dict(self.languages.most_common()),
            personal={kind: found.found() for kind, found in sorted(self.personal.items())},
        )


def spread(values: Sequence[int] | array[int]) -> Spread:
    """Mean and percentiles, by numpy's linear rule and then cut to whole numbers."""
    if not len(values):
        return Spread(0.0, 0, 0, 0, 0)
    numbers = np.asarray(values)
    p50, p90, p99 = (int(value) for value in np.percentile(numbers, [50, 90, 99]))
    return Spread(round(float(numbers.mean()), 2), p50, p90, p99, int(numbers.max()))


def _warnings(splits: Mapping[str, SplitProfile]) -> Iterator[str]:
    for name, split in splits.items():
        if split.broken.rows:
            yield f"{name}: {split.broken.rows} broken rows, the first in line {split.broken.examples[0][0]}: {split.broken.examples[0][1]}"
        if split.empty.rows:
            yield f"{name}: {split.empty.rows} rows have no text"
        if split.unlabelled.rows:
            yield f"{name}: {split.unlabelled.rows} rows have no label"
        if split.conflicting.rows:
            yield f"{name}: {split.conflicting.rows} rows have the text of an earlier row and another label"
        if split.in_train is not None and split.in_train.rows:
            share = split.in_train.rows / max(split.rows, 1)
            yield f"{name}: {split.in_train.rows} rows ({share:.1%}) stand in train too, so its scores flatter"
        if split.truncated is not None and split.truncated > 0.1:
            yield f"{name}: {split.truncated:.0%} of the rows are longer than model.max_length and will be cut"
        repeated = split.exact.rows + (split.near.rows if split.near else 0)
        if repeated > 0.05 * max(split.rows, 1):
            yield f"{name}: {repeated} rows ({repeated / split.rows:.0%}) repeat an earlier one"
        if split.labels and max(split.labels.values()) > 20 * min(split.labels.values()):
            small = min(split.labels, key=lambda label: split.labels[label])
            yield f"{name}: label {small!r} has {split.labels[small]} rows, the largest {max(split.labels.values())}"
        for kind, found in split.personal.items():
            yield f"{name}: {found.rows} rows may hold a {kind}, the first in line {found.examples[0][0]}"
