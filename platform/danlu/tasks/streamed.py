"""Training rows that are never held in memory (`data.streaming`): tokenised a shard at a time by the task's own functions, read from files.

The shards are those that cleaning writes (`danlu.data.prepare`); each becomes one file of token ids, so a run that was stopped goes on at
its last shard, and shards can be tokenised side by side, also on other machines. The folder's name is a digest of the shards, the task, the
tokenizer and the settings.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import PreTrainedTokenizerBase

from danlu.data.columns import USUAL, Labelled, as_label, choose, labelled
from danlu.data.encode import tokenizer_digest
from danlu.data.formats import Rows
from danlu.data.pack import Corrupt
from danlu.data.prepare import prepare
from danlu.data.report import check_labels, streamed_report
from danlu.data.token_files import TokenFiles, TokenRows, has_shard, join, open_files, shard_path, write_shard
from danlu.errors import DataError
from danlu.spec.data import Data
from danlu.spec.task import Classification, MaskedLm, Pretrain, Task, rows_are_texts
from danlu.spec.train import TrainJob
from danlu.tasks.rows import Split, Splits, read_given


@dataclass(frozen=True)
class Shard:
    """One file of rows, and what it takes to tokenise it in any process that sees its folder."""

    source: str
    target: Path
    data: Data
    task: Task
    tokenizer: PreTrainedTokenizerBase
    label_names: tuple[str, ...]
    max_length: int


Spread = Callable[[Callable[[Shard], bool], Sequence[Shard]], None]
"""Calls the function with each shard, on other machines too; the function answers False where a machine does not have the rows."""


def read_streamed(job: TrainJob, tokenizer: PreTrainedTokenizerBase, *, max_length: int, spread: Spread | None = None) -> Splits:
    """A job's rows, the training rows in files. `spread` shares their shards out; unset, they are tokenised here."""
    data, cleaned = prepare(job.data, job.seed, of_texts=rows_are_texts(job.task))
    names = _label_names(data, job.task)
    files = _token_files(data, job.task, tokenizer, names, max_length, spread)
    rows = files.rows
    train = Split(rows.encoded, rows.labels, Labelled([], None, None, [], {}), corrupt=_corrupt(job.task, tokenizer), digest=files.digest)
    held = {name: _held(getattr(data, name), name, data, job.task, tokenizer, names, max_length) for name in ("dev", "test")}
    assert held["dev"] is not None
    counts = {} if rows.labels is None else dict(zip(names, np.bincount(rows.labels, minlength=len(names)).tolist(), strict=True))
    report = streamed_report(
        rows.encoded,
        counts,
        {name: (split.texts, split.encoded) for name, split in held.items() if split is not None},
        {name: list(shards) for name in ("train", "dev", "test") if (shards := getattr(data, name)) is not None},
        left_out=rows.num_read - len(rows.encoded) if job.task.kind == "classification" else None,
        max_length=max_length,
    )
    return Splits(train, held["dev"], held["test"], names, replace(report, cleaned=cleaned))


def _token_files(
    data: Data, task: Task, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], max_length: int, spread: Spread | None
) -> TokenFiles:
    folder = Path(data.cache_dir).expanduser() / "packed" / _key(data, task, tokenizer, names, max_length)
    if (found := open_files(folder)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers of one machine may come here at once
        if (found := open_files(folder)) is not None:
            return found
        shards = [
            Shard(source, shard_path(folder, number), data, task, tokenizer, tuple(names), max_length)
            for number, source in enumerate(data.train)
        ]
        if spread is not None and (missing := [shard for shard in shards if not has_shard(shard.target)]):
            spread(make_shard, missing)
        for shard in shards:
            make_shard(shard)  # what is there, from an earlier run or another machine, is not made again
        return join(folder, len(shards))


def make_shard(shard: Shard) -> bool:
    """Tokenise one shard into its file. False if this machine does not have its rows."""
    if not Path(shard.source).exists():
        return False
    if not has_shard(shard.target):
        with TemporaryDirectory(prefix="danlu-shard-") as folder:  # the tokens' own cache: the shard is what is kept
            here = shard.data.model_copy(update={"cache_dir": folder})
            split = _train_rows(shard, here)
        write_shard(shard.target, TokenRows(split.encoded, split.labels, _num_lines(shard.source)))
    return True


def _train_rows(shard: Shard, data: Data) -> Split:
    """A shard's rows as the task's `splits` has them."""
    from danlu.tasks import masked
    from danlu.tasks.task import task_file

    with _named("train"):
        if _is_masked(shard.task):  # the others' rows are masked once, these each time
            texts = labelled(read_given(shard.source, data), data.columns, where="--data", need_label=False)
            return Split(masked.pieces(texts.texts, shard.tokenizer, shard.max_length), None, texts)
        file = task_file(shard.task)
        return file.given_split(shard.source, data, shard.task, shard.tokenizer, shard.label_names, max_length=shard.max_length)


def _held(
    source: str | Sequence[str] | None,
    name: str,
    data: Data,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    max_length: int,
) -> Split | None:
    from danlu.tasks.task import task_file

    if source is None:
        return None
    with _named(name):
        return task_file(task).given_split(source, data, task, tokenizer, names, max_length=max_length)


@contextmanager
def _named(split: str) -> Iterator[None]:
    """An error about `--data` is about a split of the job here."""
    try:
        yield
    except DataError as error:
        if error.where != "--data":
            raise
        raise DataError(error.problem, where=f"data.{split}", fix=error.fix) from error


def _is_masked(task: Task) -> bool:
    return isinstance(task, Pretrain) and isinstance(task.objective, MaskedLm)


def _corrupt(task: Task, tokenizer: PreTrainedTokenizerBase) -> Corrupt | None:
    from danlu.tasks import masked

    return masked.masking(task, tokenizer) if isinstance(task, Pretrain) and _is_masked(task) else None


def _label_names(data: Data, task: Task) -> list[str]:
    """A classifier's labels, in the order of the model's outputs: one pass over the rows."""
    if not isinstance(task, Classification):
        return []
    column, counts = None, Counter[str]()
    for values in _values(data.train):
        if column is None:
            column = choose(Rows({name: [] for name in values}, (), "jsonl"), data.columns, USUAL, ("text", "label"), "data.train")["label"]
        counts[as_label(values.get(column))] += 1
    del counts[""]
    return check_labels(counts, {}, task.labels)


def _values(shards: str | Sequence[str]) -> Iterator[dict[str, object]]:
    for shard in [shards] if isinstance(shards, str) else shards:
        with Path(shard).open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield json.loads(line)


def _num_lines(path: str) -> int:
    with Path(path).open("rb") as file:
        return sum(1 for _ in file)


def _key(data: Data, task: Task, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], max_length: int) -> str:
    # A shard's folder is named by its files and steps, and a shard is written once.
    shards = [[str(Path(shard).resolve()), Path(shard).stat().st_size] for shard in data.train]
    settings = [1, shards, task.model_dump(mode="json"), data.columns.model_dump(), list(names), max_length, tokenizer.chat_template]
    digest = sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokenizer_digest(tokenizer).encode())
    return digest.hexdigest()[:24]
