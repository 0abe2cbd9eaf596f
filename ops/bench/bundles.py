"""A bundle to measure with: MiniLM after a few steps on Reuters R8, and its int8 version."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from harness import SPEC, cores, say

from danlu import sdk
from danlu.artifact.bundle import Bundle, write_bundle
from danlu.compress.quantize import quantize
from danlu.data.columns import labelled
from danlu.data.formats import read_rows
from danlu.spec.compress import Int8
from danlu.spec.files import load
from danlu.spec.train import TrainJob


@dataclass(frozen=True)
class Bundles:
    """The same model in the precision it was trained in, and in int8."""

    original: Bundle
    int8: Bundle


def train_bundles(folder: Path, *, max_length: int, steps: int = 16) -> Bundles:
    """Train in this process into `folder`. A few steps: answers must not be near ties, their quality does not matter here."""
    began = time.perf_counter()
    job = load(TrainJob, SPEC)
    fields = job.model_dump(mode="json") | {
        "name": "bench",
        "max_steps": steps,
        "micro_batch_size": job.global_batch_size,
        "parallel": {"kind": "ddp"},
        "workers": {"num_workers": 1, "cpus_per_worker": cores()},
        "storage": str(folder / "storage"),
    }
    fields["model"] |= {"max_length": max_length}
    fields["data"] |= {"test": None, "dev_size": 0.02, "cache_dir": str(folder / "cache")}
    fields["evaluation"] |= {"eval_steps": steps}
    fields["checkpoint"] |= {"save_steps": steps}
    original = sdk.train(TrainJob.model_validate(fields)).bundle
    quantize(original, Int8(), folder / "int8/model")
    int8 = write_bundle(folder / "int8", original.meta.model_copy(update={"quantization": Int8(), "probes": [], "version": None}))
    say(f"a bundle of {steps} steps and its int8 version: {time.perf_counter() - began:.0f} s")
    return Bundles(original, int8)


def some_texts(number: int, seed: int = 0) -> list[str]:
    """`number` texts of R8's test rows, drawn at random, so that lengths come as they come."""
    import random

    data = load(TrainJob, SPEC).data
    assert data.test is not None
    found = labelled(read_rows(data.test, format=data.format, max_rows=None, where="test"), data.columns, where="test").texts
    return random.Random(seed).sample(list(found), number)
