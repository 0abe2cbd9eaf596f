"""Whether this machine has what a job's workers take: cores, GPUs, room on its NVMe drive."""

from __future__ import annotations

import sys

from danlu.errors import ResourceError
from danlu.spec.parallel import DeepSpeed
from danlu.spec.train import TrainJob


def check_machine(job: TrainJob) -> None:
    """ResourceError if the workers do not fit this machine. A cluster this process is connected to is asked instead, later."""
    from danlu.plan import num_cores

    if is_connected():
        return
    need, have = job.workers.num_workers * job.workers.cpus_per_worker, num_cores()
    if need > have:
        room = range(1, have // job.workers.cpus_per_worker + 1)
        fits = [n for n in room if job.global_batch_size % (job.micro_batch_size * n) == 0]
        raise ResourceError(
            f"{job.workers.num_workers} workers with {job.workers.cpus_per_worker} cores each need {need} cores; this machine has {have}",
            where="workers.num_workers",
            fix=(f"--set workers.num_workers={fits[-1]}" if fits else f"--set workers.num_workers=1 --set workers.cpus_per_worker={have}")
            + ", or a larger machine",
        )
    if isinstance(job.parallel, DeepSpeed) and job.parallel.uses_nvme:
        from danlu.tasks.device import pick_device
        from danlu.train.strategies.deepspeed import check_nvme

        check_nvme(job.parallel, pick_device(job.workers.gpus_per_worker))
    if job.workers.gpus_per_worker:
        import torch

        if job.workers.num_workers > torch.cuda.device_count():
            raise ResourceError(
                f"{job.workers.num_workers} workers need a GPU each; this machine has {torch.cuda.device_count()}",
                where="workers.gpus_per_worker",
                fix="--set workers.gpus_per_worker=0 trains on the CPU",
            )


def check_drive(job: TrainJob, nvme_bytes: int) -> None:
    """ResourceError if what the workers swap, `nvme_bytes` each, does not fit the drive. A cluster's workers look at their own."""
    if isinstance(job.parallel, DeepSpeed) and job.parallel.nvme_path is not None and not is_connected():
        from danlu.train.strategies.nvme import check_free

        check_free(job.parallel.nvme_path, nvme_bytes * job.workers.num_workers)


def is_connected() -> bool:
    """Whether this process is connected to a Ray, without importing it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
