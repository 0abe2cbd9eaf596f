"""A run's HTML report and its scores as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from danlu.artifact.runs import REPORT, SCORES
from danlu.handover import Prepared, Quantized, Trained, surest_errors
from danlu.spec.files import dump

if TYPE_CHECKING:
    from danlu.evaluate.analysis import Analysis
    from danlu.evaluate.explain import Word
    from danlu.evaluate.plots import Plot
    from danlu.served import Exchange
    from danlu.tasks.exchange import Example


def report(
    prepared: Prepared,
    trained: Trained,
    quantized: Quantized | None = None,
    served: str = "",
    *,
    exchanges: Sequence[Exchange] = (),
    endpoint: Mapping[str, str] | None = None,
) -> str:
    """Write the run's HTML report; its URI. `exchanges`: what the endpoint was asked and answered; `endpoint`: where to look."""
    from danlu.evaluate.html import ReportData, render
    from danlu.tasks.exchange import shown

    lineage = trained.bundle.meta.lineage
    facts = {
        "created": lineage.created,
        "bundle": f"{trained.reference} ({trained.bundle.meta.digest})",
        "run": trained.run.uri,
        "started from": prepared.job.model.model_name_or_path,
        "spec digest": lineage.spec_digest,
        **{f"{split} rows digest": digest for split, digest in lineage.data_digests.items()},
        "seed": str(lineage.seed),
        "code": lineage.code_version,
        "libraries": ", ".join(f"{name} {version}" for name, version in lineage.library_versions.items()),
    }
    if quantized is not None and quantized.bundle is not None:
        facts["quantized bundle"] = f"{quantized.reference} ({quantized.bundle.meta.digest})"
    errors = surest_errors(prepared, trained)
    data = ReportData(
        analyses=_analyses(prepared, trained),
        title=prepared.job.name,
        records=trained.run.records(),
        plan=prepared.plan.text(prepared.job),
        data=prepared.splits.report.text(),
        scores={split: evaluation.scores for split, evaluation in trained.evaluations.items()},
        delta=None if quantized is None else quantized.delta.to_dict(),
        delta_verdict="" if quantized is None else quantized.verdict,
        served=served,
        exchanges=[(one.question, one.answer, one.truth) for one in exchanges],
        endpoint=endpoint or {},
        example=prepared.splits.report.example,
        errors=[(shown(example), truth, answer, probability) for example, truth, answer, probability in errors],
        explanations=_explained(trained, [example for example, *_ in errors]),
        lineage=facts,
        spec=dump(prepared.job),
    )
    scores = {
        name: {"scores": trained.evaluations[name].scores.metrics(), "analysis": found.to_dict()} for name, found in data.analyses.items()
    }
    trained.run.write(SCORES, json.dumps({"bundle": trained.reference, **scores}, ensure_ascii=False, indent=1) + "\n")
    return trained.run.write(REPORT, render(data))


def plots(prepared: Prepared, trained: Trained) -> list[Plot]:
    """What the report draws, one by one."""
    from danlu.evaluate.plots import plots as drawn

    splits = {"dev": prepared.splits.dev, "test": prepared.splits.test}
    scored = {
        name: (split, trained.evaluations[name]) for name, split in splits.items() if split is not None and name in trained.evaluations
    }
    return drawn(f"{prepared.job.name} {trained.run.number:04d}", trained.run.records(), trained.bundle.meta.task, scored)


def _explained(trained: Trained, examples: Sequence[Example]) -> Sequence[Sequence[Word]]:
    """What each word did to a classifier's answers."""
    if trained.bundle.meta.task.kind != "classification" or not examples:
        return ()
    from danlu.compress.load import load_predictor
    from danlu.evaluate.explain import explain
    from danlu.tasks.exchange import Text

    texts = [example for example in examples if isinstance(example, Text)]
    return [found.words for found in explain(load_predictor(trained.bundle), texts)]


def _analyses(prepared: Prepared, trained: Trained) -> dict[str, Analysis]:
    """Dev and test, with a temperature fitted on dev for test."""
    from danlu.evaluate.analysis import analyse
    from danlu.evaluate.calibration import fit_temperature

    splits, names, task = prepared.splits, prepared.splits.label_names, trained.bundle.meta.task
    found = {}
    for name, split in (("dev", splits.dev), ("test", splits.test)):
        if split is None or name not in trained.evaluations:
            continue
        temperature = None
        if name == "test" and task.kind == "classification" and splits.dev.labels is not None:
            temperature = fit_temperature(trained.evaluations["dev"].outputs, splits.dev.labels), "dev"
        found[name] = analyse(task, split, trained.evaluations[name].outputs, names, name=name, temperature=temperature)
    return found
