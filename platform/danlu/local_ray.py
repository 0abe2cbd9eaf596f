"""A Ray of our own on this machine, for training and serving without a cluster."""

from __future__ import annotations

import logging
import os
import signal
import threading

import ray

ENVIRONMENT = {
    # Training and serving are not background jobs, which is what Ray takes its workers for.
    "RAY_worker_niceness": "0",
    # A replica's events would be made on a loop of their own and handed, one by one, to the one in another thread that has the socket.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
OF_THIS_MACHINE = {
    # Workers with an environment of their own, as those of training and serving, are not taken from the ones that Ray starts in advance,
    # one a core: these only delay them.
    "RAY_prestart_worker_first_driver": "0",
    # How long a training may have ended before it is noticed, in seconds; Ray's default is 2.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # A process that asks whether a cloud takes this machine away.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""For a Ray with a few workers, all here."""


def start_ray(num_cpus: int | None = None, *, dashboard: bool = True) -> None:
    """Start it, unless this process is connected to a Ray already."""
    if ray.is_initialized():
        return
    for name, value in (ENVIRONMENT | OF_THIS_MACHINE).items():
        os.environ.setdefault(name, value)
    # That it guards its own dashboard with a token is not news to act on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    on_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if on_main else None
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.WARNING)
    if before is not None:
        # Ray's own handler would end the process at once, with what was started still running.
        signal.signal(signal.SIGTERM, before)


def join_ray() -> None:
    """Connect to the cluster that started this process as one of its jobs: Ray says in RAY_ADDRESS where it is."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
    signal.signal(signal.SIGTERM, before)
