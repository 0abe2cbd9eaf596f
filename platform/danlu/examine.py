"""Looking closely: the analysis of an evaluation, two models side by side. Part of the SDK, which gives these names on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.artifact.bundle import Bundle
from danlu.errors import DataError, SpecError, StorageError
from danlu.handover import open_bundle
from danlu.spec.task import (
    CausalLm,
    Chat,
    Classification,
    EncoderTask,
    Pretrain,
    Seq2Seq,
    rows_are_texts,
)
from danlu.spec.train import TrainJob

if TYPE_CHECKING:
    from danlu.evaluate.analysis import Analysis
    from danlu.evaluate.bootstrap import Score
    from danlu.evaluate.explain import Explained
    from danlu.evaluate.score import Evaluation
    from danlu.evaluate.versus import Versus
    from danlu.tasks.rows import Split


@dataclass(frozen=True)
class Examined:
    """An evaluation, its rows and what stands beside the score."""

    evaluation: Evaluation
    split: Split
    analysis: Analysis
    facts: Mapping[str, str]


def examine(
    reference: str | Bundle,
    *,
    storage: str = "runs",
    data: Sequence[str] | str | None = None,
    url: str | None = None,
    api_key: str | None = None,
    slice_by: Sequence[str] = (),
) -> Examined:
    """Score a bundle, or an endpoint that serves it, and analyse the answers."""
    from danlu.compress.load import load_judge
    from danlu.evaluate.analysis import analyse
    from danlu.evaluate.score import evaluate as score
    from danlu.handover import split_for

    bundle = open_bundle(reference, storage)
    judge = load_judge(bundle)
    split, name = split_for(bundle, judge, data)
    of_rows = None
    if url is None:
        evaluation = score(judge, split)
    elif isinstance(bundle.meta.task, Seq2Seq):
        evaluation, of_rows = _ask_to_write(split, url, api_key)
    else:
        evaluation = _ask(bundle, split, url, api_key)
    columns = _columns(bundle, name, data, split, slice_by)
    temperature = _temperature(bundle, judge, name) if url is None else None
    task = bundle.meta.task
    analysis = analyse(
        task, split, evaluation.outputs, bundle.meta.labels, name=name, columns=columns, temperature=temperature, score=of_rows
    )
    facts = {"bundle": f"{bundle.meta.name}@v{bundle.meta.version} ({bundle.meta.digest})", "rows": f"{len(split):,} of {name}"}
    return Examined(evaluation, split, analysis, facts | ({"endpoint": url} if url is not None else {}))


def compare(a: str, b: str, *, storage: str = "runs", data: Sequence[str] | str | None = None, api_key: str | None = None) -> Versus:
    """Two bundles, or a bundle and an endpoint, on the same rows: those of A's job unless files are given."""
    from danlu.compress.load import load_judge
    from danlu.evaluate.score import evaluate as score
    from danlu.evaluate.versus import versus
    from danlu.handover import split_for

    named = [one for one in (a, b) if not _is_url(one)]
    if not named:
        raise SpecError("both are endpoints, so nothing says which rows to ask", where="danlu compare", fix="a bundle as one of the two")
    bundles = {one: open_bundle(one, storage) for one in named}
    first = bundles[named[0]]
    for other in bundles.values():
        if (other.meta.task.kind, other.meta.labels) != (first.meta.task.kind, first.meta.labels):
            raise SpecError(
                f"{named[0]} is {_kind(first)}, {named[-1]} {_kind(other)}: their answers cannot be compared",
                where="danlu compare",
                fix="two bundles of one task, with the same labels where it has labels",
            )
    split, name, outputs = None, "", {}
    tokenizer: Any = None
    for one in (*named, *(other for other in (a, b) if _is_url(other))):
        if _is_url(one):
            assert split is not None
            outputs[one] = _ask(first, split, one, api_key).outputs
            continue
        judge: Any = load_judge(bundles[one])
        if split is None:
            split, name = split_for(first, judge, data)
            tokenizer = judge.tokenizer
            outputs[one] = score(judge, split).outputs
        else:
            _check_same_tokens(tokenizer, judge.tokenizer, bundles[one])
            # The same texts, as this model's own tokenizer has them.
            own = replace(split, encoded=judge.encode(split.texts.texts, split.texts.pairs)) if first.meta.labels else split
            outputs[one] = score(judge, own).outputs
    assert split is not None
    return versus(first.meta.task, split, outputs[a], outputs[b], first.meta.labels, names=(a, b), split_name=name)


def _kind(bundle: Bundle) -> str:
    """What its answers are, in words."""
    labels = f" (labels {', '.join(bundle.meta.labels)})" if bundle.meta.labels else ""
    return f"a model for {bundle.meta.task.kind}{labels}"


def explain(
    reference: str | Bundle, inputs: Sequence[str | Mapping[str, Any]], pairs: Sequence[str] | None = None, *, storage: str = "runs"
) -> Sequence[Explained]:
    """A classifier's answers, as `predict` gives them, with what each word did to them."""
    from danlu.compress.load import load_predictor
    from danlu.evaluate.explain import explain as explained
    from danlu.tasks.exchange import BadExample, Text, read_examples

    predictor = load_predictor(open_bundle(reference, storage))
    try:
        asked = read_examples(inputs, pairs, predictor.task)
    except BadExample as error:
        raise DataError(error.problem, where="texts", fix=error.fix) from error
    return explained(predictor, [one for one in asked if isinstance(one, Text)])


def _check_same_tokens(one: Any, other: Any, bundle: Bundle) -> None:
    """SpecError if another language model reads rows as other tokens: losses a token could not be set side by side."""
    if isinstance(bundle.meta.task, EncoderTask):
        return
    if one.get_vocab() != other.get_vocab() or one.chat_template != other.chat_template:
        raise SpecError(
            f"{bundle.meta.name} reads the rows as other tokens than the first model, and a loss is one a token",
            where="danlu compare",
            fix="two models with one tokenizer and one chat template",
        )


def write_files(folder: str | Path, files: Mapping[str, str]) -> list[str]:
    """Write texts into a folder; their paths."""
    paths = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8")
            paths.append(str(path))
    except OSError as error:
        raise StorageError(f"cannot write: {error}", where=str(folder), fix="--out with a folder that can be written") from error
    return paths


def scores_json(examined: Examined) -> str:
    """The document that `danlu evaluate --out` writes as scores.json."""
    scores = dict(examined.evaluation.scores.metrics())
    document = {**examined.facts, "scores": scores, "seconds": examined.evaluation.seconds, "analysis": examined.analysis.to_dict()}
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _ask(bundle: Bundle, split: Split, url: str, api_key: str | None) -> Evaluation:
    from danlu.evaluate.endpoint import classify, row_losses
    from danlu.evaluate.score import Evaluation
    from danlu.tasks.task import task_file

    task = bundle.meta.task
    match task:
        case Chat() | Pretrain(objective=CausalLm()):
            read = row_losses(url, split, task, api_key=api_key)
            outputs, seconds = read.outputs, read.seconds
        case Classification():
            outputs, seconds = classify(url, split.texts, bundle.meta.labels, api_key=api_key)
        case _:
            why = {
                "preference": "compares with the start model, which is not served",
                "pretrain": "also scores words that were not masked, or replaced",
                "seq2seq": "has texts, which are scored by `danlu evaluate --url`",
            }.get(task.kind, "has neither")
            raise SpecError(
                f"an endpoint is asked for labels or for log probabilities of texts, and task.kind={task.kind} {why}",
                where="--url",
                fix="leave --url out",
            )
    found: Any = task_file(task).scores(outputs, split, bundle.meta.labels, task)
    return Evaluation(found, outputs, seconds)


def _ask_to_write(split: Split, url: str, api_key: str | None) -> tuple[Evaluation, Score]:
    """What an endpoint writes for a split's sources, scored, and the scores of any of its rows."""
    import numpy as np

    from danlu.evaluate.endpoint import write
    from danlu.evaluate.score import Evaluation
    from danlu.tasks.seq2seq import WrittenScores
    from danlu.tasks.text_scores import text_scores

    assert split.texts.pairs is not None
    references = split.texts.pairs
    written, seconds = write(url, split.texts.texts, api_key=api_key)

    def of_rows(rows: np.ndarray) -> Mapping[str, float]:
        return text_scores([written[row] for row in rows], [references[row] for row in rows])

    scores = WrittenScores(len(split), of_rows(np.arange(len(split))))
    return Evaluation(scores, np.empty((len(split), 0)), seconds), of_rows


def _temperature(bundle: Bundle, judge: Any, name: str) -> tuple[float, str] | None:
    """Fitted on the dev rows of the bundle's own job; none where those are the rows that are scored."""
    from danlu.evaluate.calibration import fit_temperature
    from danlu.tasks.task import read_splits

    task = bundle.meta.task
    if not isinstance(task, Classification) or task.calibration is not None or name == "dev":
        return None
    job = TrainJob.model_validate(bundle.meta.lineage.spec)
    try:
        dev = read_splits(job, judge.tokenizer, max_length=bundle.meta.max_length).dev
    except DataError:
        return None  # other rows are scored where the job's own are gone
    assert dev.labels is not None
    return fit_temperature(judge.outputs(dev.encoded), dev.labels), "dev"


def _columns(
    bundle: Bundle, name: str, data: Sequence[str] | str | None, split: Split, wanted: Sequence[str]
) -> dict[str, Sequence[object]]:
    """The columns to slice by, for the rows of the split."""
    if not wanted:
        return {}
    if len(split.texts.texts) != len(split):
        raise DataError(
            f"{len(split):,} rows were made of {len(split.texts.texts):,} texts, so a column has no value for each",
            where="--by",
            fix="leave --by out",
        )
    from danlu.data.formats import read_rows
    from danlu.data.prepare import needs_preparing, prepare, prepare_given

    job = TrainJob.model_validate(bundle.meta.lineage.spec)
    if data is not None:
        source, spec = prepare_given(data, job.data, job.seed, of_texts=rows_are_texts(job.task))
    else:
        spec = prepare(job.data, job.seed, of_texts=rows_are_texts(job.task))[0] if needs_preparing(job.data) else job.data
        source = getattr(spec, name) or spec.train
    rows = read_rows(source, format=spec.format, max_rows=spec.max_rows, where=f"data.{name}")
    for column in wanted:
        if column not in rows.columns:
            raise DataError(f"the rows have no column {column!r}", where="--by", fix=f"one of {', '.join(rows.columns)}")
    return {column: [rows.columns[column][number - 1] for number in split.texts.row_numbers] for column in wanted}
