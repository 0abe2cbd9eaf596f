"""Expressions out of catalogue entries: what is written is PromQL, and what a metric does not have cannot be written."""

from __future__ import annotations

import promql_parser
import pytest

from danlu.metrics import catalog as c
from danlu.metrics import foreign as f
from danlu.metrics.promql import (
    Matches,
    Recorded,
    aggregate,
    bucket_rate,
    count_rate,
    increase,
    mean,
    over_time,
    quantile,
    rate,
    select,
    total,
)


def test_a_selector_names_the_exported_series() -> None:
    chosen = rate(c.SERVE_REQUESTS, "5m", route="/v1/classify", status=Matches("5.."))
    assert chosen.text == 'rate(ray_danlu_serve_requests_total{route="/v1/classify", status=~"5.."}[5m])'
    assert select(c.TRAIN_LOSS, train_job="$train_job").text == 'ray_danlu_train_loss{train_job=~"$train_job"}'
    assert select(f.UP).reads == {"up"}


@pytest.mark.parametrize(
    "write",
    [
        lambda: select(c.TRAIN_LOSS, tenant="a"),
        lambda: total(rate(c.SERVE_REQUESTS, "5m"), "tenant"),
        lambda: total(total(rate(c.SERVE_REQUESTS, "5m"), "model"), "status"),
        lambda: quantile(0.9, c.SERVE_SECONDS, "5m", "status"),
        lambda: total(rate(c.SERVE_COST, "5m"), "model").each_over(total(rate(c.SERVE_TOKENS, "5m"), "model"), "tenant"),
        lambda: select(Recorded("a:b:c", total(select(c.TRAIN_LOSS), "train_job"), "x."), model="m"),
    ],
)
def test_a_label_that_is_not_there_is_refused(write: object) -> None:
    with pytest.raises(ValueError, match="has no label"):
        write()  # type: ignore[operator]


@pytest.mark.parametrize(
    "write",
    [
        lambda: rate(c.TRAIN_LOSS, "5m"),
        lambda: increase(c.SERVE_SECONDS, "5m"),
        lambda: select(c.SERVE_SECONDS),
        lambda: bucket_rate(c.SERVE_REQUESTS, "5m"),
        lambda: count_rate(c.TRAIN_STEP, "5m"),
        lambda: over_time("avg", c.TRAIN_TOKENS, "5m"),
    ],
)
def test_a_function_that_is_not_for_this_kind_of_metric_is_refused(write: object) -> None:
    with pytest.raises(ValueError, match="is a"):
        write()  # type: ignore[operator]


def test_operations_keep_their_order_as_a_parser_reads_it() -> None:
    one, two = select(c.TRAIN_STEP), select(c.TRAIN_NUM_STEPS)
    written = promql_parser.parse(((one - two) * 2 / (one + two) > 0.5).text)
    meant = promql_parser.parse(
        "(((ray_danlu_train_step - ray_danlu_train_num_steps) * 2) / (ray_danlu_train_step + ray_danlu_train_num_steps)) > 0.5"
    )
    assert written.prettify() == meant.prettify()
    ratio = mean(c.SERVE_BATCH_ROWS, "5m", "model")
    assert isinstance(promql_parser.parse(aggregate("max", ratio, ["model"]).text), promql_parser.AggregateExpr)
