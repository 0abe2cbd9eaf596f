"""Training tokens per second, padding not counted: Danlu on Ray Train and in process, against a raw PyTorch loop and the HF Trainer.

MiniLM (22M) on Reuters R8 at 64 tokens (in process also at 256), 32 rows a step, the same rows in the same steps for everybody (the
length-grouped Trainer draws its own). Steady state: start-up and the first steps are left out, and so are evaluations and checkpoints.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import SPEC, Row, compare, cores, finish, interleave, options, say
from torch import nn

from danlu.data.pack import Batches
from danlu.local_ray import start_ray
from danlu.spec.files import load
from danlu.spec.train import TrainJob
from danlu.tasks import classification
from danlu.tasks.rows import Splits
from danlu.tasks.tokenizer import load_tokenizer
from danlu.train import driver, optim
from danlu.train.model import build
from danlu.train.run import LocalRun, Record, StepRecord
from danlu.train.worker import work

SKIP = 14
"""Steps that warm up: allocators, oneDNN's kernels, the optimizer's state; and, for some ten seconds after its worker, Ray starts spare
processes that take a share of a small machine's cores."""

LONG_SKIP = 3
"""The same for the rows of 256 tokens, in process only: a step takes the Trainer six seconds."""


@dataclass(frozen=True)
class Sizes:
    """Steps of a round and how many of them warm up, at 64 and at 256 tokens; rows to draw from, None for all."""

    steps: int
    skip: int
    long_steps: int
    long_skip: int
    num_rows: int | None


FULL = Sizes(SKIP + 26, SKIP, LONG_SKIP + 8, LONG_SKIP, None)
QUICK = Sizes(3, 1, 2, 1, 256)
SMALL = "small-model"
"""The folder of a quick round's model."""


@dataclass(frozen=True)
class Curve:
    """What each step took, read and lost."""

    losses: list[float]
    tokens: list[int]
    seconds: list[float]

    def rate(self, skip: int) -> float:
        """Tokens per second without the first steps."""
        return sum(self.tokens[skip:]) / sum(self.seconds[skip:])


@dataclass(frozen=True)
class Work:
    """The job, its rows and the pretrained folder."""

    job: TrainJob
    splits: Splits
    folder: Path
    bf16: bool


def load_work(job: TrainJob) -> Work:
    from danlu.artifact.pretrained import model_folder
    from danlu.tasks.device import has_native_bf16

    folder = model_folder(job.model)
    tokenizer = load_tokenizer(folder)
    splits = classification.splits(job.data, job.task, tokenizer, max_length=job.model.max_length, seed=job.seed)
    return Work(job, splits, folder, has_native_bf16(torch.device("cpu")))


# Danlu


def danlu_on_ray(job: TrainJob, storage: Path) -> Curve:
    records: list[Record] = []
    driver.fit(job, tempfile.mkdtemp(dir=storage), records.append)
    return _curve(records)


def danlu_in_process(given: Work, storage: Path) -> Curve:
    run = LocalRun(torch.device("cpu"))
    work(given.job, run, tempfile.mkdtemp(dir=storage), given.splits)
    return _curve(run.records)


def _curve(records: Sequence[Record]) -> Curve:
    steps = [record for record in records if isinstance(record, StepRecord)]
    return Curve([step.loss for step in steps], [step.tokens for step in steps], [step.step_seconds for step in steps])


# Raw PyTorch


def raw_loop(given: Work, rank: int = 0, world: int = 1) -> Curve:
    """What one writes by hand: packed batches made beforehand, autocast, clip, AdamW; DDP with PyTorch's settings if there are ranks."""
    job = given.job
    assert job.max_steps is not None
    trainee = build(job, given.folder, given.splits.label_names)
    batches = _batches(given, rank, world)
    packed = [batches.at(step)[0] for step in range(job.max_steps)]
    optimizer = optim.make_optimizer(optim.param_groups(trainee.module, job.optim, trainee.head, trainee.lr_scales), job.optim)
    rate_at = optim.learning_rate_at(job.optim, job.max_steps)
    model: nn.Module = trainee.module if world == 1 else nn.parallel.DistributedDataParallel(trainee.module)
    model.train()
    losses, seconds = [], []
    began = time.perf_counter()
    for step, batch in enumerate(packed):
        with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
            logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_type_ids)
        loss = nn.functional.cross_entropy(logits.float(), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.module.parameters(), job.optim.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        losses.append(float(mean) / world)
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    return Curve(losses, [batches.num_tokens(step) for step in range(job.max_steps)], seconds)


def raw_on_half(given: Work) -> Curve:
    """`raw_loop` with the threads of a worker that leaves Ray's own processes the other cores."""
    torch.set_num_threads(given.job.workers.cpus_per_worker)
    try:
        return raw_loop(given)
    finally:
        torch.set_num_threads(cores())


def _batches(given: Work, rank: int, world: int) -> Batches:
    job, train = given.job, given.splits.train
    sizes = {"global_batch_size": job.global_batch_size, "micro_batch_size": job.micro_batch_size}
    return Batches(train.encoded, train.labels, **sizes, rank=rank, world_size=world, seed=job.seed)


def raw_ddp(job: TrainJob, storage: Path) -> Curve:
    """`raw_loop` in two fresh processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = Path(tempfile.mkdtemp(dir=storage)) / "curve.json"
    world = job.workers.num_workers
    mp.spawn(_raw_rank, (world, port, job.model_dump_json(), str(out)), nprocs=world)
    return Curve(**json.loads(out.read_text()))


def _raw_rank(rank: int, world: int, port: int, job: str, out: str) -> None:
    given = load_work(TrainJob.model_validate_json(job))
    torch.set_num_threads(given.job.workers.cpus_per_worker)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    curve = raw_loop(given, rank, world)
    if rank == 0:
        Path(out).write_text(json.dumps(asdict(curve)))
    dist.destroy_process_group()


# The Hugging Face Trainer


def hf_trainer(given: Work, storage: Path, strategy: str) -> Curve:
    """Its own loop, collator (padding to the longest of the batch) and optimizer, with Danlu's settings; `strategy` picks its sampler."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    job, train = given.job, given.splits.train
    assert job.max_steps is not None
    batches = _batches(given, 0, 1)
    rows = [int(row) for step in range(job.max_steps) for row in batches.rows_of(step)]
    ids, labels = [train.encoded.row(i).tolist() for i in rows], [int(train.labels[i]) for i in rows]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
    collate = DataCollatorWithPadding(load_tokenizer(given.folder))
    tokens: list[int] = []
    ends: list[float] = []

    def counted(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = collate(features)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    class Stamps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    torch.manual_seed(job.seed)
    model = classification.build_model(given.folder, given.splits.label_names, dropout=job.model.hidden_dropout)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=tempfile.mkdtemp(dir=storage),
            per_device_train_batch_size=job.global_batch_size,
            max_steps=job.max_steps,
            train_sampling_strategy=strategy,
            learning_rate=job.optim.learning_rate,
            weight_decay=job.optim.weight_decay,
            warmup_steps=math.ceil(job.optim.schedule.warmup_ratio * job.max_steps),
            lr_scheduler_type="linear",
            max_grad_norm=job.optim.max_grad_norm,
            bf16=given.bf16,
            use_cpu=True,
            seed=job.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        ),
        train_dataset=dataset,
        data_collator=counted,
        callbacks=[Stamps()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [0.0] + [late - early for early, late in itertools.pairwise(ends)]
    return Curve(losses, tokens[: len(ends)], seconds)


# The comparison


def make_job(
    folder: Path, *, steps: int, workers: int = 1, parallel: str = "ddp", cpus: int | None = None, max_length: int = 64
) -> TrainJob:
    """The example's spec with 32 rows a step in one pass of each worker, one rate for all weights and a small dev split; with the model
    that `write_small_model` has written into `folder`, if it has.

    `cpus` of each worker: its share of the machine's, if not given.
    """
    job = load(TrainJob, SPEC)
    fields: dict[str, Any] = job.model_dump(mode="json") | {
        "max_steps": steps,
        "micro_batch_size": job.global_batch_size // workers,
        "parallel": {"kind": "ddp"} if parallel == "ddp" else {"kind": "deepspeed", "zero_stage": int(parallel[-1])},
        "workers": {"num_workers": workers, "cpus_per_worker": cpus or max(1, cores() // workers)},
        "storage": str(folder),
    }
    small = folder / SMALL
    fields["model"] |= {"max_length": max_length, **({"model_name_or_path": str(small)} if small.exists() else {})}
    fields["data"] |= {"train": str(folder / "train.csv"), "dev": str(folder / "dev.csv"), "test": None, "cache_dir": str(folder / "cache")}
    fields["optim"] |= {"head_learning_rate_multiplier": 1.0}
    fields["evaluation"] |= {"eval_steps": steps, "early_stopping_patience": None}
    fields["checkpoint"] |= {"save_steps": steps}
    return TrainJob.model_validate(fields)


def write_rows(folder: Path, num_rows: int | None) -> None:
    """R8's training rows, or the first `num_rows` of them, as train.csv, 64 of its test rows as dev.csv."""
    import pandas

    from danlu.data.columns import labelled
    from danlu.data.formats import read_rows

    data = load(TrainJob, SPEC).data
    for name, source, number in (("train", data.train, num_rows), ("dev", data.test, 64)):
        assert source is not None
        found = labelled(read_rows(source, format=data.format, max_rows=None, where=name), data.columns, where=name)
        pandas.DataFrame({"text": found.texts, "label": found.labels})[:number].to_csv(folder / f"{name}.csv", index=False)


def write_small_model(folder: Path) -> None:
    """The example's model with one narrow layer of random weights: for a round that measures nothing."""
    from transformers import AutoConfig, AutoModel

    from danlu.artifact.pretrained import model_folder

    whole = model_folder(load(TrainJob, SPEC).model)
    config = AutoConfig.from_pretrained(whole, num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=128)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder / SMALL)
    load_tokenizer(whole).save_pretrained(folder / SMALL)


def check_losses(name: str, curve: Curve, raw: Curve, tolerance: float) -> str:
    """The same losses, step by step, as the raw loop."""
    far = max(abs(mine - theirs) for mine, theirs in zip(curve.losses, raw.losses, strict=True))
    assert far <= tolerance, f"{name}: a loss differs by {far} from the raw loop's: {curve.losses} against {raw.losses}"
    return f"{name} {far:.1e}"


def main() -> None:
    given = options(__doc__, rounds=3)
    sizes = QUICK if given.quick else FULL
    steps = sizes.steps
    torch.set_num_threads(cores())
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        os.chdir(SPEC.parents[2])
        write_rows(folder, sizes.num_rows)
        if given.quick:
            write_small_model(folder)
        one = load_work(make_job(folder, steps=steps))
        start_ray(num_cpus=cores())
        single: dict[str, Callable[[], Curve]] = {
            "Danlu on Ray Train": lambda: danlu_on_ray(one.job, folder),
            "raw PyTorch loop": lambda: raw_loop(one),
            "Danlu in process": lambda: danlu_in_process(one, folder),
            "HF Trainer": lambda: hf_trainer(one, folder, "sequential"),
            "HF Trainer, group_by_length": lambda: hf_trainer(one, folder, "group_by_length"),
        }
        say(f"{steps} steps of 32 rows, {sizes.skip} left out")
        curves = interleave(single, given.rounds)
        long = load_work(make_job(folder, steps=sizes.long_steps, max_length=256))
        whole: dict[str, Callable[[], Curve]] = {
            "Danlu in process, 256 tokens": lambda: danlu_in_process(long, folder),
            "HF Trainer, 256 tokens": lambda: hf_trainer(long, folder, "sequential"),
            "HF Trainer, group_by_length, 256 tokens": lambda: hf_trainer(long, folder, "group_by_length"),
        }
        longs = interleave(whole, max(1, given.rounds - 1))
        pairs: dict[str, list[Curve]] = {}
        if cores() > 1:
            two = {parallel: make_job(folder, steps=steps, workers=2, parallel=parallel) for parallel in ("ddp", "zero2")}
            half = make_job(folder, steps=steps, cpus=cores() // 2)
            contestants: dict[str, Callable[[], Curve]] = {
                "Danlu DDP": lambda: danlu_on_ray(two["ddp"], folder),
                "raw PyTorch DDP": lambda: raw_ddp(two["ddp"], folder),
                "Danlu ZeRO-2": lambda: danlu_on_ray(two["zero2"], folder),
                "Danlu, one such worker": lambda: danlu_on_ray(half, folder),
                "raw PyTorch loop, half the threads": lambda: raw_on_half(load_work(half)),
            }
            pairs = interleave(contestants, max(1, given.rounds - 1))
    finish("train", given, _rows(curves, longs, pairs, sizes), _notes(curves, longs, pairs, one))


def _rows(curves: dict[str, list[Curve]], longs: dict[str, list[Curve]], pairs: dict[str, list[Curve]], sizes: Sizes) -> list[Row]:
    rates = {name: [curve.rate(sizes.skip) for curve in found] for name, found in (curves | pairs).items()}
    rates |= {name: [curve.rate(sizes.long_skip) for curve in found] for name, found in longs.items()}
    ours, *theirs = longs
    against = [
        ("Danlu on Ray Train", "raw PyTorch loop"),
        ("Danlu in process", "raw PyTorch loop"),
        ("Danlu on Ray Train", "HF Trainer"),
        ("Danlu on Ray Train", "HF Trainer, group_by_length"),
        *((ours, other) for other in theirs),
        *([("Danlu DDP", "raw PyTorch DDP"), ("Danlu ZeRO-2", "raw PyTorch DDP")] if pairs else []),
    ]
    rows = [compare(f"training, {name}", "tokens/s", rates[name], rates[other], other) for name, other in against]
    if pairs:
        twice = [2 * rate for rate in rates["Danlu, one such worker"]]
        name, other = "Danlu, one such worker", "raw PyTorch loop, half the threads"
        rows.append(compare("training, Danlu on Ray Train on half the cores", "tokens/s", rates[name], rates[other], other))
        rows.append(compare("training, Danlu DDP on 2 workers", "tokens/s", rates["Danlu DDP"], twice, "twice one worker of that size"))
    return rows


def _notes(curves: dict[str, list[Curve]], longs: dict[str, list[Curve]], pairs: dict[str, list[Curve]], one: Work) -> list[str]:
    raw = curves["raw PyTorch loop"][0]
    rough = 0.1 if one.bf16 else 1e-2
    same = [check_losses(name, curves[name][0], raw, rough) for name in ("Danlu on Ray Train", "Danlu in process", "HF Trainer")]
    same += [check_losses(name, found[0], raw, rough) for name, found in pairs.items()]
    ours, trainer, _ = longs.values()
    long = check_losses("Danlu in process", ours[0], trainer[0], rough)
    means = [f"{name} {statistics.mean(curve[0].losses[-5:]):.3f}" for name, curve in curves.items()]
    return [
        f"{'bf16 autocast (ZeRO-2: bf16 weights, float32 masters)' if one.bf16 else 'float32'}, the same seed and learning rates",
        f"largest difference of a step's loss from the raw loop's: {', '.join(same)}",
        f"at 256 tokens, from the HF Trainer's: {long}",
        f"mean loss of the last 5 steps: {', '.join(means)}",
    ]


if __name__ == "__main__":
    main()
