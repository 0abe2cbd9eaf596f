"""The commands' bodies: the SDK's steps, said aloud on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu import sdk
from danlu.errors import DataError, SpecError
from danlu.handover import trained_before, walked
from danlu.spec.base import Spec
from danlu.spec.files import load, parse, read, which
from danlu.spec.serve import Service
from danlu.spec.task import EncoderTask
from danlu.spec.train import TrainJob
from danlu.terminal import TrainingView, console, heading, show

if TYPE_CHECKING:
    from danlu.artifact.bundle import Bundle
    from danlu.serve.app import Endpoint
    from danlu.tasks.rows import Split


def plan(spec: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print the plan and the data report."""
    prepared = sdk.prepare(load(TrainJob, spec, overrides))
    if as_json:
        show(json.dumps({"plan": prepared.plan.to_dict(), "data": prepared.splits.report.to_dict()}, ensure_ascii=False, indent=1))
    else:
        _show_plan(prepared)


def train(spec: Path, overrides: Sequence[str], *, fresh: bool) -> sdk.Trained:
    """Plan, train, score, report."""
    prepared = sdk.prepare(load(TrainJob, spec, overrides))
    _show_plan(prepared)
    trained = _train(prepared, fresh=fresh)
    show(f"\n  report {sdk.report(prepared, trained)}")
    return trained


def evaluate(
    spec: Path,
    overrides: Sequence[str],
    *,
    bundle: str | None,
    data: list[str] | None,
    url: str | None = None,
    api_key: str | None = None,
    by: Sequence[str] = (),
    out: Path | None = None,
) -> None:
    """Print the scores of a bundle or an endpoint, and what stands beside them."""
    job = load(TrainJob, spec, overrides)
    from danlu.evaluate.analysis_html import analysis_page
    from danlu.evaluate.score import scores_text  # takes seconds; a typo in the spec is said before

    reference = bundle or f"{job.name}@{sdk.LATEST}"
    found = sdk.examine(reference, storage=job.storage, data=data, url=url, api_key=api_key, slice_by=by)
    show(scores_text(found.evaluation.scores))
    show(f"\n{found.analysis.text()}")
    if out is not None:
        page = analysis_page(f"{reference} on {found.analysis.split}", found.analysis, found.facts)
        _show_written(sdk.write_files(out, {"scores.json": sdk.scores_json(found), "report.html": page}))


def harness(
    spec: Path,
    overrides: Sequence[str],
    tasks: Sequence[str],
    *,
    bundle: str | None,
    url: str | None,
    api_key: str | None,
    num_fewshot: int | None,
    limit: int | None,
    rows: bool,
    out: Path | None,
) -> None:
    """Print what lm-evaluation-harness finds; `rows` is True if the command also named some."""
    if not tasks:
        raise SpecError(
            "--num-fewshot and --limit are lm-evaluation-harness' and have no effect", where="danlu evaluate", fix="--lm-eval TASK"
        )
    if rows:
        raise SpecError(
            "--data and --by have no effect with --lm-eval, whose tasks bring their own rows",
            where="danlu evaluate",
            fix="one or the other",
        )
    job = load(TrainJob, spec, overrides)
    found = sdk.run_harness(job, tasks, reference=bundle, url=url, api_key=api_key, num_fewshot=num_fewshot, limit=limit)
    show(found.text())
    if out is not None:
        _show_written(sdk.write_files(out, {"lm-eval.json": json.dumps(found.to_dict(), ensure_ascii=False, indent=1) + "\n"}))


def compare(a: str, b: str, *, storage: str, data: list[str] | None, api_key: str | None, out: Path | None) -> None:
    """Print what changes from A to B."""
    found = sdk.compare(a, b, storage=storage, data=data, api_key=api_key)
    show(found.text())
    if out is not None:
        from danlu.evaluate.analysis_html import versus_page

        document = json.dumps(found.to_dict(), ensure_ascii=False, indent=1)
        _show_written(sdk.write_files(out, {"compare.json": document, "compare.html": versus_page(found)}))


def suite(name: str, spec: Path, overrides: Sequence[str], *, data: Path, out: Path, tasks: Sequence[str]) -> None:
    """Every task of a suite, and one table."""
    job = load(TrainJob, spec, overrides)
    found = sdk.run_suite(name, job, data, out, tasks=tasks, train=_trained, on_task=heading)
    heading(f"{name.upper()} on the dev rows")
    show(sdk.suite_text(found))
    show(f"\n  rows, scores.json and what is handed in: {out}")


def _trained(job: TrainJob) -> None:
    _train(sdk.prepare(job), fresh=False)


def data_report(
    files: Sequence[str],
    spec: Path | None,
    overrides: Sequence[str],
    *,
    test: Sequence[str],
    near: bool,
    max_rows: int | None,
    as_json: bool,
    out: Path | None,
) -> None:
    """Print what rows hold."""
    if spec is None and overrides:
        raise SpecError("--set changes a job, and there is none", where="danlu data report", fix="--spec job.yaml")
    job = None if spec is None else load(TrainJob, spec, overrides)
    found = sdk.data_report(files, job=job, test=test, near_threshold=0.8 if near else None, max_rows=max_rows)
    from danlu.data.profile_text import html, text

    document = json.dumps(found.to_dict(), ensure_ascii=False, indent=1)
    show(document if as_json else text(found))
    if out is not None:
        title = files[0] if len(files) == 1 else job.name if job is not None else f"{len(files)} files"
        written = sdk.write_files(out, {"report.json": document + "\n", "report.html": html(found, title)})
        if not as_json:
            _show_written(written)


def data_clean(spec: Path, overrides: Sequence[str], *, out: Path | None) -> None:
    """Clean, and print what was removed and where the rows are."""
    shards, cleaned = sdk.clean(load(TrainJob, spec, overrides), None if out is None else str(out))
    show(cleaned.text())
    for name, paths in shards.items():
        show(f"  {name:<6} {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))


def quantize(spec: Path, overrides: Sequence[str], *, bundle: str | None) -> None:
    """Print the delta of the quantized version."""
    _show_quantized(sdk.quantize(load(TrainJob, spec, overrides), bundle))


def serve(spec: Path, overrides: Sequence[str], *, bundle: str | None) -> None:
    """Serve until Ctrl-C."""
    service = service_of(spec, overrides, bundle)
    heading(f"Starting {service.name}")
    with sdk.serving(service) as endpoint:
        _show_endpoint(endpoint)
        show("  Ctrl-C stops it")
        _wait()


def predict(spec: Path, overrides: Sequence[str], texts: Sequence[str], *, bundle: str | None, explain: bool = False) -> None:
    """Print one JSON object an input: a text, or what the task's endpoint takes, as JSON."""
    job = load(TrainJob, spec, overrides)
    lines = _not_empty(texts, "text") if texts else _not_empty(_standard_input(), "line")
    asked = [_asked(line, job.task.kind) for line in lines] if isinstance(job.task, EncoderTask) else lines
    reference = bundle or f"{job.name}@{sdk.PRODUCTION}"
    if explain:
        _predict_and_explain(job, reference, asked)
        return
    found = sdk.predict(reference, asked, storage=job.storage)
    from danlu.serve.encoder_wire import summary
    from danlu.tasks.judge import Completion

    for line, answer in zip(lines, found, strict=True):
        said = answer.to_dict() if isinstance(answer, Completion) else summary(answer)
        show(json.dumps(said | {"text": line}, ensure_ascii=False))


def _predict_and_explain(job: TrainJob, reference: str, asked: Sequence[str | dict[str, Any]]) -> None:
    found = sdk.explain(reference, asked, storage=job.storage)
    from danlu.serve.encoder_wire import summary

    for line, one in zip(asked, found, strict=True):
        words = [word.to_dict() for word in one.strongest()]
        show(json.dumps(summary(one.prediction) | {"text": line, "words": words}, ensure_ascii=False))


def run(spec: Path, overrides: Sequence[str], *, fresh: bool, keep: bool | None) -> None:
    """The whole walk, each hand-over checked."""
    began = time.perf_counter()
    job = load(TrainJob, spec, overrides)
    if job.serve is None:
        job = load(TrainJob, spec, [*overrides, "serve={}"])  # the walk ends in an endpoint: what cannot is refused before it begins
    prepared = sdk.prepare(job)
    _show_plan(prepared)
    if (earlier := None if fresh else trained_before(prepared)) is not None:
        heading("Training")
        show(f"  going on with {earlier.reference}, which this job has trained on these rows; --fresh trains anew")
    trained = earlier or _train(prepared, fresh=fresh)
    quantized = None
    reference = trained.reference
    if job.compress is not None:
        heading("Compressing")
        before = trained.evaluations.get("test", trained.evaluations["dev"])
        quantized = sdk.quantize(job, trained.bundle, run=trained.run, before=before)
        _show_quantized(quantized)
        reference = quantized.reference or reference
    heading(f"Serving {reference}")
    service = job.service(reference)
    with sdk.serving(service) as endpoint:
        split, bundle = prepared.splits.test or prepared.splits.dev, sdk.open_bundle(reference, job.storage)
        talks = _show_answers(endpoint.url, job, bundle, split)
        served = sdk.check_served(endpoint.url, bundle, split, served_in_fp32=getattr(service.engine, "dtype", "auto") in ("auto", "fp32"))
        show(f"  checked: {served}")
        report = sdk.report(prepared, trained, quantized, served, exchanges=talks, endpoint=endpoint.where_to_look())
        walked(trained)
        heading("Where to look")
        _show_endpoint(endpoint)
        show(f"  report        {report}")
        show(f"\n  the whole walk took {time.perf_counter() - began:.0f} s")
        if keep if keep is not None else sys.stdin.isatty() and console.is_terminal:
            show("  still serving; Ctrl-C stops it")
            _wait()


def monitor(*, port: int, alert_port: int, webhook: str | None) -> None:
    """Prometheus and Alertmanager until Ctrl-C."""
    from danlu.monitor import monitoring

    with monitoring(port=port, alert_port=alert_port, page=webhook, tell=webhook) as running:
        show(f"  Prometheus    {running.alerts()}")
        show(f"  Alertmanager  {running.alertmanager}")
        show("  it follows the Ray that was started last on this machine; Ctrl-C stops both")
        while True:
            time.sleep(5)
            running.check()


def schema(kind: str) -> None:
    """Print a spec's JSON Schema."""
    from danlu.spec.schema import schema as schema_of

    kinds: dict[str, type[Spec]] = {"train": TrainJob, "serve": Service}
    if kind not in kinds:
        raise SpecError(f"there is no schema named {kind!r}", where="danlu schema", fix=" or ".join(kinds))
    show(json.dumps(schema_of(kinds[kind]), indent=2, ensure_ascii=False))


def _train(prepared: sdk.Prepared, *, fresh: bool) -> sdk.Trained:
    from danlu.evaluate.score import scores_text

    job = prepared.job
    heading(f"Training on {job.workers.num_workers} worker{'s' if job.workers.num_workers > 1 else ''}")
    with TrainingView().live() as view:
        trained = sdk.train(job, fresh=fresh, listener=view, prepared=prepared)
    for split, evaluation in trained.evaluations.items():
        if split == "test" or "test" not in trained.evaluations:
            heading(f"Scores on the {split} split")
            show(scores_text(evaluation.scores))
    show(f"\n  stored as {trained.reference} in {job.storage}")
    return trained


def service_of(spec: Path, overrides: Sequence[str], bundle: str | None) -> Service:
    """The service that a file describes: its own, or what a training job serves."""
    text = read(spec)
    if which((TrainJob, Service), text, source=str(spec)) is TrainJob:
        job = parse(TrainJob, text, overrides, source=str(spec))
        return job.service(bundle or f"{job.name}@{sdk.PRODUCTION}")
    named = [f"bundle={json.dumps(bundle)}"] if bundle else []
    return parse(Service, text, [*overrides, *named], source=str(spec))


def _asked(line: str, kind: str) -> str | dict[str, Any]:
    """A text, or the JSON object that the task's endpoint takes: always for questions, and for pairs and lists of words."""
    try:
        fields = json.loads(line) if line.lstrip().startswith("{") else None
    except ValueError:
        fields = None
    if kind in ("extractive_qa", "multiple_choice"):
        if not isinstance(fields, dict):
            raise DataError(f"{line[:60]!r} is no JSON object", where="texts", fix='{"question": "...", ...}, as the endpoint takes it')
        return fields
    return fields if isinstance(fields, dict) and {"text", "tokens"} & set(fields) else line


def _standard_input() -> list[str]:
    if sys.stdin.isatty():
        print("texts, one a line; Ctrl-D ends them", file=sys.stderr)
    try:
        text = sys.stdin.buffer.read().decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"line {line} of standard input is not UTF-8", where="texts", fix="convert it, for example with iconv") from error
    if not text.strip():
        raise DataError("standard input is empty", where="texts", fix="texts after the spec, or one a line on standard input")
    return text.split("\n")


def _not_empty(texts: Sequence[str], what: str) -> list[str]:
    if empty := [str(i) for i, text in enumerate(texts, 1) if not text.strip()]:
        raise DataError(f"{what} {', '.join(empty[:5])} of {len(texts)} is empty", where="texts", fix="leave it out, or give it words")
    return list(texts)


def _show_plan(prepared: sdk.Prepared) -> None:
    heading("Plan")
    show(prepared.plan.text(prepared.job))
    heading("Data")
    show(prepared.splits.report.text())


def _show_written(paths: Sequence[str]) -> None:
    show("\n" + "\n".join(f"  wrote {path}" for path in paths))


def _show_quantized(quantized: sdk.Quantized) -> None:
    show(quantized.delta.text())
    show(f"\n  {quantized.verdict}")
    if quantized.reference:
        show(f"  stored as {quantized.reference}, now @{sdk.PRODUCTION}")


def _show_endpoint(endpoint: Endpoint) -> None:
    for name, value in endpoint.where_to_look().items():
        show(f"  {name:<13} {value}")


def _show_answers(url: str, job: TrainJob, bundle: Bundle, split: Split) -> Sequence[sdk.Exchange]:
    """Some rows' answers; of a language model also for the report."""
    import httpx

    from danlu.serve.wires import wire_of
    from danlu.tasks.exchange import shown

    if not isinstance(job.task, EncoderTask):
        talks = sdk.exchanges(url, bundle, split)
        for talk in talks:
            for name, text in (("asked", talk.question), ("answer", talk.answer), ("in the row", talk.truth)):
                show(f"  {name:<11} {' '.join(text.split())[:100]}")
        return talks
    wire, asked = wire_of(job.task), split.examples[:200:67]
    response = httpx.post(f"{url}{wire.path}", json=wire.request(job.name, asked), timeout=60)
    response.raise_for_status()
    names = bundle.meta.labels
    for example, (label, numbers) in zip(asked, wire.read(response.json()), strict=True):
        probability = numbers[names.index(label)] if label in names and len(numbers) == len(names) else max(numbers, default=0.0)
        show(f"  {label[:40]:<10} {probability:.3f}  {' '.join(shown(example).split())[:90]}")
    return []


def _wait() -> None:
    while True:
        time.sleep(3600)
