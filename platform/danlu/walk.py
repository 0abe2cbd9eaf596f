"""The commands' bodies: the SDK's steps, said aloud on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu import sdk
from danlu.errors import DataError, ResourceError, SpecError
from danlu.spec.base import Spec
from danlu.spec.files import load, parse, read, which
from danlu.spec.serve import Service
from danlu.spec.task import EncoderTask
from danlu.spec.train import TrainJob
from danlu.terminal import TrainingView, console, heading, show

if TYPE_CHECKING:
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


def evaluate(spec: Path, overrides: Sequence[str], *, bundle: str | None, data: list[str] | None) -> None:
    """Print the scores of a bundle."""
    job = load(TrainJob, spec, overrides)
    from danlu.evaluate.score import scores_text  # takes seconds; a typo in the spec is said before

    evaluation, _ = sdk.evaluate(bundle or f"{job.name}@{sdk.LATEST}", storage=job.storage, data=data)
    show(scores_text(evaluation.scores))


def quantize(spec: Path, overrides: Sequence[str], *, bundle: str | None) -> None:
    """Print the delta of the quantized version."""
    _show_quantized(sdk.quantize(load(TrainJob, spec, overrides), bundle))


def serve(spec: Path, overrides: Sequence[str], *, bundle: str | None) -> None:
    """Serve until Ctrl-C."""
    service = _service(spec, overrides, bundle)
    heading(f"Starting {service.name}")
    with sdk.serving(service) as endpoint:
        _show_endpoint(endpoint)
        show("  Ctrl-C stops it")
        _wait()


def render(spec: Path, overrides: Sequence[str]) -> None:
    """Print a spec's Kubernetes objects."""
    from danlu.k8s import manifests

    text = read(spec)
    kind = which((TrainJob, Service), text, source=str(spec))
    found = parse(kind, text, overrides, source=str(spec))
    assert isinstance(found, TrainJob | Service)
    print(manifests.text(manifests.render(found)), end="")


def is_local(on: str, *, fresh: bool = False, dry_run: str | None, context: str | None, namespace: str | None) -> bool:
    """True for this machine, False for Kubernetes; SpecError for anything else, and for options that have no effect there."""
    if on not in ("local", "k8s"):
        raise SpecError(f"{on!r} is no place to run", where="--on", fix="local or k8s")
    given = {"--dry-run": dry_run, "--context": context, "--namespace": namespace} if on == "local" else {"--fresh": fresh}
    for name, value in given.items():
        if value:
            raise SpecError(f"it has no effect with --on {on}", where=name, fix="leave it out" + (", or --on k8s" if on == "local" else ""))
    if dry_run not in (None, "server"):
        raise SpecError(
            f"{dry_run!r} is no dry run", where="--dry-run", fix="--dry-run=server; `danlu render` prints without asking a server"
        )
    return on == "local"


def submit(spec: Path, overrides: Sequence[str], *, dry_run: bool, context: str | None, namespace: str | None) -> None:
    """Hand a job to Kubernetes."""
    job = load(TrainJob, spec, overrides)
    from danlu import remote
    from danlu.k8s.client import connect

    kube = connect(context, namespace or (job.cluster.namespace if job.cluster else None))
    if dry_run:
        _show_taken(kube.context, remote.dry_run(kube, job))
        return
    remote.submit(kube, job)
    show(f"{job.name} is submitted to {kube.context}, namespace {kube.namespace}")
    show(f"  danlu jobs logs -f {job.name}    follows it; show, wait, cancel, resume, delete are there too")


def deploy(spec: Path, overrides: Sequence[str], *, bundle: str | None, dry_run: bool, context: str | None, namespace: str | None) -> None:
    """Hand a service to Kubernetes."""
    service = _service(spec, overrides, bundle)
    from danlu import remote
    from danlu.k8s.client import connect

    kube = connect(context, namespace or (service.cluster.namespace if service.cluster else None))
    if dry_run:
        _show_taken(kube.context, remote.dry_run(kube, service))
        return
    remote.deploy(kube, service)
    show(f"{service.name} is deployed to {kube.context}, namespace {kube.namespace}")
    show(f"  danlu services show {service.name}    says whether it answers; scale, rollback, delete are there too")


def _show_taken(context: str, names: Sequence[str]) -> None:
    show(f"{context} would take {', '.join(names)}")


def predict(spec: Path, overrides: Sequence[str], texts: Sequence[str], *, bundle: str | None) -> None:
    """Print one JSON object an input: a text, or what the task's endpoint takes, as JSON."""
    job = load(TrainJob, spec, overrides)
    lines = _not_empty(texts, "text") if texts else _not_empty(_standard_input(), "line")
    asked = [_asked(line, job.task.kind) for line in lines] if isinstance(job.task, EncoderTask) else lines
    found = sdk.predict(bundle or f"{job.name}@{sdk.PRODUCTION}", asked, storage=job.storage)
    from danlu.serve.encoder_wire import summary
    from danlu.tasks.judge import Completion

    for line, answer in zip(lines, found, strict=True):
        said = answer.to_dict() if isinstance(answer, Completion) else summary(answer)
        show(json.dumps(said | {"text": line}, ensure_ascii=False))


def run(spec: Path, overrides: Sequence[str], *, fresh: bool, keep: bool | None) -> None:
    """The whole walk, each hand-over checked."""
    began = time.perf_counter()
    job = load(TrainJob, spec, overrides)
    prepared = sdk.prepare(job)
    _show_plan(prepared)
    trained = _train(prepared, fresh=fresh)
    quantized = None
    reference = trained.reference
    if job.compress is not None:
        heading("Compressing")
        before = trained.evaluations.get("test", trained.evaluations["dev"])
        quantized = sdk.quantize(job, trained.bundle, run=trained.run, before=before)
        _show_quantized(quantized)
        reference = quantized.reference or reference
    heading(f"Serving {reference}")
    with sdk.serving(job.service(reference)) as endpoint:
        split = prepared.splits.test or prepared.splits.dev
        _show_answers(endpoint.url, job, split)
        served = sdk.check_served(endpoint.url, sdk.open_bundle(reference, job.storage), split)
        show(f"  checked: {served}")
        report = sdk.report(prepared, trained, quantized, served)
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
        show(f"  Prometheus    {running.prometheus}/alerts")
        show(f"  Alertmanager  {running.alertmanager}")
        show("  it follows the Ray that was started last on this machine; Ctrl-C stops both")
        while True:
            time.sleep(5)
            running.check()


def create_key(file: Path, name: str, expires: str | None, models: Sequence[str], max_ongoing: int | None) -> None:
    """Print a new key, alone on standard output."""
    from danlu.serve import keys

    secret = keys.create_key(file, name, lifetime=_lifetime(expires), models=models, max_ongoing_requests=max_ongoing)
    print(f"kept as a hash in {file}; it cannot be shown again", file=sys.stderr)
    show(secret)


def list_keys(file: Path) -> None:
    """Print a line a key."""
    from danlu.serve import keys

    for key in keys.read_keys(file):
        expires = f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "never"
        state = key.state(datetime.now(UTC))
        show(f"{key.name:<20} {key.prefix}...  {state:<8} created {key.created:%Y-%m-%d}  expires {expires}  {', '.join(key.models)}")


def revoke_key(file: Path, name: str) -> None:
    """Make a key invalid."""
    from danlu.serve import keys

    show(f"revoked {keys.revoke_key(file, name).name}")


def bench_serve(
    url: str,
    model: str | None,
    num_requests: int,
    concurrency: int,
    rate: float | None,
    max_tokens: int | None,
    seed: int,
    output: Path | None,
) -> None:
    """Print what clients see of a service under load."""
    from dataclasses import asdict

    import httpx

    from danlu.client.endpoint import base_url, headers, only_model
    from danlu.client.load import Load, measure
    from danlu.client.page import page

    with httpx.Client(base_url=base_url(url), headers=headers(), timeout=30) as client:
        try:
            model = model or only_model(client)
        except httpx.TransportError as error:
            raise ResourceError(f"nobody answers at {url}", where="url", fix="the URL of a service that runs") from error
    report, seen = measure(Load(base_url(url), model, num_requests, concurrency, rate, max_tokens=max_tokens, seed=seed, headers=headers()))
    show(report.text())
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".html").write_text(page(report, seen), encoding="utf-8")
        show(f"  written: {output.with_suffix('.json')}, {output.with_suffix('.html')}")


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


def _service(spec: Path, overrides: Sequence[str], bundle: str | None) -> Service:
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


def _lifetime(text: str | None) -> timedelta | None:
    if text is None:
        return None
    number, unit = text[:-1], text[-1:]
    if not number.isdigit() or unit not in "dh" or not 0 < int(number) < 100_000:
        raise SpecError(f"{text!r} is no lifetime", where="--expires", fix="a number of days or hours, as 30d or 12h")
    return timedelta(days=int(number)) if unit == "d" else timedelta(hours=int(number))


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


def _show_quantized(quantized: sdk.Quantized) -> None:
    show(quantized.delta.text())
    show(f"\n  {quantized.verdict}")
    if quantized.reference:
        show(f"  stored as {quantized.reference}, now @{sdk.PRODUCTION}")


def _show_endpoint(endpoint: Endpoint) -> None:
    for name, value in endpoint.where_to_look().items():
        show(f"  {name:<13} {value}")


def _show_answers(url: str, job: TrainJob, split: Split) -> None:
    import httpx

    from danlu.serve.encoder_wire import wire_of
    from danlu.tasks.exchange import shown

    assert isinstance(job.task, EncoderTask)
    wire, asked = wire_of(job.task), split.examples[:200:67]
    response = httpx.post(f"{url}{wire.path}", json=wire.request(job.name, asked), timeout=60)
    response.raise_for_status()
    for example, (label, numbers) in zip(asked, wire.read(response.json()), strict=True):
        show(f"  {label[:40]:<10} {max(numbers, default=0.0):.3f}  {' '.join(shown(example).split())[:90]}")


def _wait() -> None:
    while True:
        time.sleep(3600)
