"""Training a decoder on rows of skewed lengths: Danlu's packed batches against padded ones, by hand, by the HF Trainer and by TRL's.

A Qwen3-shaped model of 8 layers of 512 from its config, 8 rows a step, lengths lognormal between 8 and 512 tokens, the same rows in
the same steps for everybody (the length-grouped Trainer draws its own order of them). Each contestant is a process of its own;
start-up and the first steps are left out. Tokens are those of the rows, padding not counted; memory is the process's peak. TRL is
installed once beside the environment (.cache/bench/trl); where it cannot be had, its rows are missing.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, Row, compare, cores, finish, interleave, options, say

SKIP = 4
PROFILE = "profile"
TRL = "1.16.0"
TRL_FOLDER = ROOT / ".cache/bench/trl"
VOCABULARY = 8000
ROWS_A_STEP = 8


@dataclass(frozen=True)
class Curve:
    """One contestant's run."""

    losses: list[float]
    tokens: list[int]
    seconds: list[float]
    peak_gb: float

    @property
    def rate(self) -> float:
        """Tokens per second without the first steps."""
        return sum(self.tokens[SKIP:]) / sum(self.seconds[SKIP:])


def write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w0", eos_token="w1").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1536,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def rows_of(steps: int, seed: int) -> Any:
    """`steps` batches of rows with a structure that can be learned, as Encoded."""
    import numpy as np

    from danlu.data.encode import Encoded

    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(mean=4.4, sigma=1.0, size=steps * ROWS_A_STEP).astype(int), 8, 512)
    # Each token is the one before plus one of two steps: half a bit a token can be learned.
    rows = [(draw.integers(2, VOCABULARY) + np.cumsum(draw.choice([1, 7], size=n))) % (VOCABULARY - 2) + 2 for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(np.concatenate(rows).astype(np.int32), offsets, np.zeros(len(rows), dtype=bool))


@dataclass(frozen=True)
class Work:
    """What every contestant is given. `order[step]` are the rows of a step."""

    job: Any
    folder: Path
    encoded: Any
    order: list[list[int]]
    bf16: bool


def load_work(folder: Path, steps: int, seed: int) -> Work:
    import torch

    from danlu.data.pack import Batches
    from danlu.spec.train import TrainJob
    from danlu.tasks.device import has_native_bf16

    bf16 = has_native_bf16(torch.device("cpu"))
    job = TrainJob.model_validate(
        {
            "name": "decoder",
            "model": {"model_name_or_path": str(folder), "max_length": 512},
            "data": {"train": "unused"},
            "task": {"kind": "pretrain"},
            "optim": {"learning_rate": 3e-4, "weight_decay": 0.01, "schedule": {"kind": "linear", "warmup_ratio": 0.1}},
            "precision": "bf16" if bf16 else "fp32",
            "global_batch_size": ROWS_A_STEP,
            "micro_batch_size": ROWS_A_STEP,
            "max_steps": steps,
            "workers": {"cpus_per_worker": cores()},
            "evaluation": {"eval_steps": steps},
            "checkpoint": {"save_steps": steps},
            "seed": seed,
        }
    )
    encoded = rows_of(steps, seed)
    batches = Batches(encoded, None, global_batch_size=ROWS_A_STEP, micro_batch_size=ROWS_A_STEP, rank=0, world_size=1, seed=seed)
    return Work(job, folder, encoded, [batches.rows_of(step).tolist() for step in range(steps)], bf16)


def danlu(given: Work) -> tuple[list[float], list[int], list[float]]:
    import torch

    from danlu.data.columns import Labelled
    from danlu.data.report import DataReport
    from danlu.tasks.rows import Split, Splits
    from danlu.tasks.tokenizer import load_tokenizer
    from danlu.train.loop import train
    from danlu.train.run import LocalRun, StepRecord

    split = Split(given.encoded, None, Labelled([], None, None, [], {}))
    dev = Split(given.encoded.take(range(8)), None, Labelled([], None, None, [], {}))
    splits = Splits(split, dev, None, [], DataReport({}, 512, ()))
    run = LocalRun(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        train(given.job, splits, given.folder, load_tokenizer(given.folder), run, folder)
    steps = [record for record in run.records if isinstance(record, StepRecord)]
    return [step.loss for step in steps], [step.tokens for step in steps], [step.step_seconds for step in steps]


def raw_padded(given: Work) -> tuple[list[float], list[int], list[float]]:
    """What one writes by hand: pad to the longest of the batch, transformers' own loss, autocast, clip, fused AdamW."""
    import numpy as np
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    from danlu.train.optim import learning_rate_at

    model = AutoModelForCausalLM.from_pretrained(given.folder).train()
    groups = [{"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, fused=True)
    rate_at = learning_rate_at(given.job.optim, len(given.order))
    losses, tokens, seconds = [], [], []
    began = time.perf_counter()
    for step, indices in enumerate(given.order):
        rows = [torch.from_numpy(given.encoded.row(i).astype(np.int64)) for i in indices]
        ids, mask = pad_sequence(rows, batch_first=True), pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        tokens.append(sum(map(len, rows)))
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    return losses, tokens, seconds


def hf_trainer(given: Work, strategy: str) -> tuple[list[float], list[int], list[float]]:
    """Transformers' Trainer with a collator that pads to the longest row of a batch."""
    import torch
    from transformers import Trainer, TrainingArguments

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(feature["input_ids"]) for feature in features]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}

    return _with_trainer(given, Trainer, TrainingArguments, collate, train_sampling_strategy=strategy)


def trl_trainer(given: Work) -> tuple[list[float], list[int], list[float]]:
    """TRL's SFTTrainer as it comes: its own collator and loss."""
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    settings = {"max_length": 512, "gradient_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return _with_trainer(given, SFTTrainer, SFTConfig, collate, train_sampling_strategy="sequential", **settings)


def _with_trainer(
    given: Work, trainer_class: Any, arguments_class: Any, collate: Callable[..., Any], **settings: Any
) -> tuple[list[float], list[int], list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

    rows = [given.encoded.row(i).tolist() for indices in given.order for i in indices]
    tokens: list[int] = []
    ends: list[float] = []

    def counted(features: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(feature["input_ids"]) for feature in features))
        return collate(features)

    class Stamps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(given.folder),
            arguments_class(
                output_dir=folder,
                per_device_train_batch_size=ROWS_A_STEP,
                max_steps=len(given.order),
                learning_rate=given.job.optim.learning_rate,
                weight_decay=0.01,
                warmup_steps=math.ceil(0.1 * len(given.order)),
                lr_scheduler_type="linear",
                max_grad_norm=1.0,
                bf16=given.bf16,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1,
                **settings,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=AutoTokenizer.from_pretrained(given.folder),
            data_collator=counted,
            callbacks=[Stamps()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, tokens[: len(ends)], [0.0] + [late - early for early, late in itertools.pairwise(ends)]


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::", "aten::mkldnn"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention"),
    "optimizer and clipping": ("aten::_fused_adamw", "aten::_foreach"),
    "softmax of the loss": ("aten::_log_softmax", "aten::nll", "aten::logsumexp", "aten::exp", "aten::gather", "aten::scatter"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::clone"),
}


def profile(given: Work) -> str:
    """Where Danlu's steps spend their time: shares of the profiler's own CPU time by kind of operation."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        danlu(given)
    spent = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "everything else")
        spent[kind] += event.self_cpu_time_total
    return ", ".join(f"{kind} {seconds / sum(spent.values()):.0%}" for kind, seconds in sorted(spent.items(), key=lambda item: -item[1]))


CONTESTANTS: dict[str, Callable[[Work], tuple[list[float], list[int], list[float]]]] = {
    "Danlu, packed": danlu,
    "raw PyTorch loop, padded": raw_padded,
    "HF Trainer": lambda given: hf_trainer(given, "sequential"),
    "HF Trainer, group_by_length": lambda given: hf_trainer(given, "group_by_length"),
    "TRL SFTTrainer": trl_trainer,
}


def alone(name: str, folder: Path, steps: int, seed: int) -> Any:
    """What a contestant prints, from a process of its own."""
    command = [sys.executable, __file__, "--contestant", name, str(folder), str(steps), str(seed)]
    paths = [str(TRL_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])] if name.startswith("TRL") else []
    environment = os.environ | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def present() -> list[str]:
    """The contestants of this machine; TRL is fetched if it is missing."""
    if not (TRL_FOLDER / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TRL_FOLDER), f"trl=={TRL}"]
        if subprocess.run(command).returncode:
            say("TRL cannot be installed here: it is left out")
    return [name for name in CONTESTANTS if not name.startswith("TRL") or (TRL_FOLDER / "trl").is_dir()]


def contestant(name: str, folder: str, steps: str, seed: str) -> None:
    import torch

    torch.set_num_threads(cores())
    given = load_work(Path(folder), int(steps), int(seed))
    if name == PROFILE:
        print(json.dumps(profile(given)))
        return
    losses, tokens, seconds = CONTESTANTS[name](given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"losses": losses, "tokens": tokens, "seconds": seconds, "peak_gb": peak}))


def main() -> None:
    given = options(__doc__, rounds=3)
    steps = SKIP + 2 if given.quick else 24
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        write_model(folder)
        say(f"{steps} steps of {ROWS_A_STEP} rows, {SKIP} left out")
        names = present()
        turns: dict[str, int] = dict.fromkeys(names, 0)

        def run(name: str) -> Curve:
            turns[name] += 1
            return Curve(**alone(name, folder, steps, seed=turns[name]))

        curves = interleave({name: (lambda name=name: run(name)) for name in names}, given.rounds)
        spent = alone(PROFILE, folder, SKIP + 2, seed=1)
    ours = curves["Danlu, packed"]
    rows: list[Row] = []
    for name in names[1:]:
        rows.append(compare("training a decoder", "tokens/s", [c.rate for c in ours], [c.rate for c in curves[name]], name))
    for name in names[1:]:
        peaks = [curve.peak_gb for curve in curves[name]]
        rows.append(compare("peak memory", "GB", [c.peak_gb for c in ours], peaks, name, less_is_better=True))
    far = max(
        abs(mine - theirs)
        for one, other in zip(ours, curves["raw PyTorch loop, padded"], strict=True)
        for mine, theirs in zip(one.losses, other.losses, strict=True)
    )
    assert far < 0.1, f"a loss differs by {far} from the raw loop's"
    last = {name: statistics.mean(loss for curve in found for loss in curve.losses[-4:]) for name, found in curves.items()}
    notes = [
        f"largest difference of a step's loss from the raw loop's on the same rows: {far:.1e}",
        f"where Danlu's time goes: {spent}",
        f"mean loss of the last 4 steps: {', '.join(f'{name} {value:.3f}' for name, value in last.items())}",
    ]
    finish("decoder", given, rows, notes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        contestant(*sys.argv[2:6])
    else:
        main()
