"""Rows before training: the report on them, as a job's task reads them, and what its steps make of them. Part of the SDK."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from danlu.errors import DataError, SpecError
from danlu.spec.data import Columns, DropBroken, RepairBroken
from danlu.spec.task import (
    Chat,
    Classification,
    Embed,
    MaskedLm,
    MultiLabelClassification,
    Preference,
    Pretrain,
    Regression,
    Seq2Seq,
    Task,
    TokenClassification,
    rows_are_texts,
)
from danlu.spec.train import TrainJob

if TYPE_CHECKING:
    from danlu.data.clean import Cleaned
    from danlu.data.profile import Example, Profile
    from danlu.data.row_texts import Reading
    from danlu.tasks.rows import Split


def data_report(
    files: Sequence[str] = (),
    *,
    job: TrainJob | None = None,
    test: Sequence[str] = (),
    near_threshold: float | None = 0.8,
    max_rows: int | None = None,
) -> Profile:
    """What files hold and what is wrong with them; with a job, as its model reads them, and without files, the job's own."""
    from danlu.data.profile import profile

    sources: dict[str, str | Sequence[str]] = {}
    if files:
        sources["train"] = list(files)
    elif job is not None:
        sources |= {name: source for name in ("train", "dev", "test") if (source := getattr(job.data, name)) is not None}
    else:
        raise SpecError("there is nothing to report on", where="danlu data report", fix="a file, or --spec job.yaml for the job's own")
    if test:
        sources["test"] = list(test)
    if job is None:
        return profile(sources, Columns(), near_threshold=near_threshold, max_rows=max_rows)
    from danlu.artifact.pretrained import model_folder
    from danlu.compress.start import with_its_start
    from danlu.tasks.tokenizer import load_tokenizer

    job = with_its_start(job)
    tokenizer = load_tokenizer(model_folder(job.model))
    found = profile(
        sources,
        job.data.columns,
        format=job.data.format,
        tokenizer=tokenizer,
        max_length=job.model.max_length,
        # Of other rows the model reads several texts, or windows: the plan says what is cut of them.
        cuts=isinstance(job.task, Classification | MultiLabelClassification | Regression | Chat),
        near_threshold=near_threshold,
        max_rows=max_rows,
        reading=_reading(job.task, tokenizer),
    )
    try:
        example = _first_example(job, sources["train"], tokenizer, sorted(found.splits["train"].labels))
    except DataError as error:
        return replace(found, warnings=(*found.warnings, f"task.kind={job.task.kind} cannot read the first rows: {error.problem}"))
    return replace(found, example=example)


def _reading(task: Task, tokenizer: Any) -> Reading:
    from danlu.data.row_texts import Reading, conversation_reader

    match task:
        case Classification() | Pretrain():
            return Reading(of_texts=True)
        case MultiLabelClassification():
            from danlu.tasks.multi_label import label_reader

            read = label_reader(task.separator)
            return Reading(of_texts=True, labels_of=lambda value: read(value, 0) or ())
        case Chat() | Preference():
            return Reading(False, None, lambda first: conversation_reader(task, tokenizer, first))
        case _:
            return Reading(of_texts=rows_are_texts(task), labels_of=None)


def _first_example(job: TrainJob, source: str | Sequence[str], tokenizer: Any, labels: Sequence[str]) -> Example:
    from danlu.data.encode import NO_TARGET
    from danlu.data.profile import Example
    from danlu.data.rendering import show
    from danlu.tasks.task import read_given, read_splits

    names = list(getattr(job.task, "labels", None) or labels)
    tolerant = any(isinstance(step, DropBroken | RepairBroken) for step in job.data.clean)
    steps = job.data.clean if tolerant else [*job.data.clean, DropBroken()]  # a broken row is reported, not a reason to show nothing
    with tempfile.TemporaryDirectory(prefix="danlu-example-") as folder:
        changes = {"max_rows": 50, "clean": steps, "cache_dir": folder}
        if isinstance(job.task, TokenClassification) and job.task.labels is None:  # tags are known when rows have been read
            few = job.data.model_copy(update=changes | {"train": source, "dev": None, "test": None})
            made = read_splits(job.model_copy(update={"data": few}), tokenizer, max_length=job.model.max_length)
            split = min(made.train, made.dev, key=lambda split: split.texts.row_numbers[0])
        else:
            few = job.data.model_copy(update=changes)
            split = read_given(source, job.model_copy(update={"data": few}), tokenizer, names, max_length=job.model.max_length)
    ids = [int(token) for token in split.encoded.row(0)]
    text = None
    if isinstance(job.task, Chat | Preference):
        text = show(split.encoded, 0, tokenizer)
    elif isinstance(job.task, Seq2Seq):
        from_here = int((split.encoded.row_labels(0) == NO_TARGET).sum())
        text = f"{tokenizer.decode(ids[:from_here])}⟦{tokenizer.decode(ids[from_here:])}⟧"
    return Example(tuple(tokenizer.convert_ids_to_tokens(ids)), tuple(ids), _target(job.task, split, names), text)


def _target(task: Task, split: Split, names: Sequence[str]) -> str:
    match task:
        case Regression() if split.labels is not None:
            return f"{float(split.labels[0]):g}"
        case Embed():
            return "to be nearest to its own second text"
        case Pretrain(objective=MaskedLm()):
            return "the tokens that are masked"
        case Pretrain() | Chat() | Preference():
            return "every next token"
        case Seq2Seq():
            return "the text behind the source"
        case _ if split.references:
            return " | ".join(split.references[0]) or "no answer"
        case _:
            assert split.labels is not None
            return names[int(split.labels[0])]


def clean(job: TrainJob, out: str | None = None) -> tuple[Mapping[str, Sequence[str]], Cleaned]:
    """Run `data.clean` and `data.split`; the shards by split, in `out` or in the job's cache."""
    from danlu.data.prepare import needs_preparing, prepare

    if not needs_preparing(job.data):
        raise SpecError(
            "the job has no steps and no split to draw",
            where="data.clean",
            fix="data.clean: [{kind: drop_broken}, {kind: deduplicate_exact}]",
        )
    data = job.data if out is None else job.data.model_copy(update={"cache_dir": out})
    made, cleaned = prepare(data, job.seed, of_texts=rows_are_texts(job.task))
    return {name: list(shards) for name in ("train", "dev", "test") if (shards := getattr(made, name)) is not None}, cleaned
