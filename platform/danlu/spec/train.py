"""What a fine-tuning job is. Pure data: imports nothing heavier than pydantic."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.after_training import check_compression, check_engine
from danlu.spec.base import DnsLabel, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from danlu.spec.cluster import JobCluster
from danlu.spec.compress import Compress
from danlu.spec.data import Data
from danlu.spec.model import Model
from danlu.spec.optim import Adafactor, BnbAdamW, Lion, Optim, Wsd
from danlu.spec.parallel import Ddp, DeepSpeed, Parallel, Pipeline, Tensor, Workers
from danlu.spec.serve import Encoder, EncoderDecoder, Engine, ServeAfterTraining, Service, Torch, check_names
from danlu.spec.task import (
    COLUMNS,
    METRICS,
    Classification,
    Embed,
    ExtractiveQA,
    Kto,
    Preference,
    Pretrain,
    Seq2Seq,
    Task,
    engine_kind,
    is_decoders,
    named,
)
from danlu.spec.tunable import check_rates, check_tuning
from danlu.spec.tuning import Freeze, Full, Lora, Prefix, Tuning, VirtualTokens, is_merged
from danlu.spec.vllm import Vllm

STREAMED = ("classification", "pretrain", "chat")
"""Tasks whose training rows may be read from files, by need."""


class Evaluation(Spec):
    """How often the dev split is scored, and when training stops early."""

    eval_steps: PositiveInt | None = None
    """Score the dev split every so many steps; unset: five times in the run. It is always scored at the end."""
    metric_for_best_model: (
        Literal[
            "accuracy",
            "macro_f1",
            "micro_f1",
            "subset_accuracy",
            "pearson",
            "spearman",
            "mae",
            "mse",
            "exact_match",
            "f1",
            "precision",
            "recall",
            "ndcg_at_10",
            "mrr",
            "recall_at_1",
            "recall_at_10",
            "loss",
            "token_accuracy",
            "reward_accuracy",
            "reward_margin",
        ]
        | None
    ) = None
    """What the best weights of the dev split are best at. Unset: the task's first metric, such as accuracy for classification and loss for
    language modelling."""
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

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 if every worker's hardware multiplies it natively (GPUs since Ampere, AVX512-BF16, AMX), else fp32; see the plan.
    fp16 is for GPUs that lack bf16 (V100, T4): with a dynamic loss scale. Master weights are always float32."""
    kernels: Literal["auto", "off"] = "auto"
    """On a CPU in bf16, kernels for attention, encoder layers and AdamW, compiled once for the machine (g++, some seconds) and kept in
    TORCH_EXTENSIONS_DIR or the user's cache. Without a compiler, or with `off`, PyTorch's operations train the same, more slowly."""

    global_batch_size: PositiveInt = 32
    """Examples per optimizer step, over all workers and accumulation passes."""
    micro_batch_size: PositiveInt = 8
    """Examples of one forward and backward pass of one worker, or of one group of workers that hold a model together."""
    group_by_length: bool = False
    """Batches of rows of nearly one length. Packed rows have no padding: it pays for models that cannot be packed."""
    num_train_epochs: PositiveFloat = 3.0
    max_steps: PositiveInt | None = None
    """Optimizer steps; set, it overrides num_train_epochs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    max_failures: NonNegativeInt = 0
    """How often a lost worker may restart the job from its last checkpoint."""
    storage: str = "runs"
    """Storage URI of runs, checkpoints and bundles: a folder, or s3://, gs:// ... through fsspec."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] | None = None
    """Where curves are drawn besides. Unset: TensorBoard where it is installed; [] for none. W&B writes offline unless WANDB_MODE says
    otherwise, MLflow beside the run unless MLFLOW_TRACKING_URI does."""

    budget_usd: PositiveFloat | None = None
    """What the run may cost by the prices of metrics/prices.py. Alerts tell at 80 and at 100 %; nothing is stopped."""

    compress: Compress | None = None
    serve: ServeAfterTraining | None = None
    cluster: JobCluster | None = None
    """Where it runs with `--on k8s`. A run on this machine leaves it aside."""

    @model_validator(mode="after")
    def _workers_make_whole_models(self) -> Self:
        size, workers = self.parallel.workers_per_model, self.workers.num_workers
        if workers % size:
            sizes = " x ".join(f"parallel.{name}={its}" for name, its in self.parallel.model_sizes.items())
            raise ValueError(
                f"workers.num_workers={workers} is not a multiple of {sizes}{'' if len(self.parallel.model_sizes) == 1 else f' = {size}'}; "
                f"nearest that works: {max(size, workers // size * size)}"
            )
        if self.parallel.kind in ("tensor", "pipeline") and not isinstance(self.tuning, Full | Freeze | Lora):
            does = "splits" if self.parallel.kind == "tensor" else "cuts up"
            raise ValueError(
                f"parallel.kind={self.parallel.kind} {does} the weights of tuning.kind=full, freeze or lora, not of {self.tuning.kind}; "
                "parallel.kind=fsdp takes it"
            )
        if "tensor_parallel_size" in self.parallel.model_sizes and isinstance(self.tuning, Lora) and self.tuning.use_dora:
            raise ValueError(
                "tuning.use_dora=true measures whole rows of the weights, which parallel.tensor_parallel_size splits; leave it out, or "
                "parallel.kind=fsdp"
            )
        if self.parallel.kind in ("tensor", "pipeline") and isinstance(self.task, Seq2Seq):
            does = "splits" if self.parallel.kind == "tensor" else "cuts up"
            raise ValueError(
                f"parallel.kind={self.parallel.kind} {does} one stack of layers, and task.kind=seq2seq trains an encoder's and a "
                "decoder's; parallel.kind=fsdp takes it"
            )
        if isinstance(self.parallel, Tensor | Pipeline) and self.parallel.zero_stage and self.num_models == 1:
            raise ValueError(
                f"parallel.zero_stage=1 has no effect: workers.num_workers={workers} are one group, and no other holds the same weights; "
                f"leave it out, or workers.num_workers={2 * size}"
            )
        return self

    @model_validator(mode="after")
    def _context_is_a_decoders(self) -> Self:
        if "context_parallel_size" not in self.parallel.model_sizes:
            return self
        if not is_decoders(self.task):
            raise ValueError(
                "parallel.context_parallel_size shares out the tokens of long rows that predict the next one; "
                f"{named(self.task)} reads whole rows: leave it out"
            )
        if isinstance(self.tuning, VirtualTokens):
            raise ValueError(
                f"parallel.context_parallel_size goes with packed rows only, and tuning.kind={self.tuning.kind} pads them; use "
                "tuning.kind=lora"
            )
        return self

    @model_validator(mode="after")
    def _global_batch_divides(self) -> Self:
        per_pass = self.micro_batch_size * self.num_models
        if self.global_batch_size % per_pass:
            size = self.parallel.workers_per_model
            groups = ("".join(f" / {name}" for name in self.parallel.model_sizes), f" / {size}") if size > 1 else ("", "")
            nearest = max(per_pass, round(self.global_batch_size / per_pass) * per_pass)
            passes, rest = divmod(self.global_batch_size, self.micro_batch_size)
            workers = [] if rest else [str(n * size) for n in range(1, passes + 1) if passes % n == 0]
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size x workers.num_workers{groups[0]} = "
                f"{self.micro_batch_size} x {self.workers.num_workers}{groups[1]} = {per_pass}; nearest that works: {nearest}"
                + (f"; or workers.num_workers: {', '.join(workers[:8])}" if workers else "")
            )
        if isinstance(self.parallel, Pipeline):
            self.parallel.check_passes(self.accumulation_steps)
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
        if isinstance(optim.optimizer, BnbAdamW | Lion) and kind in ("fsdp", "tensor", "pipeline"):
            raise ValueError(
                f"optim.optimizer.kind={optim.optimizer.kind} is bitsandbytes', which cannot take the tensors that parallel.kind={kind} "
                "shards; optim.optimizer.kind=adamw, or parallel.kind=deepspeed"
            )
        if isinstance(self.parallel, DeepSpeed) and self.parallel.uses_nvme and getattr(optim.optimizer, "bits", 32) == 8:
            raise ValueError("optim.optimizer.bits=8 keeps its state in bytes, by blocks; nvme swaps floats: bits=32, or offload to cpu")
        if self.precision == "fp16" and kind == "deepspeed" and not self.workers.gpus_per_worker:
            told = "precision=fp16 with parallel.kind=deepspeed needs GPUs: DeepSpeed has no fp16 on a CPU"
            raise ValueError(f"{told}; precision=bf16, workers.gpus_per_worker=1, or parallel.kind=ddp")
        if self.kernels == "off" and (self.workers.gpus_per_worker or self.precision in ("fp32", "fp16")):
            raise ValueError("kernels=off has no effect on a GPU or with precision=fp32 or fp16, where there are none; leave it out")
        if optim.ema_decay is not None and kind != "ddp":
            raise ValueError(f"optim.ema_decay averages whole weights, which parallel.kind={kind} shards; parallel.kind=ddp can")
        if isinstance(optim.optimizer, BnbAdamW) and optim.optimizer.paged and not self.workers.gpus_per_worker:
            raise ValueError("optim.optimizer.paged=true puts a GPU's memory aside; with workers.gpus_per_worker=0 leave it out")
        if isinstance(optim.schedule, Wsd) and (both := optim.schedule.warmup_ratio + optim.schedule.decay_ratio) > 1:
            raise ValueError(f"optim.schedule: warmup_ratio + decay_ratio = {both:g}; together they are at most 1, all the steps there are")
        return self

    @model_validator(mode="after")
    def _what_follows_training_can_take_the_task(self) -> Self:
        if self.compress is not None:
            check_compression(self.task, self.compress)
        if self.serve is None:
            return self
        engine, right = self.serve.engine, engine_kind(self.task)
        kinds = (right, "vllm") if right == "torch" else (right,)
        if engine is not None and engine.kind not in kinds:
            does = {
                "encoder": "answers with what an encoder's head says",
                "encoder_decoder": "writes a text for a text",
                "torch": "continues texts",
                "vllm": "continues texts",
            }
            raise ValueError(
                f"serve.engine.kind={engine.kind} {does[engine.kind]}, and {named(self.task)} does not; serve.engine.kind="
                f"{' or '.join(kinds)}, or leave it out"
            )
        if isinstance(engine, Torch | Vllm):
            check_engine(engine, self.tuning, self.compress)
            check_names(self.name, engine)
        if is_decoders(self.task) and isinstance(self.tuning, VirtualTokens):
            raise ValueError(
                f"serve: engine.kind={'torch' if engine is None else engine.kind} puts no virtual tokens before a text, which tuning.kind="
                f"{self.tuning.kind} has learned; leave serve out (danlu predict answers), or tuning.kind=lora"
            )
        return self

    @model_validator(mode="after")
    def _task_fits_the_batches(self) -> Self:
        if isinstance(self.task, Embed) and self.micro_batch_size < 2:
            raise ValueError("micro_batch_size=1 leaves task.kind=embedding no other texts to tell apart; at least 2")
        if isinstance(self.task, Preference) and isinstance(self.task.loss, Kto) and self.micro_batch_size < 2:
            raise ValueError("micro_batch_size=1 leaves task.loss.kind=kto one row to estimate its KL divergence from; at least 2")
        if isinstance(self.task, ExtractiveQA) and (self.task.doc_stride or 0) > self.model.max_length // 2:
            raise ValueError(
                f"task.doc_stride={self.task.doc_stride} is more than half of model.max_length={self.model.max_length}: windows would "
                f"hardly move on; at most {self.model.max_length // 2}"
            )
        return self

    @model_validator(mode="after")
    def _task_reads_the_columns(self) -> Self:
        if self.data.streaming and self.task.kind not in STREAMED:
            raise ValueError(
                f"data.streaming goes with task.kind: {', '.join(STREAMED)}; task.kind={self.task.kind} holds rows in memory: leave it out"
            )
        for role, name in self.data.columns:
            if name is not None and role not in COLUMNS[self.task.kind]:
                there = ", ".join(COLUMNS[self.task.kind]) or "rows of known forms, whatever form they have"
                raise ValueError(f"data.columns.{role} has no effect with task.kind={self.task.kind}, which reads: {there}")
        return self

    @model_validator(mode="after")
    def _tuning_goes_with_the_rest(self) -> Self:
        if isinstance(self.task, Pretrain) and self.task.from_scratch is not None and self.tuning.kind != "full":
            raise ValueError(f"task.from_scratch leaves nothing to tune by tuning.kind={self.tuning.kind}; tuning.kind=full trains all")
        if isinstance(self.task, Preference) and self.task.has_reference and isinstance(self.tuning, VirtualTokens):
            raise ValueError(
                f"task.loss.kind={self.task.loss.kind} compares with the pretrained model, which tuning.kind={self.tuning.kind} does not "
                "start as; tuning.kind=lora, or task.loss.kind=orpo"
            )
        check_tuning(self.tuning, self.task, self.parallel, self.precision, self.max_steps)
        check_rates(self.optim, self.task, self.tuning)
        if isinstance(self.tuning, Prefix) and self.model.gradient_checkpointing:
            raise ValueError(
                "model.gradient_checkpointing does not go with tuning.kind=prefix: its keys and values stand in a cache, which a second "
                "forward would fill again; leave it out, or tuning.kind=prompt"
            )
        if self.compress is not None and not is_merged(self.tuning):
            raise ValueError(
                f"compress takes full-precision weights of the model's own shape, which tuning.kind={self.tuning.kind} does not end in; "
                "leave compress out, or use tuning.kind=lora"
            )
        return self

    @model_validator(mode="after")
    def _pods_hold_whole_groups_of_workers(self) -> Self:
        if (cluster := self.cluster) is None:
            return self
        workers, each = self.workers, cluster.workers_per_pod
        if workers.num_workers % each:
            divisors = ", ".join(str(n) for n in range(1, workers.num_workers + 1) if workers.num_workers % n == 0)
            raise ValueError(
                f"workers.num_workers={workers.num_workers} is not a multiple of cluster.workers_per_pod={each}; it may be: {divisors}"
            )
        if isinstance(self.parallel, Tensor) and each % (size := self.parallel.tensor_parallel_size):
            raise ValueError(
                f"cluster.workers_per_pod={each} cuts a tensor-parallel group of parallel.tensor_parallel_size={size} workers apart, which "
                f"talk in every layer; a multiple of {size} keeps them on one node"
            )
        if cluster.gpu_type is not None and not workers.gpus_per_worker:
            raise ValueError(f"cluster.gpu_type={cluster.gpu_type} has no effect with workers.gpus_per_worker=0; leave it out")
        if cluster.spot is not None and not (self.max_failures or cluster.backoff_limit):
            raise ValueError(
                f"cluster.spot={cluster.spot} nodes are taken away at times, which ends a job that tries nothing again; "
                "max_failures: 8, or cluster.backoff_limit, goes on from the last checkpoint"
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
        gpus = self.workers.gpus_per_worker
        usual: dict[str, Engine] = {"encoder": Encoder(), "encoder_decoder": EncoderDecoder(num_gpus=gpus), "torch": Torch(num_gpus=gpus)}
        return Service(
            name=self.name,
            bundle=bundle,
            storage=self.storage,
            engine=serve.engine or usual[engine_kind(self.task)],
            autoscaling=serve.autoscaling,
            limits=serve.limits,
            http=serve.http,
            cluster=serve.cluster,
        )
