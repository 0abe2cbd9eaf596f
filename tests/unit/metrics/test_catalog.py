"""The catalogue: names that Prometheus takes, each once, and labels that are closed."""

from __future__ import annotations

import re

import pytest

from danlu.metrics import catalog, emit


def test_every_metric_has_a_valid_unique_name_and_says_what_it_is() -> None:
    names = [metric.name for metric in catalog.ALL]
    assert len(names) == len(set(names)) > 15
    for metric in catalog.ALL:
        assert re.fullmatch(r"danlu_(train|serve)_[a-z_]+", metric.name)
        assert metric.name.startswith(f"danlu_{metric.layer}_")
        assert metric.help.endswith(".")
        assert not metric.name.endswith("_total"), "Ray adds it to counters"
        assert bool(metric.buckets) == (metric.kind == "histogram")


def test_a_label_that_the_catalogue_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="danlu_train_loss has the labels"):
        emit.emit(catalog.TRAIN_LOSS, 1.0, job="a", rank="0")
    with pytest.raises(ValueError, match="danlu_train_loss"):
        emit.emit(catalog.TRAIN_LOSS, 1.0)


def test_no_label_of_ours_is_one_that_prometheus_would_rename() -> None:
    for metric in catalog.ALL:
        assert not catalog.RESERVED & set(metric.labels), metric.name


def test_ten_thousand_tenants_become_a_bounded_number_of_series_whose_sum_is_right() -> None:
    emitter = emit._Emitter()
    counter = catalog.Metric("danlu_serve_spent", "counter", "tokens", "Tokens.", "serve", ("model", "tenant"))
    gauge = catalog.Metric("danlu_serve_balance", "gauge", "tokens", "Tokens left.", "serve", ("tenant",))
    for number in range(10_000):
        for _ in range(2):
            emitter.add(counter, 1.5, ("m", f"tenant-{number}"))
            emitter.add(gauge, 1.0, (f"tenant-{number}",))
    counted = {labels: value for (metric, labels), value in emitter.sums.items() if metric is counter}
    assert len(counted) == counter.max_values + 1
    assert sum(counted.values()) == 30_000
    assert counted["m", "other"] == 3.0 * (10_000 - counter.max_values)
    assert len(emitter.last) == gauge.max_values, "the last of many gauges does not stand for all of them"
