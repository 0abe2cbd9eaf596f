"""What a device costs: the one price table. Rough on-demand prices of large clouds, to be replaced by what you pay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

USD_PER_HOUR: Mapping[str, float] = {
    "cpu": 0.045,  # a core, with the 4 GiB that come with it
    "H200": 5.0,
    "H100": 4.0,
    "A100": 2.5,
    "L40S": 1.9,
    "A10": 1.0,
    "L4": 0.8,
    "T4": 0.5,
}


ACCELERATOR = "accelerator_type:"


def accelerator(resources: Iterable[str]) -> str:
    """The GPU of a node by the names of its Ray resources, such as `accelerator_type:H100`; `gpu` if Ray does not know it."""
    return next((name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)), "gpu")


def usd_per_hour(device: str) -> float | None:
    """The price of a GPU by its name, or of one core for `cpu`; None if the table does not have it. The first name contained counts."""
    return next((price for name, price in USD_PER_HOUR.items() if name in device), None)
