"""What one training process does with a job, wherever it runs: rows, model folder, loop."""

from __future__ import annotations

import torch

from danlu import traces
from danlu.artifact.run_logs import RunLog
from danlu.spec.train import TrainJob
from danlu.tasks.from_scratch import start_folder
from danlu.tasks.rows import Splits
from danlu.tasks.task import read_splits
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train.budget import check_priced
from danlu.train.loop import Outcome, train
from danlu.train.observed import Observed
from danlu.train.phases import device_name
from danlu.train.run import Run


def work(job: TrainJob, run: Run, run_uri: str, splits: Splits | None = None, *, log: RunLog | None = None) -> Outcome:
    """Train as `run`'s rank. `splits` saves reading the rows again where this process has them; `log` is kept at each checkpoint."""
    if run.device.type == "cpu":
        torch.set_num_threads(job.workers.cpus_per_worker)
    check_priced(job, device_name(run.device))
    with traces.span("data", {"danlu.rank": run.rank}):
        folder = start_folder(job.model, job.data, job.task, seed=job.seed)
        tokenizer = load_tokenizer(folder)
        if splits is None:
            splits = read_splits(job, tokenizer, max_length=job.model.max_length)
    return train(job, splits, folder, tokenizer, Observed(run, log), run_uri)
