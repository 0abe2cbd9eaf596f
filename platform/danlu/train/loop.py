"""THE training loop. Nothing here says DeepSpeed, Ray, LoRA or Kubernetes: each is one object away."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from danlu.data.pack import Batches, Packed, by_length, pack_rows
from danlu.errors import DivergedError, ModelError
from danlu.spec.parallel import Ddp, DeepSpeed, Pipeline, Tensor
from danlu.spec.task import LOWER_IS_BETTER
from danlu.spec.train import TrainJob
from danlu.tasks.kernels import compiled_kernels
from danlu.tasks.rows import Split, Splits
from danlu.tasks.task import TaskFile, relative_to_start, task_file
from danlu.train.checkpoint import Checkpoints, Progress, after_eval, improved
from danlu.train.ema import Ema, EmaState
from danlu.train.exchange import Exchange
from danlu.train.memory import kept_memory
from danlu.train.model import Trainee, build, export, not_finite
from danlu.train.optim import learning_rate_at, param_groups
from danlu.train.phases import Phases, device_name, flops_per_token, peak_flops
from danlu.train.precision import SMALLEST, LossScale, LossScaleState, compute_dtype
from danlu.train.run import EvalRecord, EventRecord, Models, Run, StartRecord, StepRecord
from danlu.train.strategy import Setup, State, Strategy, make_strategy


@dataclass(frozen=True)
class Outcome:
    """How training ended. `best_step` names the folder of the best weights."""

    steps: int
    best_step: int
    best_value: float
    stopped_early: bool
    bf16: bool
    tokens_total: int


def num_steps(job: TrainJob, num_rows: int) -> int:
    """Optimizer steps of the whole job."""
    return job.max_steps or max(1, math.ceil(job.num_train_epochs * num_rows / job.global_batch_size))


def train(job: TrainJob, data: Splits, folder: Path, tokenizer: PreTrainedTokenizerBase, run: Run, run_uri: str) -> Outcome:
    """Train to the last step, going on from the last whole checkpoint if there is one. `folder` holds the pretrained model."""
    dtype, on_cpu = compute_dtype(job, run), run.device.type == "cpu"
    uses_kernels = on_cpu and dtype == torch.bfloat16 and job.kernels == "auto"
    # On a GPU steps leave host memory alone, and what data and checkpoints took is better given back.
    with kept_memory() if on_cpu else nullcontext(), compiled_kernels() if uses_kernels else nullcontext():
        return _train(job, data, folder, tokenizer, run, run_uri, dtype)


def _train(
    job: TrainJob, data: Splits, folder: Path, tokenizer: PreTrainedTokenizerBase, run: Run, run_uri: str, dtype: torch.dtype
) -> Outcome:
    steps = num_steps(job, len(data.train.encoded))
    eval_steps = job.evaluation.eval_steps or max(1, math.ceil(steps / 5))
    save_steps = job.checkpoint.save_steps or max(1, math.ceil(steps / 5))
    loss_scale = LossScale() if dtype == torch.float16 else None
    task = task_file(job.task)
    trainee = build(job, folder, data.label_names, dtype=dtype, num_steps=steps)
    operations = flops_per_token(trainee.module)  # before a strategy cuts weights apart
    strategy = make_strategy(job.parallel)
    exchange = Exchange(run.device)
    model = strategy.prepare(trainee.module, _setup(job, trainee, run, dtype, loss_scale, exchange))
    ema = _ema(job, trainee)
    state = _state(strategy, trainee, run)
    state = state if ema is None else EmaState(state, ema, run.rank)
    state = state if loss_scale is None else LossScaleState(state, loss_scale, run.rank)
    models = Models(run, job.parallel.workers_per_model)
    start_outputs = partial(score_rows, task, model, run=models, batch_tokens=job.evaluation.batch_tokens, autocast=_autocast(job, dtype))
    data = relative_to_start(job.task, data, start_outputs)  # before a checkpoint is read: it is the start that counts
    batches = Batches(
        data.train.encoded,
        data.train.labels,
        global_batch_size=job.global_batch_size,
        micro_batch_size=job.micro_batch_size,
        rank=models.rank,
        world_size=models.world_size,
        seed=job.seed,
        group_by_length=job.group_by_length,
        reference=data.train.reference,
        corrupt=data.train.corrupt,
    )
    learning_rate = learning_rate_at(job.optim, steps)
    checkpoints = Checkpoints(run, f"{run_uri}/checkpoints", shape=shape(job), keep=job.checkpoint.save_total_limit)
    best_weights = Checkpoints(run, f"{run_uri}/best", shape="weights", keep=1)
    progress = checkpoints.restore(state) or Progress()
    if progress.step:
        run.report(EventRecord(progress.step, "resumed", f"from the checkpoint of step {progress.step}"))
    if run.rank == 0:
        run.report(_start_record(progress, steps, save_steps, job, run, operations, dtype))
    phases = Phases(run, exchange)
    clock = _Clock(steps)
    stopped_early = _out_of_patience(job, progress)

    while progress.step < steps and not stopped_early:
        step = progress.step
        # Dropout follows from the step, so a resumed run draws what the uninterrupted one would have.
        torch.manual_seed(hash((job.seed, step, models.rank)) & 0x7FFFFFFF)
        model.train()
        phases.begin(step)
        micro_batches = [batch.to(run.device) for batch in batches.at(step)]
        phases.end("data")
        # None in rows of which the tokenizer makes nothing: such a step learns nothing, and is no division by zero.
        num_targets = max(1.0, float(models.all_sum(torch.tensor(float(sum(task.num_targets(batch) for batch in micro_batches))))))
        phases.end("wait")

        def loss(model: nn.Module, batch: Packed, num_targets: float = num_targets) -> torch.Tensor:
            phases.end("backward")
            # Each target of the global batch weighs the same, however unevenly they fall on ranks and micro-batches.
            its = task.loss(model, batch, job.task) / num_targets
            phases.end("forward")
            return its

        loss_sum = strategy.accumulate(micro_batches, loss)
        phases.end("backward")
        grad_norm = strategy.step(learning_rate(step))
        phases.end("optimizer")
        if ema is not None:
            ema.update(step + 1)
        mean_loss = float(models.all_sum(loss_sum))
        phases.end("wait")
        skipped = loss_scale is not None and not math.isfinite(grad_norm)
        if not (skipped and loss_scale is not None and loss_scale.scale >= SMALLEST):
            _check_finite(mean_loss, grad_norm, step, checkpoints, folder)

        tokens = batches.num_tokens(step)
        progress = replace(progress, step=step + 1, tokens_total=progress.tokens_total + tokens)
        seconds, tokens_per_second, eta_s = clock.tick(progress.step, tokens)
        run.report(
            StepRecord(
                step=progress.step,
                num_steps=steps,
                epoch=progress.step * job.global_batch_size / len(data.train.encoded),
                loss=mean_loss,
                learning_rate=learning_rate(step),
                grad_norm=grad_norm,
                tokens=tokens,
                tokens_total=progress.tokens_total,
                tokens_per_second=tokens_per_second,
                step_seconds=seconds,
                eta_s=eta_s,
                examples=job.global_batch_size,
                phases=phases.seconds,
                loss_scale=None if loss_scale is None else loss_scale.scale,
                skipped=skipped,
            )
        )
        phases.compare(progress.step)
        if skipped and loss_scale is not None:
            run.report(
                EventRecord(progress.step, "step skipped", f"a float16 gradient overflowed; the loss scale is now {loss_scale.scale:g}")
            )
        if trainee.allocator is not None and trainee.allocator.moved:
            run.report(EventRecord(progress.step, "ranks", _ranks_text(trainee.allocator.ranks())))
        if progress.step % eval_steps == 0 or progress.step == steps:
            started = time.perf_counter()
            with nullcontext() if ema is None else ema.applied():
                outputs = score_rows(
                    task, model, data.dev, models, batch_tokens=job.evaluation.batch_tokens, autocast=_autocast(job, dtype)
                )
                if progress.step == steps:
                    _check_last_step(outputs, steps, checkpoints)
                progress = _evaluate(job, outputs, data, progress, models, state, trainee, tokenizer, best_weights, started)
            stopped_early = _out_of_patience(job, progress)
            if stopped_early:
                run.report(EventRecord(progress.step, "stopped early", f"no new best in {progress.evals_without_best} evaluations"))
            clock.pause()
        if progress.step % save_steps == 0 or progress.step == steps or stopped_early:
            started = time.perf_counter()
            size = checkpoints.save(progress, state.save)
            run.report(EventRecord(progress.step, "checkpoint", f"step {progress.step}", time.perf_counter() - started, size))
            clock.pause()
    return Outcome(progress.step, progress.best_step, progress.best_value, stopped_early, dtype == torch.bfloat16, progress.tokens_total)


def shape(job: TrainJob) -> str:
    """What a checkpoint's files look like; another shape cannot read them."""
    if isinstance(job.parallel, DeepSpeed):
        return f"deepspeed-zero{job.parallel.zero_stage}" + ("-nvme" if job.parallel.uses_nvme else "")
    if isinstance(job.parallel, Tensor | Pipeline):
        return "tensor or pipeline"  # one format: weights by name, whole or cut in any way
    return job.parallel.kind


@torch.no_grad()
def score_rows(task: TaskFile, model: nn.Module, split: Split, run: Run, *, batch_tokens: int, autocast: torch.dtype | None) -> np.ndarray:
    """A task's outputs of a split's sequences, float32 [sequences, width] or [tokens, width], shared out over the ranks. Collective."""
    model.eval()
    sequences = split.encoded.sequences
    groups = by_length(sequences.lengths, batch_tokens)
    outputs = torch.empty(0)
    # Under ZeRO-3 a forward is collective: every rank does as many, a short one repeats its last.
    for turn in range(math.ceil(len(groups) / run.world_size)):
        mine = turn * run.world_size + run.rank
        rows = groups[min(mine, len(groups) - 1)]
        batch = pack_rows(sequences, rows, reference=split.reference).to(run.device)
        with nullcontext() if autocast is None else torch.autocast(run.device.type, autocast):
            out = task.row_outputs(model, batch)
        if not len(outputs):
            outputs = torch.zeros(len(sequences.input_ids) if task.PER_TOKEN else len(sequences), out.shape[1])
        if mine < len(groups):
            outputs[sequences.tokens_of(rows) if task.PER_TOKEN else rows] = out.float().cpu()
    return run.all_sum(outputs).numpy()


def _evaluate(
    job: TrainJob,
    outputs: np.ndarray,
    data: Splits,
    progress: Progress,
    models: Models,
    state: State,
    trainee: Trainee,
    tokenizer: PreTrainedTokenizerBase,
    best_weights: Checkpoints,
    started: float,
) -> Progress:
    """Score what the model has answered to the dev split; keep the weights if they are the best so far."""
    task = task_file(job.task)
    metrics = dict(task.scores(outputs, data.dev, data.label_names, job.task).metrics())
    name = job.metric_for_best_model
    is_best = improved(progress, metrics[name], higher_is_better=name not in LOWER_IS_BETTER)
    progress = after_eval(progress, metrics[name], is_best=is_best)
    if is_best:
        weights = state.weights(trainee.exported)  # collective
        best_weights.save(progress, lambda folder: export(trainee, weights, tokenizer, folder) if models.run.rank == 0 else None)
    models.report(EvalRecord(progress.step, metrics, time.perf_counter() - started, is_best))
    return progress


def _autocast(job: TrainJob, dtype: torch.dtype) -> torch.dtype | None:
    """What rows are scored in, where the strategy's model does not see to it by itself."""
    return dtype if dtype != torch.float32 and isinstance(job.parallel, Ddp | Tensor | Pipeline) else None


def _start_record(
    progress: Progress, steps: int, save_steps: int, job: TrainJob, run: Run, operations: float, dtype: torch.dtype
) -> StartRecord:
    peak, source = peak_flops(run.device, dtype)
    threads = job.workers.cpus_per_worker
    return StartRecord(progress.step, steps, save_steps, run.world_size, threads, device_name(run.device), operations, peak, source)


def _setup(job: TrainJob, trainee: Trainee, run: Run, dtype: torch.dtype, loss_scale: LossScale | None, exchange: Exchange) -> Setup:
    return Setup(
        optim=job.optim,
        param_groups=param_groups(trainee.module, job.optim, trainee.head, trainee.lr_scales),
        micro_batch_size=job.micro_batch_size,
        dtype=dtype,
        device=run.device,
        rank=run.rank,
        world_size=run.world_size,
        workers_per_model=job.parallel.workers_per_model,
        allocator=trainee.allocator,
        loss_scale=loss_scale,
        exchange=exchange,
    )


def _ema(job: TrainJob, trainee: Trainee) -> Ema | None:
    if job.optim.ema_decay is None:
        return None
    # A direction that AdaLoRA has put out is out of what is scored and stored, or the bundle would have all ranks it started with.
    put_out = {name for name, _ in trainee.module.named_parameters() if trainee.allocator is not None and ".lora_E." in name}
    return Ema(trainee.module, job.optim.ema_decay, put_out)


def _state(strategy: Strategy, trainee: Trainee, run: Run) -> State:
    if trainee.allocator is None:
        return strategy.state()
    from danlu.train.adalora import WithAllocator

    return WithAllocator(strategy.state(), trainee.allocator, run.rank)


def _ranks_text(ranks: Mapping[str, int]) -> str:
    return f"{sum(ranks.values())} in all: " + ", ".join(f"{name} {rank}" for name, rank in ranks.items())


def _out_of_patience(job: TrainJob, progress: Progress) -> bool:
    patience = job.evaluation.early_stopping_patience
    return patience is not None and progress.evals_without_best >= patience


def _check_finite(loss: float, grad_norm: float, step: int, checkpoints: Checkpoints, folder: Path) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        if step == 0 and (name := not_finite(folder)) is not None:
            raise ModelError(
                f"{name} in {folder} holds values that are no numbers", where="model.model_name_or_path", fix="copy or download it again"
            )
        # A loss that is no number is that of weights which the step before left so: a checkpoint of theirs is no help.
        kept = [saved for saved in checkpoints.steps() if saved < step or math.isfinite(loss)]
        raise _diverged(f"the loss of step {step + 1} is {loss} and its gradient norm {grad_norm}", kept)


def _check_last_step(outputs: np.ndarray, steps: int, checkpoints: Checkpoints) -> None:
    """What another step makes of the weights is seen by the loss of the next one: behind the last there is none."""
    if np.isnan(outputs).any():
        raise _diverged(f"after step {steps}, the last, what the model answers to dev rows is no number", checkpoints.steps())


def _diverged(told: str, kept: Sequence[int]) -> DivergedError:
    """`kept`: the steps of checkpoints from before, the newest first."""
    return DivergedError(
        f"{told}: training has diverged",
        where="optim.learning_rate",
        fix="a lower learning rate, a longer warm-up or a max_grad_norm; "
        + (f"the checkpoint of step {kept[0]} is from before" if kept else "no checkpoint is from before"),
    )


class _Clock:
    """Seconds, tokens per second and time left, over the last steps; evaluations and checkpoints do not count as step time."""

    def __init__(self, steps: int) -> None:
        self.steps, self.window = steps, deque[tuple[float, int]](maxlen=20)
        self.began = time.perf_counter()

    def tick(self, step: int, tokens: int) -> tuple[float, float, float]:
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        self.window.append((seconds, tokens))
        total = sum(seconds for seconds, _ in self.window)
        rate = sum(tokens for _, tokens in self.window) / total
        return seconds, rate, (self.steps - step) * total / len(self.window)

    def pause(self) -> None:
        """Start the next step's time now."""
        self.began = time.perf_counter()


__all__ = ["Outcome", "num_steps", "score_rows", "shape", "train"]
