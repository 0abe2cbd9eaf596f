"""What a job will take, before anything starts: parameters, memory, steps, time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from danlu.artifact.pretrained import Weight, weight_shapes
from danlu.artifact.trainable import check_prompt_fits, is_embedding, num_layers, num_trainable, targets
from danlu.errors import ModelError, SpecError
from danlu.spec.parallel import DeepSpeed
from danlu.spec.train import TrainJob
from danlu.spec.tuning import Adalora, Full, Qlora, VirtualTokens

EFFICIENCY = 0.55
"""Share of the measured matrix speed that a packed encoder's training step reaches on a CPU; measured on MiniLM."""

GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Numbers for one job. Memory is per worker; `expected_s` is None where the machine's speed is not known."""

    num_parameters: int
    num_trainable: int
    precision: str
    precision_note: str
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    num_steps: int
    tokens_per_step: float
    expected_s: float | None
    expected_note: str
    checkpoint_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def worker_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self) | {"worker_bytes": self.worker_bytes}

    def text(self, job: TrainJob) -> str:
        """For the terminal."""
        batch = (
            f"{job.global_batch_size} = {job.micro_batch_size} x {job.accumulation_steps} accumulation x {job.workers.num_workers} workers"
        )
        spread = f"DeepSpeed ZeRO-{job.parallel.zero_stage}" if isinstance(job.parallel, DeepSpeed) else "DDP"
        expected = "unknown" if self.expected_s is None else f"about {duration(self.expected_s)}"
        lines = [
            ("model", f"{job.model.model_name_or_path}"),
            ("parameters", f"{self.num_parameters:,}, of which trained {self.num_trainable:,} ({job.tuning.kind})"),
            ("workers", f"{job.workers.num_workers} x {job.workers.cpus_per_worker} cores, {job.workers.gpus_per_worker} GPUs; {spread}"),
            ("precision", f"{self.precision} ({self.precision_note})"),
            ("batch", batch),
            (
                "memory a worker",
                f"{gib(self.worker_bytes)}: weights {gib(self.weight_bytes)}, gradients {gib(self.gradient_bytes)}, "
                f"optimizer {gib(self.optimizer_bytes)}, activations about {gib(self.activation_bytes)}",
            ),
            ("steps", f"{self.num_steps} of about {self.tokens_per_step:,.0f} tokens"),
            ("time", f"{expected} ({self.expected_note})"),
            ("disk", f"{gib(self.checkpoint_bytes)} for checkpoints and best weights"),
        ]
        text = "\n".join(f"  {name:<16} {value}" for name, value in lines)
        return text + "".join(f"\n  warning: {warning}" for warning in self.warnings)


def make_plan(job: TrainJob, folder: Path, *, num_rows: int, mean_tokens: float, num_labels: int, calibrate: bool = True) -> Plan:
    """The plan of `job` for a model folder and `num_rows` training rows of `mean_tokens` tokens each.

    `calibrate` takes a third of a second to measure this machine's matrix speed.
    """
    config = json.loads((folder / "config.json").read_text())
    shapes = weight_shapes(folder)
    if shapes is None:
        raise ModelError(
            f"{folder} has no safetensors weights, so the plan cannot count its parameters",
            where="model.model_name_or_path",
            fix="save it again with model.save_pretrained(folder, safe_serialization=True)",
        )
    hidden = int(config.get("hidden_size") or config.get("dim") or 0)
    num_parameters = sum(w.num_elements for name, w in shapes.items() if not name.endswith("position_ids")) + (hidden + 1) * num_labels
    embeddings = sum(w.num_elements for name, w in shapes.items() if is_embedding(name))
    trainable = num_trainable(job.tuning, shapes, config, head=(hidden + 1) * num_labels)
    bf16, note = _precision(job)
    sharded, stage = (job.workers.num_workers, job.parallel.zero_stage) if isinstance(job.parallel, DeepSpeed) else (1, 0)
    element = 2 if bf16 and stage else 4
    tokens_per_step = mean_tokens * job.global_batch_size
    layers = num_layers(config)
    tokens_at_once = mean_tokens * job.micro_batch_size
    steps = job.max_steps or max(1, math.ceil(job.num_train_epochs * num_rows / job.global_batch_size))
    if isinstance(job.tuning, Adalora) and job.tuning.tinit + job.tuning.tfinal >= steps:
        raise SpecError(
            f"tinit={job.tuning.tinit} and tfinal={job.tuning.tfinal} leave none of the {steps} steps to move ranks in",
            where="tuning.tfinal",
            fix="lower them, or train longer",
        )
    if isinstance(job.tuning, VirtualTokens):
        check_prompt_fits(job.tuning, config, job.model.max_length)
    multiplied = num_parameters - embeddings
    # Forward 2, backward through activations 2 and through trained weights 2 operations per multiplied parameter and token.
    backward = 4 if isinstance(job.tuning, Full) else 2
    operations = steps * tokens_per_step * multiplied * (2 + backward)
    speed = _matmul_per_second(bf16, job.workers.num_workers * job.workers.cpus_per_worker) if calibrate else None
    expected, expected_note = (None, "not measured") if speed is None else (operations / speed / EFFICIENCY, _speed_note(speed))
    masters = 4 if element == 2 else 0
    return Plan(
        num_parameters=num_parameters,
        num_trainable=trainable,
        precision="bf16" if bf16 else "fp32",
        precision_note=note,
        weight_bytes=int(_bytes_per_weight(job, shapes, num_parameters, element) * num_parameters) // (sharded if stage >= 3 else 1),
        gradient_bytes=element * trainable // (sharded if stage >= 2 else 1),
        optimizer_bytes=(8 + masters) * trainable // (sharded if stage >= 1 else 1),
        # About 34 numbers of the hidden size per token and layer (https://arxiv.org/abs/2205.05198, without the attention scores).
        activation_bytes=int(34 * hidden * layers * tokens_at_once * (2 if bf16 else 4) / 2),
        num_steps=steps,
        tokens_per_step=tokens_per_step,
        expected_s=expected,
        expected_note=expected_note,
        checkpoint_bytes=job.checkpoint.save_total_limit * 12 * trainable + 4 * num_parameters,
        warnings=_warnings(job, bf16, note, steps),
    )


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 5400:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / (1 << 20):.0f} MiB"


def _bytes_per_weight(job: TrainJob, shapes: Mapping[str, Weight], num_parameters: int, element: int) -> float:
    """On average: a quantized base holds its linear layers in fewer bits."""
    if not isinstance(job.tuning, Qlora):
        return element
    small = sum(rows * columns for rows, columns in targets(shapes, "all-linear").values())
    return (small * job.tuning.bits / 8 + (num_parameters - small) * element) / num_parameters


def _precision(job: TrainJob) -> tuple[bool, str]:
    from danlu.tasks.device import has_native_bf16, pick_device

    native = has_native_bf16(pick_device(job.workers.gpus_per_worker))
    match job.precision:
        case "fp32":
            return False, "as the spec says"
        case "bf16":
            return True, "as the spec says" if native else "as the spec says; this machine has no native bf16"
        case "auto":
            return native, "auto: this machine multiplies bf16 natively" if native else "auto: this machine has no native bf16"


def _matmul_per_second(bf16: bool, num_threads: int) -> float:
    """Operations per second of a matrix product of an encoder's size, best of a few."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads))
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = torch.randn(1024, 384, dtype=dtype), torch.randn(384, 1536, dtype=dtype)
    best, until = math.inf, time.perf_counter() + 0.3
    while time.perf_counter() < until:
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2 * 1024 * 384 * 1536 / best


def _speed_note(speed: float) -> str:
    return f"from {speed / 1e9:,.0f} GFLOP/s measured here now, at {EFFICIENCY:.0%} of it"


def _warnings(job: TrainJob, bf16: bool, note: str, steps: int) -> tuple[str, ...]:
    found = []
    if bf16 and "no native" in note:
        found.append("precision: bf16 is several times slower than fp32 on this machine; precision: auto takes the faster one")
    if job.evaluation.eval_steps and job.evaluation.eval_steps > steps:
        found.append(
            f"evaluation.eval_steps={job.evaluation.eval_steps} is more than the {steps} steps: the dev split is scored only at the end"
        )
    if job.checkpoint.save_steps and job.checkpoint.save_steps > steps:
        found.append(f"checkpoint.save_steps={job.checkpoint.save_steps} is more than the {steps} steps: one checkpoint, at the end")
    return tuple(found)
