"""Units find no Ray in their process: the resources they speak of are this machine's, the processes they count are theirs."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_ray() -> None:
    """Ends the one of the tests on a Ray, where this process ran them before."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
