"""`python -m danlu.generate [--check]`: writes every derived file, or says which ones are stale."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from danlu.k8s import chart, manifests
from danlu.metrics import catalog, foreign, grafana, rules
from danlu.metrics.alerts import ALERTS
from danlu.metrics.dashboards import DASHBOARDS
from danlu.spec.files import load, read, which
from danlu.spec.schema import schema
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

ROOT = Path(__file__).parents[2]
# The chart's own copies: Helm reads no file outside a chart.
RULE_FILES = ("ops/prometheus/rules/danlu.yaml", "charts/danlu/files/rules/danlu.yaml")
DASHBOARD_FOLDERS = ("ops/grafana/dashboards", "charts/danlu/files/dashboards")


def derived() -> Mapping[str, str]:
    """Path in the repository -> what stands there."""
    return {
        "k8s/schemas/train.schema.json": _json(schema(TrainJob)),
        "k8s/schemas/service.schema.json": _json(schema(Service)),
        "ops/METRICS.md": _metrics_page(),
        "ops/SLO.md": rules.slo_page(),
        **{path: rules.rule_file() for path in RULE_FILES},
        "ops/prometheus/prometheus.yaml": rules.prometheus_config(
            targets={"file_sd_configs": [{"files": [rules.RAY_TARGETS]}]}, rules=["rules/*.yaml"], alertmanager="127.0.0.1:9093"
        ),
        "ops/prometheus/alertmanager.yaml": rules.alertmanager_config(page="http://127.0.0.1:9095/page", tell="http://127.0.0.1:9095/tell"),
        **{alert.runbook: rules.runbook(alert) for alert in ALERTS},
        **{f"{folder}/{page.uid}.json": grafana.dashboard_json(page) for page in DASHBOARDS for folder in DASHBOARD_FOLDERS},
        **{f"ops/grafana/{name}": text for name, text in grafana.provisioning().items()},
        "charts/danlu/values.yaml": chart.values(),
        "charts/danlu/values.schema.json": _json(chart.values_schema()),
        "charts/danlu/templates/_spec.tpl": chart.facts(),
        **_rendered(),
    }


def main(arguments: list[str]) -> int:
    """Write, or with --check compare; the exit code."""
    stale = []
    for name, text in derived().items():
        path = ROOT / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in arguments:
            stale.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    if stale:
        print(f"stale: {', '.join(stale)}; run `python -m danlu.generate` and commit them")
    return 1 if stale else 0


def _rendered() -> Mapping[str, str]:
    """What the examples with a `cluster:` are on Kubernetes, and the list of them that kustomize takes."""
    files = {}
    for path in sorted((ROOT / "k8s" / "examples").glob("*.yaml")):
        spec = load(which((TrainJob, Service), read(path)), path)
        if isinstance(spec, TrainJob | Service) and spec.cluster is not None:
            files[path.name] = f"# From ../examples/{path.name}, by `python -m danlu.generate`.\n{manifests.text(manifests.render(spec))}"
    kinds = "# The manifests here, by `python -m danlu.generate`. Overlays: ../overlays/dev and ../overlays/prod.\n"
    kinds += "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n" + "".join(f"- {name}\n" for name in files)
    return {f"k8s/rendered/{name}": content for name, content in {**files, "kustomization.yaml": kinds}.items()}


def _json(document: object) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _metrics_page() -> str:
    lines = ["# Metrics", "", "Every metric Danlu emits, as it is named on Ray's metrics port. Written by `python -m danlu.generate`.", ""]
    for layer in ("train", "serve"):
        lines += [f"## {layer.capitalize()}", "", "| metric | kind | unit | labels | what it says |", "| --- | --- | --- | --- | --- |"]
        for metric in catalog.ALL:
            if metric.layer == layer:
                lines.append(f"| `{metric.exported}` | {metric.kind} | {metric.unit} | {', '.join(metric.labels)} | {metric.help} |")
        lines.append("")
    lines += [
        "## Read from others", "", "What rules and panels read besides. `scraped`: seen on a metrics port; `read`: in the source only.", "",
        "| metric | kind | unit | labels used | what it says | seen |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for other in foreign.ALL:
        labels = ", ".join(other.labels)
        lines.append(f"| `{other.exported}` | {other.kind} | {other.unit} | {labels} | {other.help} | {other.seen}, {other.seen_in} |")
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
