"""Alerts by Prometheus' own tools: each fires, does not fire, and ends; who hears of it; and a runbook whose commands exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer.main
import yaml
from alert_cases import ALIVE, CASES

from danlu import cli
from danlu.metrics import costs, rules
from danlu.metrics.alerts import ALERTS
from danlu.metrics.dashboards import DASHBOARDS
from danlu.metrics.objectives import ERROR_RATIO, SLOW_RATIO, WHOLE_ANSWERS
from danlu.serve.wires import routes_of
from danlu.spec.task import EncoderTask, Pretrain

ROOT = Path(__file__).parents[3]
OPS = ROOT / "ops/prometheus"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus")
needs_amtool = pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed: apt-get install prometheus-alertmanager")


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@needs_promtool
def test_every_alert_fires_when_it_should_and_only_then_and_ends(tmp_path: Path) -> None:
    assert {case.alert for case in CASES} == {alert.name for alert in ALERTS}
    for name in {alert.name for alert in ALERTS}:
        moments = [alerts for case in CASES if case.alert == name for _, alerts in sorted(case.firing.items())]
        assert any(name in alerts for alerts in moments), f"{name} has no moment at which it fires"
        assert name not in moments[0], f"{name} has no moment before it fires"
    tests = [
        {
            "name": f"{case.alert} {number}",
            "interval": "1m",
            "input_series": [
                {"series": series, "values": values}
                for series, values in (case.series if case.alert == "RayMetricsMissing" else ALIVE | case.series).items()
            ],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(alerts)],
                }
                for minute, alerts in case.firing.items()
            ],
        }
        for number, case in enumerate(CASES)
    ]
    (tmp_path / "rules.yaml").write_text(rules.rule_file(), encoding="utf-8")
    # Hours are looked at every five minutes only, to be done in seconds.
    long = [max(case.firing) > 200 for case in CASES]
    for every, some in (
        ("2m", [test for test, is_long in zip(tests, long, strict=True) if not is_long]),
        ("5m", [test for test, is_long in zip(tests, long, strict=True) if is_long]),
    ):
        document = {"rule_files": ["rules.yaml"], "evaluation_interval": every, "tests": some}
        (tmp_path / f"every-{every}.yaml").write_text(yaml.safe_dump(document))
    run("promtool", "test", "rules", tmp_path / "every-2m.yaml", tmp_path / "every-5m.yaml")


def _tokens(model: str, tenant: str, key: str, kind: str, values: str) -> dict[str, str]:
    return {"series": f'ray_danlu_serve_key_tokens_total{{model="{model}",tenant="{tenant}",key="{key}",kind="{kind}"}}', "values": values}


@needs_promtool
def test_a_models_money_is_shared_out_by_tokens_and_nobody_pays_for_what_nobody_with_a_key_has_asked(tmp_path: Path) -> None:
    # Two replicas of `text` at 0.6 USD an hour each, one of `code` at 3.6, and `free`, which has no keys; a counter more each minute.
    spent = {("text", "1"): 0.01, ("text", "2"): 0.01, ("code", "1"): 0.06, ("free", "1"): 0.02}
    series = [
        {"series": f'ray_danlu_serve_cost_total{{model="{model}",replica="{replica}"}}', "values": f"0+{usd}x400"}
        for (model, replica), usd in spent.items()
    ]
    series += [
        _tokens("text", "research", "ada", "prompt", "0+200x400"),
        _tokens("text", "research", "ada", "completion", "0+100x400"),
        _tokens("text", "research", "bob", "prompt", "0+300x400"),  # research: 600 of 1,000
        _tokens("text", "sales", "sales", "prompt", "0+400x400"),
        _tokens("code", "sales", "sales", "completion", "0+50x400"),
        {"series": 'ray_danlu_serve_prompt_tokens_total{model="text"}', "values": "0+900x400"},
        {"series": 'ray_danlu_serve_completion_tokens_total{model="text"}', "values": "0+100x400"},
        {"series": 'ray_danlu_serve_tokens_total{model="free"}', "values": "0+500x400"},
        {"series": 'ray_danlu_serve_tenant_budget{tenant="sales",replica="1"}', "values": "20x400"},
    ]
    expected = {
        costs.TENANT_USD.exported: {
            'model="text", tenant="research"': 1.2 * 0.6, 'model="text", tenant="sales"': 1.2 * 0.4, 'model="code", tenant="sales"': 3.6,
        },
        # `code` is no language model here that has told its tokens.
        costs.USD_A_MILLION_TOKENS.exported: {'model="text"': 1.2 / 0.06, 'model="free"': 1.2 / 0.03},
        # Five hours of 0.48 and 3.6.
        costs.TENANT_BUDGET_USED.exported: {'tenant="sales"': 5 * 4.08 / 20},
    }  # fmt: skip
    checks = [
        {
            "expr": f"round({name}, 0.01)",
            "eval_time": "300m",
            "exp_samples": [{"labels": f"{{{labels}}}", "value": round(value, 2)} for labels, value in wanted.items()],
        }
        for name, wanted in expected.items()
    ]
    (tmp_path / "rules.yaml").write_text(rules.rule_file(), encoding="utf-8")
    test = {"interval": "1m", "input_series": series, "promql_expr_test": checks}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "30m", "tests": [test]}))
    run("promtool", "test", "rules", tmp_path / "test.yaml")


@needs_promtool
def test_prometheus_takes_the_rules_and_the_configuration() -> None:
    assert "SUCCESS" in run("promtool", "check", "rules", OPS / "rules/danlu.yaml")
    assert "SUCCESS" in run("promtool", "check", "config", OPS / "prometheus.yaml")


@needs_amtool
def test_critical_alerts_page_and_others_are_told() -> None:
    run("amtool", "check-config", OPS / "alertmanager.yaml")
    for severity, receiver in (("critical", "page"), ("warning", "tell")):
        found = run("amtool", "config", "routes", "test", f"--config.file={OPS / 'alertmanager.yaml'}", f"severity={severity}")
        assert found.strip() == receiver


def test_the_routes_whose_whole_answers_must_be_fast_are_the_encoders() -> None:
    routes = {path for task in (*get_args(EncoderTask), Pretrain) for path in routes_of(task())}
    assert len(routes) == 7
    assert {route for route in (*routes, "/v1/chat/completions", "/v1/models") if re.fullmatch(WHOLE_ANSWERS.pattern, route)} == routes


def test_what_is_silenced_and_what_silences_are_alerts_with_the_labels_it_goes_by() -> None:
    labels = {alert.name: alert.expr.labels for alert in ALERTS}
    for rule in yaml.safe_load(rules.alertmanager_config(page=None, tell=None))["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            for name in matcher.split('"')[1].split("|"):
                assert set(rule["equal"]) <= labels[name], f"{name} has {labels[name]}"


def test_a_summary_names_only_labels_that_the_alert_has() -> None:
    for alert in ALERTS:
        named = set(re.findall(r"\$labels\.(\w+)", alert.summary))
        assert named <= alert.expr.labels, alert.name


def test_every_alert_has_a_runbook_and_a_dashboard() -> None:
    pages = {page.uid for page in DASHBOARDS}
    for alert in ALERTS:
        assert alert.dashboard in pages
        assert len(alert.steps) >= 2
        assert alert.meaning in (ROOT / alert.runbook).read_text(encoding="utf-8")
    assert {path.stem for path in (ROOT / "ops/runbooks").glob("*.md")} == {alert.name for alert in ALERTS}


def test_the_page_of_objectives_has_each_burn_alert_and_what_it_reads() -> None:
    page = (ROOT / "ops/SLO.md").read_text(encoding="utf-8")
    for alert in ALERTS:
        assert (f"[{alert.name}](runbooks/{alert.name}.md)" in page) == ("Budget" in alert.name and alert.name.startswith("Serving"))
    for recorded in (*ERROR_RATIO.values(), *SLOW_RATIO.values()):
        assert f"`{recorded.exported}`" in page
    # https://sre.google/workbook/alerting-on-slos: 0.5 % of 30 days are 216 minutes, 1 % twice as much.
    assert "216 minutes" in page
    assert "432 minutes" in page


KUBECTL = {"get", "describe", "logs", "delete", "cordon"}
ELSEWHERE = {"nvidia-smi", "dmesg", "df", "du", "top", "curl"}
"""Commands of a node, which a machine without a GPU or a kernel log need not have."""


def test_every_command_in_a_runbook_exists() -> None:
    ours = typer.main.get_command(cli.app)
    commands = [one for command in ours.commands.values() for one in (command, *getattr(command, "commands", {}).values())]  # type: ignore[attr-defined]
    options = {option for command in commands for parameter in command.params for option in parameter.opts}
    ray = run(_script("ray"), "--help")
    seen = set()
    for alert in ALERTS:
        for code in re.findall(r"`([a-z][a-z-]+ [^`]+)`", " ".join(alert.steps)):
            program, first, *rest = code.split()
            seen.add(program)
            match program:
                case "danlu":
                    assert first in ours.commands, code  # type: ignore[attr-defined]
                    assert {word for word in rest if word.startswith("--")} <= options, code
                case "ray":
                    assert re.search(rf"^  {first}\s", ray, re.MULTILINE), code
                case "kubectl":
                    assert first in KUBECTL, code
                case "py-spy":
                    assert Path(_script("py-spy")).exists()
                case _:
                    assert program in ELSEWHERE, code
    assert {"danlu", "ray", "kubectl", "nvidia-smi"} <= seen


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)
