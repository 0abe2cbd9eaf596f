"""What a job will take, before anything starts: parameters, memory, steps, time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from danlu.artifact.pretrained import Weight
from danlu.artifact.trainable import (
    HEADS,
    LAYER,
    check_adapter_can_be_stored,
    check_head_rate,
    check_prompt_fits,
    is_embedding,
    new_parameters,
    num_layers,
    num_trainable,
    targets,
)
from danlu.errors import SpecError
from danlu.spec.optim import Adafactor, AdamW, BnbAdamW, Lion, Optim
from danlu.spec.parallel import Ddp, DeepSpeed, Fsdp, GPipe, Interleaved1F1B, Pipeline, Tensor
from danlu.spec.task import EncoderTask
from danlu.spec.train import TrainJob
from danlu.spec.tuning import Adalora, Full, Qlora, VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EFFICIENCY = 0.55
"""Share of the measured matrix speed that a packed encoder's training step reaches on a CPU; measured on MiniLM."""

GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Numbers for one job. Memory is per worker, `offloaded_bytes` of it outside the memory of what it computes on; `expected_s` is None
    where the machine's speed is not known.
    """

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
    offloaded_bytes: int = 0
    offloaded_to: str = ""
    nvme_bytes: int = 0
    """On each worker's drive: what is offloaded there, and the gradients of the step."""
    warnings: tuple[str, ...] = ()

    @property
    def worker_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes - self.offloaded_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self) | {"worker_bytes": self.worker_bytes}

    def text(self, job: TrainJob) -> str:
        """For the terminal."""
        read_by = "workers" if job.parallel.workers_per_model == 1 else "groups of workers"
        batch = f"{job.global_batch_size} = {job.micro_batch_size} x {job.accumulation_steps} accumulation x {job.num_models} {read_by}"
        offloaded = f"; of these {gib(self.offloaded_bytes)} in {self.offloaded_to}" if self.offloaded_bytes else ""
        expected = "unknown" if self.expected_s is None else f"about {duration(self.expected_s)}"
        workers = job.workers
        lines = [
            ("model", f"{job.model.model_name_or_path}"),
            ("parameters", f"{self.num_parameters:,}, of which trained {self.num_trainable:,} ({job.tuning.kind})"),
            (
                "workers",
                f"{workers.num_workers} x {workers.cpus_per_worker} cores, {workers.gpus_per_worker} GPUs; {_spread_name(job)}",
            ),
            ("precision", f"{self.precision} ({self.precision_note})"),
            ("batch", batch),
            (
                "memory a worker",
                f"{gib(self.worker_bytes)}: weights {gib(self.weight_bytes)}, gradients {gib(self.gradient_bytes)}, "
                f"optimizer {gib(self.optimizer_bytes)}, activations about {gib(self.activation_bytes)}{offloaded}",
            ),
            ("steps", f"{self.num_steps} of about {self.tokens_per_step:,.0f} tokens"),
            ("time", f"{expected} ({self.expected_note})"),
            ("disk", f"{gib(self.checkpoint_bytes)} for checkpoints and best weights"),
        ]
        if isinstance(job.parallel, DeepSpeed) and job.parallel.uses_nvme:
            lines.append(("nvme a worker", f"{gib(self.nvme_bytes)} in {job.parallel.nvme_path}, as long as it trains"))
        text = "\n".join(f"  {name:<16} {value}" for name, value in lines)
        return text + "".join(f"\n  warning: {warning}" for warning in self.warnings)


def make_plan(job: TrainJob, folder: Path, *, num_rows: int, mean_tokens: float, num_labels: int, calibrate: bool = True) -> Plan:
    """The plan of `job` for a model folder and `num_rows` training rows of `mean_tokens` tokens each.

    `calibrate` takes a third of a second to measure this machine's matrix speed.
    """
    from danlu.tasks.packed import num_positions
    from danlu.tasks.task import task_file

    task = task_file(job.task)
    model = task.skeleton(folder, num_labels)
    config = model.config.to_dict()
    shapes = {name: Weight(tuple(parameter.shape), "F32") for name, parameter in model.named_parameters()}
    head = _head_names(model) | (new := new_parameters(folder, task.head_parameters(model), model.base_model_prefix))
    check_head_rate(job.tuning, job.optim, head)
    num_parameters = sum(weight.num_elements for weight in shapes.values())
    embeddings = sum(weight.num_elements for name, weight in shapes.items() if is_embedding(name))
    body = {name: weight for name, weight in shapes.items() if name not in head}
    trainable = num_trainable(job.tuning, body, config, head=sum(shapes[name].num_elements for name in head))
    precision, note = _precision(job)
    half = precision != "fp32"
    tokens_per_step = mean_tokens * job.global_batch_size
    hidden, layers = int(model.config.hidden_size), num_layers(config)
    tokens_at_once = mean_tokens * job.micro_batch_size
    steps = job.max_steps or max(1, math.ceil(job.num_train_epochs * num_rows / job.global_batch_size))
    if isinstance(job.tuning, Adalora) and job.tuning.tinit + job.tuning.tfinal >= steps:
        raise SpecError(
            f"tinit={job.tuning.tinit} and tfinal={job.tuning.tfinal} leave none of the {steps} steps to move ranks in",
            where="tuning.tfinal",
            fix="lower them, or train longer",
        )
    if (room := num_positions(model)) is not None and job.model.max_length > room:
        raise SpecError(
            f"model.max_length={job.model.max_length} is longer than the {room} positions that {job.model.model_name_or_path} knows",
            where="model.max_length",
            fix=f"model.max_length={room}",
        )
    if isinstance(job.tuning, VirtualTokens):
        check_prompt_fits(job.tuning, config, job.model.max_length)
    # A language model's output layer multiplies, also where it is the embeddings over again.
    output, embedded = model.get_output_embeddings(), model.get_input_embeddings()
    tied = output is not None and output.weight is embedded.weight
    shared = [name for name, module in model.named_modules() if tied and (module is output or module is embedded)]
    check_adapter_can_be_stored(job.tuning, body, shared, () if isinstance(job.task, EncoderTask) else new)
    if isinstance(job.parallel, Pipeline):
        try:
            job.parallel.layers_of_stages(layers)
        except ValueError as error:
            raise SpecError(f"{error}", where="parallel.pipeline_parallel_size") from error
    multiplied = num_parameters - (0 if tied else embeddings)
    # Forward 2, backward through activations 2 and through trained weights 2 operations per multiplied parameter and token.
    backward = 4 if isinstance(job.tuning, Full) else 2
    operations = steps * tokens_per_step * multiplied * (2 + backward)
    speed = _matmul_per_second(precision, job.workers.num_workers * job.workers.cpus_per_worker) if calibrate else None
    expected, expected_note = (None, "not measured") if speed is None else (operations / speed / EFFICIENCY, _speed_note(speed))
    behind = sum(weight.num_elements for name, weight in shapes.items() if not (is_embedding(name) or LAYER.search(name)))
    # DeepSpeed swaps shards from 1 MiB on.
    large = [n for n in (weight.num_elements for weight in shapes.values()) if 4 * n >= job.workers.num_workers << 20]
    numbers = _Numbers(num_parameters, trainable, embeddings, behind, layers, tied, sum(large), max(large, default=0))
    held = _held(job, half, numbers)
    return Plan(
        num_parameters=num_parameters,
        num_trainable=trainable,
        precision=precision,
        precision_note=note,
        weight_bytes=round(held.weights * _smaller(job, body, num_parameters, 2 if half and job.parallel.kind == "deepspeed" else 4)),
        gradient_bytes=held.gradients,
        optimizer_bytes=held.optimizer,
        activation_bytes=int(_held_of_a_layer(job, layers) * hidden * layers * tokens_at_once * (2 if half else 4) / 2 * _passes_held(job)),
        num_steps=steps,
        tokens_per_step=tokens_per_step,
        expected_s=expected,
        expected_note=expected_note,
        checkpoint_bytes=job.checkpoint.save_total_limit * (12 if job.optim.ema_decay is None else 16) * trainable + 4 * num_parameters,
        offloaded_bytes=held.offloaded,
        offloaded_to=held.offloaded_to if held.offloaded else "",
        nvme_bytes=held.on_nvme,
        warnings=_warnings(job, precision, note, steps),
    )


def _optimizer_bytes(optim: Optim) -> float:
    """Of one trained weight's state and average; what goes by rows and columns or by blocks is too little to count."""
    average = 0 if optim.ema_decay is None else 4
    match optim.optimizer:
        case AdamW():
            return average + 8
        case BnbAdamW() | Lion() as optimizer:
            return average + optimizer.bits / (4 if isinstance(optimizer, BnbAdamW) else 8)
        case Adafactor():
            return average


@dataclass(frozen=True)
class _Held:
    """Bytes of one worker."""

    weights: int
    gradients: int
    optimizer: int
    offloaded: int = 0
    offloaded_to: str = ""
    on_nvme: int = 0


@dataclass(frozen=True)
class _Numbers:
    """How many there are in a model; `behind` its layers stand the last norm and the head, which may be the embeddings over again."""

    everything: int
    trainable: int
    embeddings: int
    behind: int
    layers: int
    tied: bool
    swappable: int = 0
    """Those of the weights whose shards DeepSpeed can keep on NVMe, the largest of which has `largest`."""
    largest: int = 0


def _held(job: TrainJob, half: bool, numbers: _Numbers) -> _Held:
    """What a worker holds besides activations: the optimizer's state, and float32 masters where the weights are in 16 bits."""
    everything, trainable, embeddings, layers = numbers.everything, numbers.trainable, numbers.embeddings, numbers.layers
    n, on_gpu, state = job.workers.num_workers, job.workers.gpus_per_worker > 0, _optimizer_bytes(job.optim)
    match job.parallel:
        case Ddp():
            return _Held(4 * everything, 4 * trainable, round(state * trainable))
        case DeepSpeed() as zero:
            # What is updated in host memory is a copy, also in float32.
            element, masters = (2, 4) if half else (4, 4 if zero.offload_optimizer == "nvme" else 0)
            weights = element * everything // (n if zero.zero_stage >= 3 else 1)
            gradients = element * trainable // (n if zero.zero_stage >= 2 else 1)
            optimizer = round((state + masters) * trainable) // n
            share = numbers.swappable / everything
            swapped = {"optimizer": round(optimizer * share), "weights": round(weights * share)}
            # Host memory keeps what is too small to swap, and the buffers: four of the largest shard, or five for parameters.
            kept = {"optimizer": 16 * numbers.largest // n, "weights": 5 * element * numbers.largest // n}

            def outside(device: str, what: str, size: int) -> int:
                if device == "nvme" and not on_gpu:
                    return max(0, swapped[what] - kept[what])
                return size if device != "none" and on_gpu else 0

            offloaded = outside(zero.offload_optimizer, "optimizer", optimizer) + outside(zero.offload_param, "weights", weights)
            on_disk = (swapped["optimizer"] + round(4 * trainable * share) // n) if zero.offload_optimizer == "nvme" else 0
            on_disk += swapped["weights"] if zero.offload_param == "nvme" else 0
            places = {"cpu": "host memory", "nvme": f"{zero.nvme_path}"}
            used = [name for device, name in places.items() if device in (zero.offload_optimizer, zero.offload_param)]
            return _Held(weights, gradients, optimizer, offloaded, " and ".join(used), on_disk)
        case Fsdp() as fsdp:
            # The embeddings, and one layer or all, are gathered whole while they are used.
            gathered = embeddings + (everything - embeddings) // max(1, layers) if fsdp.reshard_after_forward else everything
            shards, gradients, optimizer = 4 * everything // n, 4 * trainable // n, round(state * trainable) // n
            offloaded = shards + gradients + optimizer if fsdp.cpu_offload and on_gpu else 0
            return _Held(shards + (2 if half else 4) * gathered, gradients, optimizer, offloaded, "host memory")
        case Tensor() as tensor:
            # Norms are too small to count; the embeddings, and with them a tied head, stand whole on every worker.
            split = max(0, everything - embeddings), max(0, trainable - (embeddings if trainable == everything else 0))
            held, learned = everything - split[0] + split[0] // tensor.tensor_parallel_size, trainable - split[1]
            learned += split[1] // tensor.tensor_parallel_size
            return _Held(4 * held, 4 * learned, round(state * learned) // (job.num_models if tensor.zero_stage else 1))
        case Pipeline() as pipe:
            held, learned = _largest_part(pipe, numbers)
            return _Held(4 * held, 4 * learned, round(state * learned) // (job.num_models if pipe.zero_stage else 1))


def _largest_part(pipe: Pipeline, numbers: _Numbers) -> tuple[int, int]:
    """Numbers on the pipeline rank that holds most, and how many of them are trained."""
    of_layers = (numbers.everything - numbers.embeddings - numbers.behind) // max(1, numbers.layers)
    frozen = 0 if numbers.trainable == numbers.everything else numbers.embeddings
    found = []
    for rank in range(pipe.pipeline_parallel_size):
        its = pipe.layers_of_stages(numbers.layers)[rank :: pipe.pipeline_parallel_size]
        inside = sum(len(stage) for stage in its) * of_layers // pipe.tensor_parallel_size
        first, last = rank == 0, rank == pipe.pipeline_parallel_size - 1
        whole = numbers.embeddings if first or (last and numbers.tied) else 0
        held = inside + whole + (numbers.behind if last else 0)
        found.append((held, min(numbers.trainable, held - (frozen if whole else 0))))
    return max(found)


def _held_of_a_layer(job: TrainJob, layers: int) -> float:
    """Bytes of activations for each number of a token's hidden state, in 16 bits (https://arxiv.org/abs/2205.05198, without the attention
    scores): all of a layer's, or with checkpointing its input, and of one layer the rest while it is computed again."""
    return 2 + 34 / layers if job.model.gradient_checkpointing else 34


def _passes_held(job: TrainJob) -> float:
    """Activations a worker holds, in those of one pass through all layers."""
    match job.parallel:
        case Pipeline() as pipe:
            size = pipe.pipeline_parallel_size
            match pipe.schedule:
                case GPipe():
                    return job.accumulation_steps / size
                case Interleaved1F1B() as interleaved:
                    return 1 + (size - 1) / (size * interleaved.stages_per_worker)  # section 2.2 of the paper
        case Ddp() | DeepSpeed() | Fsdp() as data:
            return 1 / data.context_parallel_size
    return 1.0


def _spread_name(job: TrainJob) -> str:
    match job.parallel:
        case Ddp() | DeepSpeed() | Fsdp() as data:
            name = "DDP" if isinstance(data, Ddp) else "FSDP" if isinstance(data, Fsdp) else f"DeepSpeed ZeRO-{data.zero_stage}"
            return name + (f", context parallel over {data.context_parallel_size}" if data.context_parallel_size > 1 else "")
        case Tensor() as tensor:
            return f"tensor parallel over {tensor.tensor_parallel_size}{', ZeRO-1' if tensor.zero_stage else ''}"
        case Pipeline() as pipe:
            split = f" x tensor parallel over {pipe.tensor_parallel_size}" if pipe.tensor_parallel_size > 1 else ""
            return f"{pipe.num_stages} pipeline stages over {pipe.pipeline_parallel_size}{split}{', ZeRO-1' if pipe.zero_stage else ''}"


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _head_names(model: PreTrainedModel) -> set[str]:
    """Parameters of the task's head, which adapters train whole: PEFT finds it by these endings (its SEQ_CLS_HEAD_NAMES)."""
    heads = {name for name, _ in model.named_modules() if name.endswith(HEADS)}
    return {name for name, _ in model.named_parameters() if any(name.startswith(f"{head}.") for head in heads)}


def _smaller(job: TrainJob, shapes: Mapping[str, Weight], num_parameters: int, element: int) -> float:
    """Size of the weights as a share of what they are in full: a quantized base holds its linear layers in fewer bits."""
    if not isinstance(job.tuning, Qlora):
        return 1.0
    small = sum(rows * columns for rows, columns in targets(shapes, "all-linear").values())
    return (small * job.tuning.bits / 8 + (num_parameters - small) * element) / (num_parameters * element)


def _precision(job: TrainJob) -> tuple[Literal["fp32", "bf16", "fp16"], str]:
    from danlu.tasks.device import has_native_bf16, pick_device

    native = has_native_bf16(pick_device(job.workers.gpus_per_worker))
    match job.precision:
        case "fp32":
            return "fp32", "as the spec says"
        case "fp16":
            return "fp16", "as the spec says; with a dynamic loss scale"
        case "bf16":
            return "bf16", "as the spec says" if native else "as the spec says; this machine has no native bf16"
        case "auto":
            note = "auto: this machine multiplies bf16 natively" if native else "auto: this machine has no native bf16"
            return "bf16" if native else "fp32", note


def _matmul_per_second(precision: str, num_threads: int) -> float:
    """Operations per second that this many of the machine's threads reach."""
    import torch

    from danlu.tasks.device import matmul_per_second

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    speed = matmul_per_second(torch.device("cpu"), dtype=dtype)
    torch.set_num_threads(before)
    return speed


def _speed_note(speed: float) -> str:
    return f"from {speed / 1e9:,.0f} GFLOP/s measured here now, at {EFFICIENCY:.0%} of it"


def _warnings(job: TrainJob, precision: str, note: str, steps: int) -> tuple[str, ...]:
    found = []
    if precision == "fp16" and not job.workers.gpus_per_worker:
        found.append("precision: fp16 is several times slower than fp32 on a CPU; precision: auto takes what is fastest")
    if precision == "bf16" and "no native" in note:
        found.append("precision: bf16 is several times slower than fp32 on this machine; precision: auto takes the faster one")
    if job.evaluation.eval_steps and job.evaluation.eval_steps > steps:
        found.append(
            f"evaluation.eval_steps={job.evaluation.eval_steps} is more than the {steps} steps: the dev split is scored only at the end"
        )
    if job.checkpoint.save_steps and job.checkpoint.save_steps > steps:
        found.append(f"checkpoint.save_steps={job.checkpoint.save_steps} is more than the {steps} steps: one checkpoint, at the end")
    return tuple(found)
