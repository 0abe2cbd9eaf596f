"""What serving costs, by model and by tenant: recording rules. A model's money is its replicas'; a tenant's share is that of its tokens.

A prompt's token counts as much as an answer's. What idle replicas cost is shared out like the rest; a model that nobody with a key has
asked in a window has no tenants in it.
"""

from __future__ import annotations

from danlu.metrics import catalog as c
from danlu.metrics.promql import Expr, Matches, Recorded, aggregate, increase, rate, select, total

MILLION = 1e6
BUDGET_WINDOW = "7d"
"""Of a tenant's budget. A Prometheus keeps 10 to 15 days if it is not told otherwise: a month of them would be counted short."""


def tokens_a_second(window: str, **matchers: str | Matches) -> Expr:
    """A model's tokens: of an encoder's texts, or of a language model's prompts and answers."""
    spoken = total(rate(c.SERVE_PROMPT_TOKENS, window, **matchers), "model") + total(
        rate(c.SERVE_COMPLETION_TOKENS, window, **matchers), "model"
    )
    return total(rate(c.SERVE_TOKENS, window, **matchers), "model") | spoken


def of_tenants(whole: Expr, window: str, **matchers: str | Matches) -> Expr:
    """What a model costs in a window (a series a model), shared out among its tenants by their tokens in the same window."""
    tokens = increase(c.SERVE_KEY_TOKENS, window, **matchers)
    share = total(tokens, "model", "tenant").each_over(total(tokens, "model") > 0, "model")
    return share.each_times(whole, "model")


def spent(window: str, **matchers: str | Matches) -> Expr:
    """USD that a model's replicas have cost in a window."""
    return total(increase(c.SERVE_COST, window, **matchers), "model")


USD_A_MILLION_TOKENS = Recorded(
    "model:danlu_serve_usd_per_million_tokens:rate1h",
    total(rate(c.SERVE_COST, "1h"), "model") / (tokens_a_second("1h") > 0) * MILLION,
    "What a million tokens of a model cost, idle replicas included.",
)
TENANT_USD = Recorded(
    "model_tenant:danlu_serve_usd:increase1h", of_tenants(spent("1h"), "1h"), "What a tenant's requests to a model cost in an hour."
)
TENANT_SPENT = Recorded(
    f"tenant:danlu_serve_usd:increase{BUDGET_WINDOW}",
    total(of_tenants(spent(BUDGET_WINDOW), BUDGET_WINDOW), "tenant"),
    "What a tenant's requests to all models cost in seven days.",
)
TENANT_BUDGET_USED = Recorded(
    f"tenant:danlu_serve_budget_used:ratio{BUDGET_WINDOW}",
    select(TENANT_SPENT) / aggregate("max", select(c.SERVE_TENANT_BUDGET), ["tenant"]),
    "Share of a tenant's budget that the last seven days have cost.",
)
RECORDED: tuple[Recorded, ...] = (USD_A_MILLION_TOKENS, TENANT_USD, TENANT_SPENT, TENANT_BUDGET_USED)
