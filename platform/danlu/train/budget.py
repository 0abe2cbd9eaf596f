"""What a job may cost, and what its runs have cost so far."""

from __future__ import annotations

from danlu.artifact.runs import RunFolder
from danlu.errors import SpecError
from danlu.metrics.prices import USD_PER_HOUR, usd_per_hour
from danlu.metrics.training import Budget, spent
from danlu.spec.train import TrainJob


def budget_of(job: TrainJob, run_uri: str) -> Budget | None:
    """The job's budget, with what the run's earlier attempts have spent of it."""
    if job.budget_usd is None:
        return None
    return Budget(job.budget_usd, spent(RunFolder(run_uri, 0).written()))


def check_priced(job: TrainJob, device: str) -> None:
    """SpecError for a budget of devices that have no price."""
    if job.budget_usd is not None and usd_per_hour(device) is None:
        raise SpecError(
            f"budget_usd={job.budget_usd:g} has no effect: the price table has no {device!r}",
            where="budget_usd",
            fix=f"leave it out, or put its price into danlu/metrics/prices.py beside {', '.join(USD_PER_HOUR)}",
        )
