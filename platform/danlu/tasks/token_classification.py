"""Token classification: a BIO tag for each word. Rows, model, loss, metrics, prediction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForTokenClassification, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.data.columns import Labelled, as_label, as_text, choose, enough
from danlu.data.encode import NO_TARGET, Encoded
from danlu.data.formats import Rows
from danlu.data.pack import Packed
from danlu.data.report import check_labels, data_report
from danlu.data.split import random_split
from danlu.data.windows import encode_words
from danlu.errors import DataError
from danlu.spec.data import Columns, Data
from danlu.spec.task import TokenClassification
from danlu.tasks.encoder import build_encoder, encoder_skeleton, head_of, head_parameters
from danlu.tasks.exchange import Span, Tagging, Text, Words, join_words, margin_of, split_words
from danlu.tasks.packed import PackedTagger, inputs
from danlu.tasks.rows import Split, Splits, hold_out, metrics_line, per_class_table, read_given, read_splits

PER_TOKEN = True
USUAL = {
    "tokens": ("tokens", "words", "token"),
    "text": ("text", "sentence", "content"),
    "label": ("ner_tags", "tags", "labels", "label", "entities", "spans", "ner", "annotations"),
}
TAG = re.compile(r"O|[BIES]-.+")

# rows


def splits(data: Data, task: TokenClassification, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int) -> Splits:
    """Read, check, split and tokenise; raises DataError for anything that could not be learned from.

    The rows of `train` are windows of at most max_length tokens; those of the others are whole texts.
    """
    rows = read_splits(data)
    read = {name: _read(table, data.columns, task, f"data.{name}") for name, table in rows.items()}
    flat = {name: _tag_by_tag(texts) for name, (_, texts) in read.items()}
    others = {name: texts for name, texts in flat.items() if name != "train"}
    known = check_labels(flat["train"].labels or [], others, task.labels)
    label_names = known if task.labels is not None else sorted(known, key=lambda tag: (tag != "O", tag))
    made = {name: _split(*found, data, task, tokenizer, label_names, max_length) for name, found in read.items()}
    report = data_report({name: (split.texts, split.encoded) for name, split in made.items()}, rows, max_length=max_length)
    if "dev" not in made:
        made = hold_out(made, *random_split(len(made["train"]), data.dev_size, seed))
    train = made["train"]
    return Splits(replace(train, encoded=train.encoded.sequences), made["dev"], made.get("test"), label_names, report)


def given_split(
    source: str | Sequence[str],
    data: Data,
    task: TokenClassification,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    max_length: int,
) -> Split:
    """Rows of other files than the job's, for scoring a model that knows `label_names`."""
    examples, texts = _read(read_given(source, data), data.columns, task.model_copy(update={"labels": list(label_names)}), "--data")
    check_labels(list(label_names), {"test": _tag_by_tag(texts)}, label_names)
    return _split(examples, texts, data, task, tokenizer, label_names, max_length)


def encode_examples(
    examples: Sequence[Words | Text],
    tokenizer: PreTrainedTokenizerBase,
    task: TokenClassification,
    *,
    max_length: int,
    cache_dir: str | Path | None = None,
) -> Encoded:
    """Windows of each text; `spans` are a word's characters at its first token."""
    words = [as_words(one) for one in examples]
    return encode_words([one.text for one in words], [one.spans for one in words], tokenizer, max_length=max_length, cache_dir=cache_dir)


def as_words(example: Words | Text) -> Words:
    """A text alone as its words."""
    return example if isinstance(example, Words) else split_words(example.text)


def _split(
    examples: Sequence[Words],
    texts: Labelled,
    data: Data,
    task: TokenClassification,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    max_length: int,
) -> Split:
    encoded = encode_examples(examples, tokenizer, task, max_length=max_length, cache_dir=data.cache_dir)
    index = {name: i for i, name in enumerate(label_names)}
    labels = np.full(len(encoded.input_ids), NO_TARGET, dtype=np.int64)
    for row, (example, tags) in enumerate(zip(examples, texts.labels or [], strict=True)):
        for token, word in first_tokens(encoded, row, example):
            labels[token] = index[tags[word]]
    return Split(replace(encoded, token_labels=labels), None, texts, examples, [(" ".join(tags),) for tags in texts.labels or []])


def first_tokens(encoded: Encoded, row: int, example: Words) -> Iterator[tuple[int, int]]:
    """(token, word) of each word's first token; a word of which the tokenizer makes nothing has none."""
    assert encoded.spans is not None
    number = {start: i for i, (start, _) in enumerate(example.spans)}
    for token in range(encoded.bounds[row], encoded.bounds[row + 1]):
        if (start := int(encoded.spans[token, 0])) >= 0:
            yield token, number[start]


def _read(rows: Rows, columns: Columns, task: TokenClassification, where: str) -> tuple[list[Words], Labelled]:
    by_tokens = columns.tokens is not None or (columns.text is None and any(name.lower() in USUAL["tokens"] for name in rows.columns))
    role = "tokens" if by_tokens else "text"
    chosen = choose(rows, columns, {role: USUAL[role], "label": USUAL["label"]}, (role, "label"), where)
    examples: list[Words] = []
    tags: list[tuple[str, ...]] = []
    numbers: list[int] = []
    dropped: Counter[str] = Counter()
    for number, (asked, told) in enumerate(zip(rows.columns[chosen[role]], rows.columns[chosen["label"]], strict=True), 1):
        place = f"{where}: row {number}"
        found = _tagged_words(asked, told, task, place) if by_tokens else _tagged_spans(as_text(asked), told, place)
        if found is None:
            dropped["rows whose entities do not begin and end with words"] += 1
        elif not found[0].spans:
            dropped["rows without words"] += 1
        else:
            examples.append(found[0])
            tags.append(found[1])
            numbers.append(number)
    enough(examples, dropped, chosen, where)
    counts = Counter(kind for one in tags for kind, _, _ in entities(one))
    texts = Labelled(
        [one.text for one in examples], None, tags, numbers, chosen, label_counts=dict(sorted(counts.items())), dropped=dict(dropped)
    )
    return examples, texts


def _tagged_words(asked: object, told: object, task: TokenClassification, place: str) -> tuple[Words, tuple[str, ...]]:
    words = asked.split() if isinstance(asked, str) else [as_text(word) for word in asked] if isinstance(asked, list | tuple) else []
    given = told.split() if isinstance(told, str) else list(told) if isinstance(told, list | tuple) else []
    if len(words) != len(given):
        raise DataError(f"{len(given)} tags for {len(words)} words", where=place, fix="a tag for each word")
    tags = tuple(_tag(one, task.labels, place) for one in given)
    kept = [i for i, word in enumerate(words) if word.strip()]
    return join_words([words[i] for i in kept]), tuple(tags[i] for i in kept)


def _tag(told: object, labels: Sequence[str] | None, place: str) -> str:
    if isinstance(told, int) and not isinstance(told, bool):
        if labels is None or not 0 <= told < len(labels):
            raise DataError(
                f"the tag {told} is a number", where=place, fix="task.labels: the tags in the order of their numbers, [O, B-PER, ...]"
            )
        return labels[told]
    tag = as_label(told)
    if not TAG.fullmatch(tag):
        raise DataError(f"{tag!r} is no BIO tag", where=place, fix="O, B-TYPE, I-TYPE (also E-TYPE and S-TYPE)")
    return tag


def _tagged_spans(text: str, told: object, place: str) -> tuple[Words, tuple[str, ...]] | None:
    """A text's words with tags for its entities; None where one does not begin and end with words, or two overlap."""
    words = split_words(text)
    starts = {start: i for i, (start, _) in enumerate(words.spans)}
    stops = {stop: i for i, (_, stop) in enumerate(words.spans)}
    tags = ["O"] * len(words.spans)
    for start, stop, kind in _given_spans(told, place):
        if not 0 <= start < stop <= len(text):
            raise DataError(f"the entity {kind} from {start} to {stop} is outside of the {len(text)} characters", where=place)
        if start not in starts or stop not in stops:
            return None
        first, last = starts[start], stops[stop]
        if any(tag != "O" for tag in tags[first : last + 1]):
            return None
        tags[first : last + 1] = [f"B-{kind}", *[f"I-{kind}"] * (last - first)]
    return words, tuple(tags)


def _given_spans(told: object, place: str) -> list[tuple[int, int, str]]:
    """(start, end, type): of lists (doccano), of objects (Label Studio, spaCy), of CLUENER's {type: {text: [[first, last]]}}."""
    found: list[tuple[int, int, str]] = []
    try:
        if isinstance(told, Mapping):
            for kind, texts in told.items():
                found += [(int(first), int(last) + 1, kind) for places in texts.values() for first, last in places]
        else:
            for one in told or ():  # type: ignore[attr-defined]
                if isinstance(one, Mapping):
                    kind = next(one[name] for name in ("label", "type", "entity", "entity_group") if name in one)
                    found.append((int(one["start"]), int(one["end"]), as_label(kind)))
                else:
                    start, stop, kind = one
                    found.append((int(start), int(stop), as_label(kind)))
    except (TypeError, ValueError, KeyError, AttributeError, StopIteration) as error:
        raise DataError(
            f"{str(told)[:80]!r} is no list of entities", where=place, fix='[[start, end, "TYPE"], ...] or [{"start", "end", "label"}, ...]'
        ) from error
    return found


def _tag_by_tag(texts: Labelled) -> Labelled:
    """The rows' tags one after the other, each with its row's number."""
    told = [(tag, row) for tags, row in zip(texts.labels or [], texts.row_numbers, strict=True) for tag in tags]
    return replace(texts, labels=[tag for tag, _ in told], row_numbers=[row for _, row in told])


# model


def build_model(
    folder: str | Path, label_names: Sequence[str], *, dropout: float | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The pretrained encoder with a new head for these tags, in float32; `quantization` holds its linear layers in fewer bits."""
    return build_encoder(AutoModelForTokenClassification, folder, head_of(label_names), dropout=dropout, quantization=quantization)


def skeleton(folder: str | Path, num_labels: int) -> PreTrainedModel:
    """The model `build_model` builds, with shapes and no weights."""
    return encoder_skeleton(AutoModelForTokenClassification, folder, {"num_labels": num_labels})


def wrap(model: PreTrainedModel, task: TokenClassification, *, packed: bool | None = None) -> PackedTagger:
    """The model as the loop calls it; `packed` as PackedEncoder has it."""
    return PackedTagger(model, packed=packed)


# loss


def loss(model: nn.Module, batch: Packed, task: TokenClassification) -> torch.Tensor:
    """Sum of the cross-entropies of words' first tokens."""
    assert batch.labels is not None
    return nn.functional.cross_entropy(row_outputs(model, batch).float(), batch.labels, reduction="sum", ignore_index=NO_TARGET)


def num_targets(batch: Packed) -> int:
    """One a word."""
    assert batch.labels is not None
    return int((batch.labels != NO_TARGET).sum())


# metrics


@dataclass(frozen=True)
class TagScores:
    """Scores of whole entities, as seqeval counts them: a type and both ends have to be right. `accuracy` is of words' tags."""

    f1: float
    precision: float
    recall: float
    accuracy: float
    num_rows: int
    per_class: Mapping[str, Mapping[str, float]]

    def metrics(self) -> dict[str, float]:
        """The single numbers, by name."""
        return {name: getattr(self, name) for name in ("f1", "precision", "recall", "accuracy")}

    def text(self) -> str:
        """For the terminal, with the types."""
        return "\n".join([metrics_line(self), "", *per_class_table(self.per_class)])


def row_outputs(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Logits, [tokens, tags]."""
    found: torch.Tensor = model(*inputs(batch))
    return found


def scores(outputs: np.ndarray, split: Split, label_names: Sequence[str], task: TokenClassification) -> TagScores:
    """Score logits (float [tokens, tags]) against a split's tags."""
    words = [one for one in split.examples if isinstance(one, Words)]
    given = [found.tags for found in predictions(outputs, split.encoded, words, label_names, task)]
    return tag_scores(given, [tuple(tags) for tags in split.texts.labels or []])


def tag_scores(given: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> TagScores:
    """Score tags of rows against the right ones."""
    found, right = ({(row, *one) for row, tags in enumerate(table) for one in entities(tags)} for table in (given, truth))
    kinds = sorted({kind for _, kind, _, _ in found | right})
    per_class = {kind: _counted({one for one in found if one[1] == kind}, {one for one in right if one[1] == kind}) for kind in kinds}
    every = _counted(found, right)
    same = [one == other for row, others in zip(given, truth, strict=True) for one, other in zip(row, others, strict=True)]
    return TagScores(every["f1"], every["precision"], every["recall"], float(np.mean(same)), len(truth), per_class)


def _counted(found: set[tuple[int, str, int, int]], right: set[tuple[int, str, int, int]]) -> dict[str, float]:
    both = len(found & right)
    return {
        "precision": both / len(found) if found else 0.0,
        "recall": both / len(right) if right else 0.0,
        "f1": 2 * both / (len(found) + len(right)) if found or right else 0.0,
        "support": len(right),
    }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) of each entity, in BIO or BIOES tags, well-formed or not, as conlleval and seqeval read them: one that
    begins with I- begins all the same."""
    found: list[tuple[str, int, int]] = []
    before, kind_before, first = "O", "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        changes = kind != kind_before
        ends = before in "ES" or (before in "BI" and (mark in "BSO" or changes))
        begins = mark in "BS" or (mark in "IE" and (before in "ESO" or changes))
        if ends and before != "O":
            found.append((kind_before, first, i - 1))
        if begins:
            first = i
        before, kind_before = mark, kind
    return found


# prediction


def predictions(
    outputs: np.ndarray, encoded: Encoded, examples: Sequence[Words | Text], label_names: Sequence[str], task: TokenClassification
) -> list[Tagging]:
    """The most probable tag of each word, and the entities that they make."""
    probabilities = torch.from_numpy(outputs).double().softmax(-1).numpy()
    found = []
    for row, example in enumerate(map(as_words, examples)):
        tags, numbers, margins = ["O"] * len(example.spans), [1.0] * len(example.spans), [1.0]
        for token, word in first_tokens(encoded, row, example):
            best = int(probabilities[token].argmax())
            tags[word], numbers[word] = label_names[best], float(probabilities[token, best])
            margins.append(margin_of(probabilities[token].tolist()))
        spans = tuple(_span(example, kind, first, last, numbers) for kind, first, last in entities(tags))
        found.append(Tagging(" ".join(tags), numbers, tuple(tags), spans, min(margins)))
    return found


def _span(example: Words, kind: str, first: int, last: int, numbers: Sequence[float]) -> Span:
    """An entity; its score is the mean of its words' probabilities."""
    start, end = example.spans[first][0], example.spans[last][1]
    return Span(example.text[start:end], start, end, float(np.mean(numbers[first : last + 1])), kind)


__all__ = [
    "PER_TOKEN", "TagScores", "build_model", "encode_examples", "given_split", "head_parameters", "loss", "num_targets", "predictions",
    "row_outputs", "scores", "skeleton", "splits", "wrap",
]  # fmt: skip
