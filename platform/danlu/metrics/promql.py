"""PromQL made of catalogue entries: a label that a metric does not have is a ValueError here, a renamed metric an ImportError."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from danlu.metrics.catalog import Kind

EVERYWHERE = frozenset({"job", "instance"})
"""Labels that Prometheus gives every series."""


class Series(Protocol):
    """What can be selected: a metric of ours, of others, or a recorded one."""

    @property
    def exported(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Matches:
    """A label's value by regular expression; `Matches(x, negated=True)` for all others."""

    pattern: str
    negated: bool = False


@dataclass(frozen=True)
class Expr:
    """An instant vector or scalar: its text, the labels its series have, the metrics it reads."""

    text: str
    labels: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    compound: bool = False
    """A binary operation, which is bracketed inside another."""

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: Expr | float) -> Expr:
        return _binary(self, "+", other)

    def __sub__(self, other: Expr | float) -> Expr:
        return _binary(self, "-", other)

    def __mul__(self, other: Expr | float) -> Expr:
        return _binary(self, "*", other)

    def __truediv__(self, other: Expr | float) -> Expr:
        return _binary(self, "/", other)

    def __gt__(self, other: Expr | float) -> Expr:
        return _binary(self, ">", other)

    def __lt__(self, other: Expr | float) -> Expr:
        return _binary(self, "<", other)

    def equals(self, other: Expr | float) -> Expr:
        """Only the series with this value."""
        return _binary(self, "==", other)

    def differs(self, other: Expr | float) -> Expr:
        """Only the series with another value; NaN differs from itself."""
        return _binary(self, "!=", other)

    def __and__(self, other: Expr) -> Expr:
        return _binary(self, "and", other)

    def __or__(self, other: Expr) -> Expr:
        return _binary(self, "or", other)

    def each_times(self, one: Expr, *on: str) -> Expr:
        """Each series here times the one of `one` that has the same labels `on`."""
        return _many_to_one(self, "*", one, on)

    def each_over(self, one: Expr, *on: str) -> Expr:
        """Each series here over the one of `one` that has the same labels `on`."""
        return _many_to_one(self, "/", one, on)

    def unless(self, other: Expr) -> Expr:
        """Only the series that `other` has none for."""
        return _binary(self, "unless", other)


def select(series: Series, **matchers: str | Matches) -> Expr:
    """The series themselves. A value that begins with `$` is a Grafana variable and matches as a regular expression."""
    if series.kind == "histogram":
        raise ValueError(f"{series.exported} is a histogram: select count_of, sum_of, or a quantile")
    return _select(series, "", (), matchers)


def rate(series: Series, window: str, **matchers: str | Matches) -> Expr:
    """Increase a second of a counter over a window."""
    return _over("rate", series, "", window, (), matchers)


def increase(series: Series, window: str, **matchers: str | Matches) -> Expr:
    """Increase of a counter over a window."""
    return _over("increase", series, "", window, (), matchers)


def count_rate(series: Series, window: str, **matchers: str | Matches) -> Expr:
    """Observations a second of a histogram."""
    return _over("rate", series, "_count", window, (), matchers)


def sum_rate(series: Series, window: str, **matchers: str | Matches) -> Expr:
    """Sum of what a histogram observed, a second."""
    return _over("rate", series, "_sum", window, (), matchers)


def bucket_rate(series: Series, window: str, **matchers: str | Matches) -> Expr:
    """A histogram's buckets, observations a second."""
    return _over("rate", series, "_bucket", window, ("le",), matchers)


def over_time(
    how: Literal["avg", "max", "min", "changes", "quantile"],
    series: Series,
    window: str,
    *,
    quantile: float | None = None,
    **matchers: str | Matches,
) -> Expr:
    """A gauge over a window."""
    if series.kind != "gauge":
        raise ValueError(f"{series.exported} is a {series.kind}, and {how} over time is for gauges")
    name = "changes" if how == "changes" else f"{how}_over_time"
    inner = _select(series, "", (), matchers)
    argument = "" if quantile is None else f"{quantile:g}, "
    return Expr(f"{name}({argument}{inner.text}[{window}])", inner.labels, inner.reads)


def aggregate(how: Literal["sum", "max", "min", "avg", "count"], expr: Expr, by: Iterable[str] = ()) -> Expr:
    """`how by (labels)`; without labels one number of all."""
    names = tuple(by)
    _check(names, expr.labels, expr.text)
    clause = f" by ({', '.join(names)})" if names else ""
    return Expr(f"{how}{clause} ({expr.text})", frozenset(names), expr.reads)


def total(expr: Expr, *by: str) -> Expr:
    """Sum over everything but the labels named."""
    return aggregate("sum", expr, by)


def quantile(q: float, series: Series, window: str, *by: str, **matchers: str | Matches) -> Expr:
    """A quantile of a histogram."""
    buckets = total(bucket_rate(series, window, **matchers), "le", *by)
    return Expr(f"histogram_quantile({q:g}, {buckets.text})", frozenset(by), buckets.reads)


def mean(series: Series, window: str, *by: str, **matchers: str | Matches) -> Expr:
    """The mean of what a histogram observed."""
    return total(sum_rate(series, window, **matchers), *by) / total(count_rate(series, window, **matchers), *by)


def call(function: Literal["clamp_min", "clamp_max", "abs", "absent"], expr: Expr, *arguments: float) -> Expr:
    """A function of PromQL."""
    more = "".join(f", {argument:g}" for argument in arguments)
    return Expr(f"{function}({expr.text}{more})", frozenset() if function == "absent" else expr.labels, expr.reads)


def now() -> Expr:
    """Unix time of the evaluation."""
    return Expr("time()")


@dataclass(frozen=True)
class Recorded:
    """A recording rule: an expression under a name, `level:metric:operations`, that others may select."""

    exported: str
    expr: Expr
    help: str
    kind: Kind = "gauge"

    @property
    def labels(self) -> tuple[str, ...]:
        """Those of its expression."""
        return tuple(sorted(self.expr.labels))


def _select(series: Series, part: str, extra: tuple[str, ...], matchers: dict[str, str | Matches]) -> Expr:
    has = frozenset(series.labels) | frozenset(extra) | EVERYWHERE
    _check(matchers, has, series.exported)
    inner = ", ".join(f"{name}{_matcher(value)}" for name, value in matchers.items())
    name = series.exported + part
    return Expr(f"{name}{{{inner}}}" if inner else name, has, frozenset({series.exported}))


def _over(function: str, series: Series, part: str, window: str, extra: tuple[str, ...], matchers: dict[str, str | Matches]) -> Expr:
    wanted: Kind = "histogram" if part else "counter"
    if series.kind != wanted:
        raise ValueError(f"{series.exported} is a {series.kind}, and {function} here takes a {wanted}")
    inner = _select(series, part, extra, matchers)
    return Expr(f"{function}({inner.text}[{window}])", inner.labels, inner.reads)


def _matcher(value: str | Matches) -> str:
    if isinstance(value, Matches):
        return f'{"!~" if value.negated else "=~"}"{value.pattern}"'
    return f'{"=~" if value.startswith("$") else "="}"{value}"'


def _binary(left: Expr, operator: str, right: Expr | float) -> Expr:
    other = right if isinstance(right, Expr) else Expr(f"{right:g}")
    sides = [f"({side.text})" if side.compound else side.text for side in (left, other)]
    return Expr(f"{sides[0]} {operator} {sides[1]}", left.labels or other.labels, left.reads | other.reads, compound=True)


def _many_to_one(many: Expr, operator: str, one: Expr, on: Iterable[str]) -> Expr:
    names = tuple(on)
    _check(names, many.labels, many.text)
    if set(names) != one.labels:
        raise ValueError(f"{one.text} has the labels {sorted(one.labels)}: by {names} there may be several of it")
    sides = [f"({side.text})" if side.compound else side.text for side in (many, one)]
    text = f"{sides[0]} {operator} on ({', '.join(names)}) group_left () {sides[1]}"
    return Expr(text, many.labels, many.reads | one.reads, compound=True)


def _check(names: Iterable[str], has: frozenset[str], what: str) -> None:
    if unknown := [name for name in names if name not in has]:
        raise ValueError(f"{what} has no label {', '.join(unknown)}; it has {', '.join(sorted(has)) or 'none'}")
