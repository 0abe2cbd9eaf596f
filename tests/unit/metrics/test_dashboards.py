"""Dashboards: every expression is PromQL over the catalogue, every panel says what good is, and Grafana's own rules hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import promql_parser
import pytest
import yaml

from danlu.metrics import catalog, foreign
from danlu.metrics.alerts import RECORDED
from danlu.metrics.dashboards import DASHBOARDS, Dashboard
from danlu.metrics.grafana import dashboard_json

OPS = Path(__file__).parents[3] / "ops/grafana"
GRAFANAS = {"__rate_interval", "__range", "__from", "__to", "__field", "__url_time_range"}
"""Variables that are always there."""
KNOWN = {series.exported for series in (*catalog.ALL, *foreign.ALL, *RECORDED)}


def plain(text: str) -> str:
    """With Grafana's windows filled in, as Grafana does before it asks."""
    return text.replace("$__rate_interval", "1m").replace("$__range", "1h")


def selectors(expr: object) -> list[promql_parser.VectorSelector]:
    """Every vector selector of a parsed expression."""
    if isinstance(expr, promql_parser.VectorSelector):
        return [expr]
    found = []
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (child := getattr(expr, name, None)) is not None:
            found += selectors(child)
    for child in getattr(expr, "args", None) or []:
        found += selectors(child)
    return found


@pytest.mark.parametrize("page", DASHBOARDS, ids=lambda page: page.uid)
def test_every_expression_on_a_dashboard_parses_and_reads_known_series(page: Dashboard) -> None:
    document = json.loads((OPS / f"dashboards/{page.uid}.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in document["panels"] for target in panel.get("targets", [])]
    expressions += [annotation["expr"] for annotation in document["annotations"].get("list", [])]
    assert len(expressions) >= len(page.panels)
    for text in expressions:
        read = selectors(promql_parser.parse(plain(text)))
        assert read, text
        for selector in read:
            assert re.sub(r"_(bucket|sum|count)$", "", selector.name) in KNOWN or selector.name in KNOWN, selector.name


@pytest.mark.parametrize("page", DASHBOARDS, ids=lambda page: page.uid)
def test_a_dashboard_is_one_that_grafana_shows(page: Dashboard) -> None:
    document = json.loads(dashboard_json(page))
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in document["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps([panels, document["links"]]))) - GRAFANAS <= variables
    pages = {f"/d/{other.uid}" for other in DASHBOARDS}
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["description"].startswith("Good: ")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {link["url"] for link in panel.get("links", [])} <= pages
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)


def test_a_dashboard_leads_to_the_logs_of_what_it_shows() -> None:
    """The URLs as Grafana fills them in. A query is checked by hand against lines of ours: there is no Loki here."""
    filled = {"log_streams": "{container=~`ray-.+`}", "logs": "uid-1", "__from": "1", "__to": "2"}
    chosen = {"train_job": ("(a|b)", '(worker pid=1) {"message": "x", "train_job": "b", "rank": 0}', '{"train_job": "c"}'),
              "model": (".*", '{"message": "request", "service": "m", "model": "m"}', '{"train_job": "c"}')}  # fmt: skip
    led = 0
    for page in DASHBOARDS:
        links = {link["title"]: link["url"] for link in json.loads(dashboard_json(page))["links"]}
        assert links["Logs in Ray's dashboard"] == "${ray_dashboard}/#/logs"
        if page.logs is None:
            continue
        regex, line, other = chosen[page.logs[1]]
        url = links["Logs in Loki"].replace(f"${{{page.logs[1]}:regex}}", regex)
        url = re.sub(r"\$\{(\w+)(:percentencode)?\}", lambda found: quote(filled[found[1]]), url)
        (pane,) = json.loads(parse_qs(urlsplit(url).query)["panes"][0]).values()
        assert (pane["datasource"], pane["range"]) == ("uid-1", {"from": "1", "to": "2"})
        streams, _, pattern = pane["queries"][0]["expr"].partition(" |~ ")
        assert streams == filled["log_streams"]
        assert re.search(pattern.strip("`"), line)
        assert not re.search(pattern.strip("`"), other)
        led += 1
    assert led == 2


def test_a_series_leads_to_the_page_of_its_own_job_or_model() -> None:
    panels = json.loads(dashboard_json(DASHBOARDS[0]))["panels"]
    (loss,) = (panel for panel in panels if panel["title"] == "Loss")
    (link,) = loss["fieldConfig"]["defaults"]["links"]
    assert link["url"] == "/d/danlu-training-run?${__url_time_range}&var-train_job=${__field.labels.train_job}"


def test_a_legend_names_only_labels_that_its_expression_has() -> None:
    for page in DASHBOARDS:
        for panel in page.panels:
            for expr, legend in panel.queries:
                assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= expr.labels, (page.uid, panel.title)


def test_provisioning_names_the_folder_and_the_source() -> None:
    providers = yaml.safe_load((OPS / "provisioning/dashboards/danlu.yaml").read_text(encoding="utf-8"))["providers"]
    sources = yaml.safe_load((OPS / "provisioning/datasources/danlu.yaml").read_text(encoding="utf-8"))["datasources"]
    assert [provider["type"] for provider in providers] == ["file"]
    assert [source["type"] for source in sources] == ["prometheus"]
    assert len(list((OPS / "dashboards").glob("*.json"))) == len(DASHBOARDS)
