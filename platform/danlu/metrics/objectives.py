"""What a service promises: the shares of requests that may fail or take too long, and how they are counted."""

from __future__ import annotations

from danlu.metrics import catalog as c
from danlu.metrics.promql import Expr, Matches, Recorded, bucket_rate, count_rate, rate, total

USER_ROUTES = Matches("/v1/.+")
"""What clients ask; health and readiness are asked by machines."""
WHOLE_ANSWERS = Matches("/v1/(answer|choose|classify|embeddings|fill_mask|rerank|tag)")
"""Of these a client waits for all of the answer. A language model's may well take minutes: there the first token counts."""
ERROR_BUDGET = 0.005
"""The objective: of a month's requests at most one in 200 ends with a 5xx."""
SLOW_BUDGET = 0.01
"""The objective: at most one request in 100 takes longer than SLOW_S."""
SLOW_S = "1.0"
WINDOWS = ("5m", "30m", "1h", "6h")


def _error_ratio(window: str) -> Expr:
    requests = total(rate(c.SERVE_REQUESTS, window, route=USER_ROUTES), "model")
    failed = total(rate(c.SERVE_REQUESTS, window, route=USER_ROUTES, status=Matches("5..")), "model")
    return (failed | requests * 0) / requests  # a model that never failed has no series with a 5xx


def _slow_ratio(window: str) -> Expr:
    requests = total(count_rate(c.SERVE_SECONDS, window, route=WHOLE_ANSWERS), "model")
    return (requests - total(bucket_rate(c.SERVE_SECONDS, window, route=WHOLE_ANSWERS, le=SLOW_S), "model")) / requests


ERROR_RATIO = {w: Recorded(f"model:danlu_serve_errors:ratio_rate{w}", _error_ratio(w), "Share of requests with a 5xx.") for w in WINDOWS}
SLOW_RATIO = {w: Recorded(f"model:danlu_serve_slow:ratio_rate{w}", _slow_ratio(w), f"Share of requests over {SLOW_S} s.") for w in WINDOWS}
