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


def test_counting_nothing_reaches_nobody() -> None:
    """Ray's own counter raises for 0: that once ended the thread that hands all metrics over."""
    emit.emit(catalog.SERVE_CACHED_TOKENS, 0, model="a")
    assert not [key for key in emit._emitter.sums if key[0] is catalog.SERVE_CACHED_TOKENS]
