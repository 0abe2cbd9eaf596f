"""What a fine-tuning job is. Pure data: imports nothing heavier than pydantic."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import DnsLabel, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from danlu.spec.compress import Compress
from danlu.spec.data import Data
from danlu.spec.model import Model
from danlu.spec.optim import Adafactor, BnbAdamW, Lion, Optim, Wsd
from danlu.spec.parallel import Ddp, DeepSpeed, Parallel, Workers
from danlu.spec.serve import ServeAfterTraining, Service
from danlu.spec.task import METRICS, Classification, MaskedLm, Preference, Pretrain, Seq2Seq, Task
from danlu.spec.tuning import Adalora, Full, Tuning, VirtualTokens, is_merged


class Evaluation(Spec):
    """How often the dev split is scored, and when training stops early."""

    eval_steps: PositiveInt | None = None
    """Score the dev split every so many steps; unset: five times in the run. It is always scored at the end."""
    metric_for_best_model: Literal["accuracy", "macro_f1", "loss", "token_accuracy", "reward_accuracy", "reward_margin"] | None = None
    """What the best weights of the dev split are best at. Unset: accuracy for classification, reward_accuracy for preference, else loss."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a new best; unset never stops early."""
    batch_tokens: PositiveInt = 2048
    """Tokens of one forward while scoring."""


class Checkpointing(Spec):
    """How often the whole training state is saved, and how many saves are kept."""

    save_steps: PositiveInt | None = None
    """Save every so many steps; unset: five times in the run. The last step is always saved."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Keep the newest so many (at least two: if one is damaged, the one before it serves), and the best one besides."""


def _is_decoder(task: Task) -> bool:
    return not isinstance(task, Classification | Seq2Seq) and not (isinstance(task, Pretrain) and isinstance(task.objective, MaskedLm))


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
    """Examples one worker (one group of workers, under tensor parallelism) holds at once."""
    group_by_length: bool = False
    """Batches of rows of nearly one length. Packed rows have no padding: it pays for models that cannot be packed."""
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
    def _workers_make_whole_models(self) -> Self:
        size, workers = self.parallel.workers_per_model, self.workers.num_workers
        if workers % size:
            raise ValueError(
                f"workers.num_workers={workers} is not a multiple of parallel.tensor_parallel_size={size}; "
                f"nearest that works: {max(size, workers // size * size)}"
            )
        if self.parallel.kind == "tensor" and self.tuning.kind != "full":
            raise ValueError(
                f"parallel.kind=tensor splits trained weights only, not tuning.kind={self.tuning.kind}; parallel.kind=fsdp takes it"
            )
        return self

    @model_validator(mode="after")
    def _global_batch_divides(self) -> Self:
        per_pass = self.micro_batch_size * self.num_models
        if self.global_batch_size % per_pass:
            size = self.parallel.workers_per_model
            groups = (" / tensor_parallel_size", f" / {size}") if size > 1 else ("", "")
            nearest = max(per_pass, round(self.global_batch_size / per_pass) * per_pass)
            passes, rest = divmod(self.global_batch_size, self.micro_batch_size)
            workers = [] if rest else [str(n * size) for n in range(1, passes + 1) if passes % n == 0]
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size x workers.num_workers{groups[0]} = "
                f"{self.micro_batch_size} x {self.workers.num_workers}{groups[1]} = {per_pass}; nearest that works: {nearest}"
                + (f"; or workers.num_workers: {', '.join(workers[:8])}" if workers else "")
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
    def _optimizer_can_work_here(self) -> Self:
        optim, kind = self.optim, self.parallel.kind
        if isinstance(optim.optimizer, Adafactor) and kind != "ddp":
            raise ValueError(
                f"optim.optimizer.kind=adafactor keeps a row and a column of each matrix, which parallel.kind={kind} cuts apart; "
                "parallel.kind=ddp or another optimizer"
            )
        if isinstance(optim.optimizer, BnbAdamW | Lion) and kind in ("fsdp", "tensor"):
            raise ValueError(
                f"optim.optimizer.kind={optim.optimizer.kind} is bitsandbytes', which cannot take the tensors that parallel.kind={kind} "
                "shards; optim.optimizer.kind=adamw, or parallel.kind=deepspeed"
            )
        if optim.ema_decay is not None and kind != "ddp":
            raise ValueError(f"optim.ema_decay averages whole weights, which parallel.kind={kind} shards; parallel.kind=ddp can")
        if isinstance(optim.optimizer, BnbAdamW) and optim.optimizer.paged and not self.workers.gpus_per_worker:
            raise ValueError("optim.optimizer.paged=true puts a GPU's memory aside; with workers.gpus_per_worker=0 leave it out")
        if isinstance(optim.schedule, Wsd) and (both := optim.schedule.warmup_ratio + optim.schedule.decay_ratio) > 1:
            raise ValueError(f"optim.schedule: warmup_ratio + decay_ratio = {both:g}; together they are at most 1, all the steps there are")
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
        if isinstance(self.task, Pretrain) and self.task.from_scratch is not None and self.tuning.kind != "full":
            raise ValueError(f"task.from_scratch leaves nothing to tune by tuning.kind={self.tuning.kind}; tuning.kind=full trains all")
        if not isinstance(self.task, Classification) and isinstance(self.tuning, VirtualTokens) and not _is_decoder(self.task):
            raise ValueError(
                f"tuning.kind={self.tuning.kind} is for classifiers and decoders, not for task.kind={self.task.kind} as it is set; "
                "tuning.kind=lora"
            )
        if isinstance(self.task, Preference) and self.task.has_reference and isinstance(self.tuning, VirtualTokens):
            raise ValueError(
                f"task.loss.kind={self.task.loss.kind} compares with the pretrained model, which tuning.kind={self.tuning.kind} does not "
                "start as; tuning.kind=lora, or task.loss.kind=orpo"
            )
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
    def num_models(self) -> int:
        """How many models read different rows at once: the workers, or their groups."""
        return self.workers.num_workers // self.parallel.workers_per_model

    @property
    def accumulation_steps(self) -> int:
        """Forward and backward passes of one worker per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_models)

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
