"""Dashboards -> Grafana's JSON, by Grafana's own SDK; and the files that provision them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from danlu.metrics.dashboards import DASHBOARDS, Dashboard, Panel, Variable
from danlu.metrics.rules import WRITTEN

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders import dashboard as builder
    from grafana_foundation_sdk.builders import stat, table, timeseries

SOURCE = "${datasource}"
HEIGHT = 8
RAY_DASHBOARD = "http://127.0.0.1:8265"
LOG_STREAMS = "{container=~`ray-.+`}"
"""Loki's streams with the lines of our pods, as collectors label them. In backticks: it stands inside a JSON string of a link."""


def dashboard_json(page: Dashboard) -> str:
    """A dashboard as Grafana imports it."""
    from grafana_foundation_sdk.builders import dashboard as builder
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import DashboardLinkType

    made = builder.Dashboard(page.title).uid(page.uid).description(page.description).tags(["danlu"]).readonly()
    made = made.refresh("30s").time("now-3h", "now").timezone("browser")
    made = made.with_variable(builder.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for variable in page.variables:
        made = made.with_variable(_variable(variable))
    others = builder.DashboardLink("Danlu").type(DashboardLinkType.DASHBOARDS).tags(["danlu"]).as_dropdown(True)
    made = made.link(others.keep_time(True).include_vars(True))
    made = made.with_variable(builder.TextBoxVariable("ray_dashboard").label("Ray's dashboard").default_value(RAY_DASHBOARD))
    made = made.link(_link("Logs in Ray's dashboard", "${ray_dashboard}/#/logs"))
    if page.logs is not None:
        made = made.with_variable(builder.DatasourceVariable("logs").label("Loki").type("loki"))
        made = made.with_variable(builder.TextBoxVariable("log_streams").label("Log streams").default_value(LOG_STREAMS))
        made = made.link(_link("Logs in Loki", explore_url(*page.logs)))
    for name, expr, _ in page.annotations:
        made = made.annotation(builder.AnnotationQuery().name(name).datasource(_source()).enable(True).icon_color("orange").expr(expr.text))
    number = count(1)
    for title, panels in page.rows:
        made = made.with_row(builder.Row(title).id(next(number)))
        for panel in panels:
            made = made.with_panel(_panel(panel).id(next(number)))
    document = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for annotation, (_, _, text) in zip(document["annotations"].get("list", ()), page.annotations, strict=True):
        annotation["titleFormat"] = text  # what Prometheus' annotations have and the SDK's common type does not
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def provisioning() -> Mapping[str, str]:
    """File name under ops/grafana -> its text: where the dashboards and their Prometheus are."""
    folder = {"name": "danlu", "folder": "Danlu", "type": "file", "options": {"path": "/var/lib/grafana/dashboards/danlu"}}
    source = {
        "name": "Prometheus",
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "isDefault": True,
        "url": "http://prometheus:9090",
    }
    return {
        "provisioning/dashboards/danlu.yaml": WRITTEN + yaml.safe_dump({"apiVersion": 1, "providers": [folder]}, sort_keys=False),
        "provisioning/datasources/danlu.yaml": WRITTEN + yaml.safe_dump({"apiVersion": 1, "datasources": [source]}, sort_keys=False),
    }


def explore_url(field: str, variable: str) -> str:
    """Grafana's page of a Loki's lines that have one of the variable's values in `field`, in the time that the dashboard shows:
    https://grafana.com/docs/grafana/latest/explore/get-started-with-explore/#generate-explore-urls-from-external-tools

    Lines are searched, not parsed: Ray puts the worker's name before those that it hands to the driver.
    """
    query = f'${{log_streams:percentencode}} |~ `"{field}": "${{{variable}:regex}}"`'
    pane = {
        "datasource": "${logs}",
        "queries": [{"refId": "A", "datasource": {"type": "loki", "uid": "${logs}"}, "expr": query}],
        "range": {"from": "${__from}", "to": "${__to}"},
    }
    # Grafana fills in variables where it finds their names as they are.
    panes = quote(json.dumps({"danlu": pane}, separators=(",", ":")), safe="${}:")
    return f"/explore?schemaVersion=1&orgId=1&panes={panes}"


def _link(title: str, url: str) -> builder.DashboardLink:
    from grafana_foundation_sdk.builders import dashboard as builder
    from grafana_foundation_sdk.models.dashboard import DashboardLinkType

    return builder.DashboardLink(title).type(DashboardLinkType.LINK).url(url).icon("external link").target_blank(True)


def _variable(variable: Variable) -> builder.QueryVariable:
    from grafana_foundation_sdk.builders import dashboard as builder
    from grafana_foundation_sdk.models.dashboard import VariableOption, VariableRefresh, VariableSort

    query = f"label_values({variable.series.exported}, {variable.label})"
    made = builder.QueryVariable(variable.label).query({"query": query, "refId": variable.label}).datasource(_source())
    made = made.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    made = made.multi(True).include_all(True).all_value(".*")
    return made.current(VariableOption(selected=True, text="All", value="$__all"))


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel | table.Panel:
    from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
    from grafana_foundation_sdk.builders import dashboard as builder
    from grafana_foundation_sdk.models.common import (
        BigValueColorMode,
        LegendDisplayMode,
        LegendPlacement,
        StackingMode,
        TooltipDisplayMode,
    )

    kinds: dict[str, Any] = {"timeseries": timeseries.Panel, "stat": stat.Panel, "table": table.Panel}
    made = kinds[panel.kind]()
    made = made.title(panel.title).description(f"Good: {panel.good}").datasource(_source()).unit(panel.unit)
    made = made.height(HEIGHT if panel.kind != "stat" else 5).span(panel.width).no_value("no data")
    for number, (expr, legend) in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(expr.text).legend_format(legend).ref_id(chr(ord("A") + number)).datasource(_source())
        made = made.with_target(target.instant() if panel.kind == "table" else target.range())
    made = made.thresholds(builder.ThresholdsConfig().mode(_absolute()).steps(_steps(panel)))
    if panel.link:
        made = made.links([builder.DashboardLink("Details").url(f"/d/{panel.link}").keep_time(True).include_vars(True)])
        if panel.kind == "timeseries" and (label := _label_of(panel)):
            url = f"/d/{panel.link}?${{__url_time_range}}&var-{label}=${{__field.labels.{label}}}"
            made = made.data_links([builder.DashboardLink(f"This {label}").url(url)])
    match panel.kind:
        case "timeseries":
            made = made.legend(
                common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
            )
            made = made.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)).fill_opacity(30 if panel.stacked else 8)
            if panel.stacked:
                made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
        case "stat":
            made = made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).color_mode(BigValueColorMode.VALUE)
    checked: timeseries.Panel | stat.Panel | table.Panel = made
    return checked


def _label_of(panel: Panel) -> str | None:
    """Of the variables of the page that a panel leads to, the one that tells its series apart."""
    (page,) = (page for page in DASHBOARDS if page.uid == panel.link)
    has = frozenset.intersection(*(expr.labels for expr, _ in panel.queries))
    return next((variable.label for variable in page.variables if variable.label in has), None)


def _steps(panel: Panel) -> list[Any]:
    from grafana_foundation_sdk.models.dashboard import Threshold

    warn, bad = panel.warn, panel.bad
    if warn is None:
        return [Threshold(color="green")]
    if bad is None:
        return [Threshold(color="green"), Threshold(color="orange", value=warn)]
    if bad < warn:  # small is bad
        return [Threshold(color="red"), Threshold(color="orange", value=bad), Threshold(color="green", value=warn)]
    red = Threshold(color="red", value=bad)
    return [Threshold(color="green"), red] if bad == warn else [Threshold(color="green"), Threshold(color="orange", value=warn), red]


def _absolute() -> Any:
    from grafana_foundation_sdk.models.dashboard import ThresholdsMode

    return ThresholdsMode.ABSOLUTE


def _source() -> Any:
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    return DataSourceRef(type_val="prometheus", uid=SOURCE)
