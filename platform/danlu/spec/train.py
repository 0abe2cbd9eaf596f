"""What a fine-tuning job is. Pure data: imports nothing heavier than pydantic."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import DnsLabel, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from danlu.spec.compress import Compress
from danlu.spec.data import Data
from danlu.spec.model import Model
from danlu.spec.parallel import Ddp, DeepSpeed, Parallel, Workers
from danlu.spec.serve import ServeAfterTraining, Service
from danlu.spec.task import METRICS, Classification, Task
from danlu.spec.tuning import Adalora, Full, Tuning, VirtualTokens, is_merged


class Schedule(Spec):
    """Learning rate over the steps: linear warm-up to the peak, then this shape down to zero (`constant` stays)."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1


class Optim(Spec):
    """AdamW (https://arxiv.org/abs/1711.05101) and its learning rate."""

    learning_rate: PositiveFloat = 5e-5
    head_learning_rate_multiplier: PositiveFloat = 1.0
    """The task's head starts from nothing: a larger rate there saves steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Applied to matrices, not to biases and norms."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm to this; null does not clip."""
    schedule: Schedule = Schedule()


class Evaluation(Spec):
    """How often the dev split is scored, and when training stops early."""

    eval_steps: PositiveInt | None = None
    """Score the dev split every so many steps; unset: five times in the run. It is always scored at the end."""
    metric_for_best_model: Literal["accuracy", "macro_f1", "loss"] | None = None
    """What the best weights of the dev split are best at. Unset: accuracy for classification, loss for language modelling."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a new best; unset never stops early."""
    batch_tokens: PositiveInt = 4096
    """Tokens of one forward while scoring."""


class Checkpointing(Spec):
    """How often the whole training state is saved, and how many saves are kept."""

    save_steps: PositiveInt | None = None
    """Save every so many steps; unset: five times in the run. The last step is always saved."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Keep the newest so many (at least two: if one is damaged, the one before it serves), and the best one besides."""


class TrainJob(Spec):
    """A fine-tuning job, from rows and a pretrained model to a scored bundle."""

    kind: Literal["train"] = "train"
    name: DnsLabel
    """Also the RayJob's name, so a short DNS label."""
    model: Model
    data: Data
    task: Task = Classification()
    tuning: Tuning = Full()
    parallel: Parallel = Ddp()
    workers: Workers = Workers()
    optim: Optim = Optim()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpointing = Checkpointing()

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 if every worker's hardware multiplies it natively (GPUs since Ampere, AVX512-BF16, AMX), else fp32; see the plan."""

    global_batch_size: PositiveInt = 32
    """Examples per optimizer step, over all workers and accumulation passes."""
    micro_batch_size: PositiveInt = 8
    """Examples one worker holds at once."""
    num_train_epochs: PositiveFloat = 3.0
    max_steps: PositiveInt | None = None
    """Optimizer steps; set, it overrides num_train_epochs."""
    seed: NonNegativeInt = 17
    max_failures: NonNegativeInt = 0
    """How often a lost worker may restart the job from its last checkpoint."""
    storage: str = "runs"
    """Storage URI of runs, checkpoints and bundles: a folder, or s3://, gs:// ... through fsspec."""

    compress: Compress | None = None
    serve: ServeAfterTraining | None = None

    @model_validator(mode="after")
    def _global_batch_divides(self) -> Self:
        per_pass = self.micro_batch_size * self.workers.num_workers
        if self.global_batch_size % per_pass:
            nearest = max(per_pass, round(self.global_batch_size / per_pass) * per_pass)
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size x workers.num_workers = "
                f"{self.micro_batch_size} x {self.workers.num_workers} = {per_pass}; nearest that works: {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _task_has_the_metric(self) -> Self:
        metric = self.evaluation.metric_for_best_model
        if metric is not None and metric not in METRICS[self.task.kind]:
            there = ", ".join(METRICS[self.task.kind])
            raise ValueError(f"evaluation.metric_for_best_model={metric} is not a metric of task.kind={self.task.kind}; it has: {there}")
        return self

    @model_validator(mode="after")
    def _what_follows_training_can_take_the_task(self) -> Self:
        if self.task.kind != "classification":
            for name in ("compress", "serve"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} takes task.kind=classification only; leave it out for task.kind={self.task.kind}")
        return self

    @model_validator(mode="after")
    def _tuning_goes_with_the_rest(self) -> Self:
        sharded = isinstance(self.parallel, DeepSpeed) and self.parallel.zero_stage == 3
        match self.tuning:
            case Adalora():
                if sharded:
                    raise ValueError(
                        "tuning.kind=adalora does not go with parallel.zero_stage=3: ranks move by whole weights and gradients, "
                        "which ZeRO-3 does not keep; use parallel.zero_stage=2, or tuning.kind=lora"
                    )
                if self.max_steps is not None and self.tuning.tinit + self.tuning.tfinal >= self.max_steps:
                    raise ValueError(
                        f"tuning.tinit={self.tuning.tinit} and tuning.tfinal={self.tuning.tfinal} leave no step of max_steps="
                        f"{self.max_steps} to move ranks in; lower them, or raise max_steps"
                    )
            case VirtualTokens() if sharded:
                raise ValueError(
                    f"tuning.kind={self.tuning.kind} does not go with parallel.zero_stage=3: the prompt is made outside the modules whose "
                    "weights ZeRO-3 gathers; use parallel.zero_stage=2, or tuning.kind=lora"
                )
            case _:
                pass
        if self.compress is not None and not is_merged(self.tuning):
            raise ValueError(
                f"compress takes full-precision weights of the model's own shape, which tuning.kind={self.tuning.kind} does not end in; "
                "leave compress out, or use tuning.kind=lora"
            )
        return self

    @property
    def metric_for_best_model(self) -> str:
        """What chooses the best weights."""
        return self.evaluation.metric_for_best_model or METRICS[self.task.kind][0]

    @property
    def accumulation_steps(self) -> int:
        """Forward and backward passes of one worker per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.workers.num_workers)

    def service(self, bundle: str) -> Service:
        """The service that hosts this job's bundle."""
        serve = self.serve or ServeAfterTraining()
        return Service(
            name=self.name,
            bundle=bundle,
            storage=self.storage,
            engine=serve.engine,
            autoscaling=serve.autoscaling,
            limits=serve.limits,
            http=serve.http,
        )
