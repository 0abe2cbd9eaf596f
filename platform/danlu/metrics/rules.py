"""Alerts -> the files that Prometheus and Alertmanager read, and the runbooks. Pure text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from danlu.metrics.alerts import ALERTS, RECORDED, Alert
from danlu.metrics.objectives import ERROR_BUDGET, ERROR_RATIO, SLOW_BUDGET, SLOW_RATIO, SLOW_S

RAY_TARGETS = "/tmp/ray/prom_metrics_service_discovery.json"
"""Where the Ray that was started last on this machine lists its nodes' metrics ports."""

WRITTEN = "# Written by `python -m danlu.generate`; change platform/danlu/metrics instead.\n"


def rule_file() -> str:
    """Recording rules and alerts, a group for each component."""
    groups: list[dict[str, Any]] = [
        {"name": "danlu-recorded", "rules": [{"record": rule.exported, "expr": rule.expr.text} for rule in RECORDED]}
    ]
    for component in ("train", "serve", "cluster"):
        rules = [_alert(alert) for alert in ALERTS if alert.component == component]
        groups.append({"name": f"danlu-{component}", "rules": rules})
    return WRITTEN + _yaml({"groups": groups})


def prometheus_config(*, targets: Mapping[str, Any], rules: Iterable[str], alertmanager: str | None = None, interval: str = "15s") -> str:
    """Prometheus on one machine. `targets` is a service discovery, as {"file_sd_configs": [...]}; on Kubernetes monitors take its place."""
    config: dict[str, Any] = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": list(rules),
        "scrape_configs": [{"job_name": "ray", **targets}],
    }
    if alertmanager is not None:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return WRITTEN + _yaml(config)


def alertmanager_config(*, page: str | None, tell: str | None, wait: str = "30s", again: str = "4h") -> str:
    """Who hears what: critical alerts go to the webhook `page`, the others to `tell`; None tells nobody (they are still shown)."""
    config = {
        "route": {
            "receiver": "tell",
            # One message for what belongs together: the alerts of one job, of one model, of one node.
            "group_by": ["alertname", "train_job", "model", "application", "instance"],
            "group_wait": wait,
            "group_interval": "5m" if wait == "30s" else wait,
            "repeat_interval": again,
            "routes": [{"matchers": ['severity="critical"'], "receiver": "page"}],
        },
        "inhibit_rules": [
            # A job that stands still is also slow, late with its checkpoint and uneven; say it once.
            _silences("TrainingStalled", "CheckpointTooOld|TrainingSlow|TrainingStraggler|TrainingGoodputLow", ["train_job"]),
            _silences("TrainingFailed", "TrainingDiverging|TrainingRestarting", ["train_job"]),
            _silences("ServingErrorBudgetFast", "ServingErrorBudgetSlow|ServingErrors|RequestsRefused", ["model"]),
            _silences("ServingLatencyBudgetFast", "ServingLatencyBudgetSlow|RequestsWaiting", ["model"]),
            _silences("ServingErrorBudgetSlow", "ServingErrors", ["model"]),
        ],
        "receivers": [_receiver("page", page), _receiver("tell", tell)],
    }
    return WRITTEN + _yaml(config)


def runbook(alert: Alert) -> str:
    """The page that somebody reads when it fires."""
    steps = "\n".join(f"{number}. {step}" for number, step in enumerate(alert.steps, 1))
    return f"""# {alert.name}

{alert.severity.capitalize()} · {alert.component} · dashboard `{alert.dashboard}` · fires after {alert.for_} of

```promql
{alert.expr.text}
```

## What it means

{alert.meaning}

## What to do

{steps}

It ends by itself once the expression has no result any more.

<!-- Written by `python -m danlu.generate` from platform/danlu/metrics/alerts.py. -->
"""


def slo_page() -> str:
    """What a service promises, how that is counted, and who is told when a month's share of failures goes too fast."""
    objectives = (
        ("Errors", f"{1 - ERROR_BUDGET:.1%} of requests to `/v1/` end without a 5xx", ERROR_BUDGET, ERROR_RATIO, "ServingErrorBudget"),
        (
            "Latency",
            f"{1 - SLOW_BUDGET:.0%} of whole answers take at most {float(SLOW_S):g} s",
            SLOW_BUDGET,
            SLOW_RATIO,
            "ServingLatencyBudget",
        ),
    )
    page = "# Objectives\n\nOf every served model, over 30 days. Written by `python -m danlu.generate` from danlu/metrics/objectives.py.\n"
    for title, promise, budget, ratios, alerts in objectives:
        page += f"\n## {title}\n\n{promise}: a month has room for {budget * 30 * 24 * 60:.0f} minutes in which all fail.\n\n"
        page += "| window | recorded as | which is |\n| --- | --- | --- |\n"
        for window, ratio in ratios.items():
            page += f"| {window} | `{ratio.exported}` | `{_cell(ratio.expr.text)}` |\n"
        page += "\n| alert | who hears | when | for |\n| --- | --- | --- | --- |\n"
        for alert in ALERTS:
            if alert.name.startswith(alerts):
                told = "is paged" if alert.severity == "critical" else "is told"
                page += f"| [{alert.name}](runbooks/{alert.name}.md) | {told} | `{_cell(alert.expr.text)}` | {alert.for_} |\n"
    return page


def _cell(text: str) -> str:
    """As a table of Markdown takes it."""
    return text.replace("|", "\\|")


def _alert(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr.text,
        **({} if alert.for_ == "0m" else {"for": alert.for_}),
        "labels": {"severity": alert.severity, "component": alert.component},
        "annotations": {
            "summary": alert.summary,
            "description": alert.meaning,
            "runbook": alert.runbook,
            "dashboard": f"/d/{alert.dashboard}",
        },
    }


def _silences(loud: str, quiet: str, equal: list[str]) -> dict[str, Any]:
    return {"source_matchers": [f'alertname="{loud}"'], "target_matchers": [f'alertname=~"{quiet}"'], "equal": equal}


def _receiver(name: str, url: str | None) -> dict[str, Any]:
    return {"name": name} if url is None else {"name": name, "webhook_configs": [{"url": url, "send_resolved": True}]}


def _yaml(document: object) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=140)
