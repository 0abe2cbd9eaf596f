"""Every metric once: name, kind, unit, labels, help. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

RESERVED = frozenset({"job", "instance"})
"""Labels that Prometheus puts on every series itself: one of ours with such a name would be renamed to `exported_...`."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
FEW_SECONDS = (0.05, 0.25, 1.0, 5.0, 30.0)
"""Where each value of a label has buckets of its own."""
LONG_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass(frozen=True)
class Metric:
    """One metric of ours. `labels` are closed: a value for each has to be given, and no other."""

    name: str
    kind: Kind
    unit: str
    help: str
    layer: Literal["train", "serve"]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    max_values: int = 200
    """A label takes so many values in a process; later ones are counted together as `other`, so that sums stay right and series bounded."""

    def __hash__(self) -> int:
        """Of the name, which no other has: a token's path looks metrics up."""
        return hash(self.name)

    @property
    def exported(self) -> str:
        """Its name on Ray's metrics port: Ray puts `ray_` before it and `_total` behind a counter."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


# What happens in training. Emitted where the records of rank 0 arrive: a stopped or lost worker cannot take its last numbers with it.
TRAIN_RUNNING = Metric("danlu_train_running", "gauge", "", "1 while the job trains, 0 after it ended.", "train", ("train_job",))
TRAIN_LOSS = Metric("danlu_train_loss", "gauge", "nats", "Mean loss of the last step's targets.", "train", ("train_job",))
TRAIN_BEST_LOSS = Metric("danlu_train_best_loss", "gauge", "nats", "Lowest mean loss of 20 steps so far.", "train", ("train_job",))
TRAIN_LEARNING_RATE = Metric("danlu_train_learning_rate", "gauge", "", "Learning rate of the last step.", "train", ("train_job",))
TRAIN_GRAD_NORM = Metric("danlu_train_grad_norm", "gauge", "", "Global gradient norm before clipping.", "train", ("train_job",))
TRAIN_LOSS_SCALE = Metric("danlu_train_loss_scale", "gauge", "", "What a float16 loss is multiplied by.", "train", ("train_job",))
TRAIN_SKIPPED = Metric(
    "danlu_train_skipped_steps", "counter", "steps", "Steps skipped because a float16 gradient overflowed.", "train", ("train_job",)
)
TRAIN_STEP = Metric("danlu_train_step", "gauge", "steps", "Optimizer steps done.", "train", ("train_job",))
TRAIN_NUM_STEPS = Metric("danlu_train_num_steps", "gauge", "steps", "Optimizer steps of the whole job.", "train", ("train_job",))
TRAIN_TOKENS = Metric(
    "danlu_train_tokens", "counter", "tokens", "Tokens trained on, padding not counted, replayed ones included.", "train", ("train_job",)
)
TRAIN_TOKENS_LOST = Metric(
    "danlu_train_tokens_lost", "counter", "tokens", "Tokens trained on again because a restart had lost them.", "train", ("train_job",)
)
TRAIN_EXAMPLES = Metric(
    "danlu_train_examples", "counter", "examples", "Examples trained on, replayed ones included.", "train", ("train_job",)
)
TRAIN_TOKENS_PER_SECOND = Metric("danlu_train_tokens_per_second", "gauge", "tokens/s", "Over the last 20 steps.", "train", ("train_job",))
TRAIN_STEP_SECONDS = Metric(
    "danlu_train_step_seconds", "histogram", "s", "Wall time of an optimizer step.", "train", ("train_job",), SECONDS
)
TRAIN_PHASE_SECONDS = Metric(
    "danlu_train_phase_seconds",
    "counter",
    "s",
    "Where rank 0's steps spent their time: data, wait (for the slowest rank at a step's begin and end), forward, backward, communication "
    "(standing still for other workers' gradients, weights or hidden states; not what passes while it computes), optimizer. Not told apart "
    "from forward, backward and optimizer: what DeepSpeed and tensor-parallel layers exchange, and FSDP on GPUs. On GPUs every tenth step "
    "is measured.",
    "train",
    ("train_job", "phase"),
)
TRAIN_WALL_SECONDS = Metric(
    "danlu_train_wall_seconds",
    "counter",
    "s",
    "Wall time of the job by what it went into: startup, step, stall, replay, evaluation, checkpoint, restart, other. Only `step` moves "
    "the model.",
    "train",
    ("train_job", "activity"),
)
TRAIN_GOODPUT = Metric(
    "danlu_train_goodput", "gauge", "ratio", "Share of the job's wall time in steps that moved the model.", "train", ("train_job",)
)
TRAIN_MFU = Metric(
    "danlu_train_mfu",
    "gauge",
    "ratio",
    "Model FLOPs of the last 20 steps as a share of the peak. Attention's own products are not counted.",
    "train",
    ("train_job",),
)
TRAIN_PEAK_FLOPS = Metric(
    "danlu_train_peak_flops",
    "gauge",
    "FLOP/s",
    "Peak of one worker, as its maker states it, or as measured at the start on a CPU.",
    "train",
    ("train_job", "source"),
)
TRAIN_ETA = Metric("danlu_train_eta_seconds", "gauge", "s", "Time left at the speed of the last 20 steps.", "train", ("train_job",))
TRAIN_EVAL = Metric("danlu_train_eval", "gauge", "", "Score of the dev split.", "train", ("train_job", "metric"))
TRAIN_CHECKPOINT_SECONDS = Metric(
    "danlu_train_checkpoint_seconds", "histogram", "s", "Time to save a checkpoint.", "train", ("train_job",), LONG_SECONDS
)
TRAIN_CHECKPOINT_BYTES = Metric("danlu_train_checkpoint_bytes", "gauge", "bytes", "Size of the last checkpoint.", "train", ("train_job",))
TRAIN_CHECKPOINT_TIME = Metric(
    "danlu_train_checkpoint_timestamp_seconds",
    "gauge",
    "s",
    "Unix time of the last whole checkpoint; of the start while there is none.",
    "train",
    ("train_job",),
)
TRAIN_CHECKPOINT_INTERVAL = Metric(
    "danlu_train_checkpoint_interval_seconds", "gauge", "s", "Time between checkpoints at the present speed.", "train", ("train_job",)
)
TRAIN_RESTARTS = Metric(
    "danlu_train_restarts",
    "counter",
    "",
    "Times training began again: worker_lost, out_of_memory, error; started_again is the same command given anew.",
    "train",
    ("train_job", "reason"),
)
TRAIN_FAILURES = Metric(
    "danlu_train_failures",
    "counter",
    "",
    "Jobs that ended without a result: diverged, worker_lost, error, interrupted.",
    "train",
    ("train_job", "reason"),
)
TRAIN_MEMORY = Metric(
    "danlu_train_memory_bytes",
    "gauge",
    "bytes",
    "Memory of a rank: the most that PyTorch held on its GPU, or its process's resident memory on a CPU.",
    "train",
    ("train_job", "rank"),
)
TRAIN_RANK_SECONDS = Metric(
    "danlu_train_rank_forward_seconds",
    "gauge",
    "s",
    "A rank's own time in a step, before it needs another: its rows and its forwards, mean of the last 10 steps.",
    "train",
    ("train_job", "rank"),
)
TRAIN_STRAGGLING = Metric(
    "danlu_train_straggling",
    "gauge",
    "ratio",
    "The slowest rank's own time over the median rank's; 1 is even.",
    "train",
    ("train_job",),
)
TRAIN_COST = Metric(
    "danlu_train_cost", "counter", "USD", "Device seconds held times their price (metrics/prices.py).", "train", ("train_job",)
)
TRAIN_BUDGET = Metric("danlu_train_budget", "gauge", "USD", "What the job may cost (budget_usd).", "train", ("train_job",))
TRAIN_BUDGET_USED = Metric(
    "danlu_train_budget_used", "gauge", "ratio", "Share of budget_usd that the run has cost, all its attempts together.", "train",
    ("train_job",),
)  # fmt: skip
TRAIN_DEVICE_SECONDS = Metric(
    "danlu_train_device_seconds", "counter", "s", "GPU-seconds held, or CPU-core-seconds.", "train", ("train_job", "device")
)

SERVE_REQUESTS = Metric("danlu_serve_requests", "counter", "requests", "Requests answered.", "serve", ("model", "route", "status"))
SERVE_SECONDS = Metric(
    "danlu_serve_request_seconds", "histogram", "s", "From the request's arrival to its answer.", "serve", ("model", "route"), SECONDS
)
SERVE_QUEUE_SECONDS = Metric(
    "danlu_serve_queue_seconds",
    "histogram",
    "s",
    "Wait of a text for its batch, of a prompt for a place in the cache.",
    "serve",
    ("model",),
    SECONDS,
)
SERVE_BATCH_ROWS = Metric("danlu_serve_batch_rows", "histogram", "rows", "Texts in one forward.", "serve", ("model",), SIZES)
SERVE_BATCH_SECONDS = Metric("danlu_serve_batch_seconds", "histogram", "s", "Time of one forward.", "serve", ("model",), SECONDS)
SERVE_INPUTS = Metric("danlu_serve_inputs", "counter", "texts", "Texts answered.", "serve", ("model",))
SERVE_TOKENS = Metric("danlu_serve_tokens", "counter", "tokens", "Tokens of the texts answered, after cutting.", "serve", ("model",))
SERVE_REFUSALS = Metric("danlu_serve_refusals", "counter", "requests", "Requests refused, by reason.", "serve", ("model", "reason"))
SERVE_IN_FLIGHT = Metric("danlu_serve_in_flight", "gauge", "requests", "Requests being worked on in a replica.", "serve", ("model",))
SERVE_KEY_REQUESTS = Metric(
    "danlu_serve_key_requests",
    "counter",
    "requests",
    "Requests answered, by the name of the key and of its tenant.",
    "serve",
    ("model", "tenant", "key", "status"),
)
SERVE_KEY_TOKENS = Metric(
    "danlu_serve_key_tokens",
    "counter",
    "tokens",
    "Tokens of prompts and answers, by the name of the key and of its tenant, which is the key's own name unless it says another.",
    "serve",
    ("model", "tenant", "key", "kind"),
)
SERVE_KEY_SECONDS = Metric(
    "danlu_serve_key_request_seconds",
    "histogram",
    "s",
    "From a request's arrival to the end of its answer, by the name of the key; keys beyond the first 50 are `other`.",
    "serve",
    ("model", "key"),
    FEW_SECONDS,
    max_values=50,
)
SERVE_TENANT_BUDGET = Metric(
    "danlu_serve_tenant_budget",
    "gauge",
    "USD",
    "What a tenant's requests may cost in seven days (danlu keys budget).",
    "serve",
    ("tenant",),
)
SERVE_DEVICE_SECONDS = Metric(
    "danlu_serve_device_seconds", "counter", "s", "GPU-seconds that replicas have held, or CPU-core-seconds; idle ones count.", "serve",
    ("model", "device"),
)  # fmt: skip
SERVE_COST = Metric(
    "danlu_serve_cost", "counter", "USD", "Device seconds of replicas times their price (metrics/prices.py).", "serve", ("model",)
)
SERVE_KEY_EXPIRY = Metric(
    "danlu_serve_key_expiry_timestamp_seconds", "gauge", "s", "Unix time at which the first of the valid keys expires; 0 if none will.",
    "serve", ("model",),
)  # fmt: skip
SERVE_KEYS_UNREADABLE = Metric(
    "danlu_serve_keys_unreadable", "gauge", "", "1 while the file of keys cannot be read, and those read before go on counting.", "serve",
    ("model",),
)  # fmt: skip

# Of language models: measured around every engine, from the request's arrival on (danlu.serve.sequences).
SERVE_FIRST_TOKEN_SECONDS = Metric(
    "danlu_serve_time_to_first_token_seconds", "histogram", "s", "From the request's arrival to an answer's first token.", "serve",
    ("model",), SECONDS,
)  # fmt: skip
SERVE_INTER_TOKEN_SECONDS = Metric(
    "danlu_serve_inter_token_seconds", "histogram", "s", "From one token of an answer to the next.", "serve", ("model",), SECONDS
)
SERVE_PROMPT_TOKENS = Metric(
    "danlu_serve_prompt_tokens", "counter", "tokens", "Tokens of prompts; a prompt with n answers counts once.", "serve", ("model",)
)
SERVE_CACHED_TOKENS = Metric(
    "danlu_serve_cached_tokens", "counter", "tokens", "Of the tokens of prompts, those found in the prefix cache.", "serve", ("model",)
)
SERVE_COMPLETION_TOKENS = Metric(
    "danlu_serve_completion_tokens", "counter", "tokens", "Tokens made, those of cancelled answers included.", "serve", ("model",)
)
SERVE_SEQUENCES = Metric(
    "danlu_serve_sequences", "counter", "sequences", "Answers ended, by how: stop, length, cancelled, error.", "serve",
    ("model", "finish_reason"),
)  # fmt: skip
# Of language models: numbers of the engine's own (TextEngine.stats), read once a second.
SERVE_RUNNING = Metric("danlu_serve_sequences_running", "gauge", "sequences", "Answers being made.", "serve", ("model",))
SERVE_WAITING = Metric("danlu_serve_sequences_waiting", "gauge", "sequences", "Answers that wait for room.", "serve", ("model",))
SERVE_CACHE_USE = Metric("danlu_serve_kv_cache_usage", "gauge", "ratio", "Share of the KV cache in use, 0 to 1.", "serve", ("model",))
SERVE_PREFIX_QUERIED = Metric(
    "danlu_serve_prefix_queried_tokens", "counter", "tokens", "Tokens looked up in the prefix cache.", "serve", ("model",)
)
SERVE_PREFIX_HIT = Metric("danlu_serve_prefix_hit_tokens", "counter", "tokens", "Tokens found in the prefix cache.", "serve", ("model",))
SERVE_DRAFTED = Metric(
    "danlu_serve_draft_tokens", "counter", "tokens", "Tokens guessed ahead, to be checked by the next step.", "serve", ("model",)
)
SERVE_DRAFTED_RIGHT = Metric(
    "danlu_serve_draft_tokens_right", "counter", "tokens", "Of the tokens guessed ahead, those that were right.", "serve", ("model",)
)
SERVE_KERNELS = Metric(
    "danlu_serve_compiled_kernels", "gauge", "", "1 where compiled kernels make the engine's steps, 0 where PyTorch does.", "serve",
    ("model",),
)  # fmt: skip
SERVE_ADAPTERS = Metric("danlu_serve_adapters", "gauge", "adapters", "LoRA adapters in a replica's memory.", "serve", ("model",))
SERVE_ADAPTER_LOADS = Metric(
    "danlu_serve_adapter_loads", "counter", "", "LoRA adapters asked for at run time, by what came of it: loaded, failed.", "serve",
    ("model", "outcome"),
)  # fmt: skip

ALL: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
