"""Every metric once: name, kind, unit, labels, help. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass(frozen=True)
class Metric:
    """One metric. `labels` are closed: a value for each has to be given, and no other."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    layer: Literal["train", "serve"]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Its name on Ray's metrics port: Ray puts `ray_` before it and `_total` behind a counter."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


TRAIN_LOSS = Metric("danlu_train_loss", "gauge", "nats", "Mean loss of the last step's targets.", "train", ("job",))
TRAIN_LEARNING_RATE = Metric("danlu_train_learning_rate", "gauge", "", "Learning rate of the last step.", "train", ("job",))
TRAIN_GRAD_NORM = Metric("danlu_train_grad_norm", "gauge", "", "Global gradient norm before clipping.", "train", ("job",))
TRAIN_STEP = Metric("danlu_train_step", "gauge", "steps", "Optimizer steps done.", "train", ("job",))
TRAIN_TOKENS = Metric(
    "danlu_train_tokens", "counter", "tokens", "Tokens trained on, padding not counted, replayed ones included.", "train", ("job",)
)
TRAIN_TOKENS_PER_SECOND = Metric("danlu_train_tokens_per_second", "gauge", "tokens/s", "Over the last 20 steps.", "train", ("job",))
TRAIN_STEP_SECONDS = Metric("danlu_train_step_seconds", "histogram", "s", "Wall time of an optimizer step.", "train", ("job",), SECONDS)
TRAIN_ETA = Metric("danlu_train_eta_seconds", "gauge", "s", "Time left at the speed of the last 20 steps.", "train", ("job",))
TRAIN_EVAL = Metric("danlu_train_eval", "gauge", "", "Score of the dev split.", "train", ("job", "metric"))
TRAIN_CHECKPOINT_SECONDS = Metric(
    "danlu_train_checkpoint_seconds", "histogram", "s", "Time to save a checkpoint.", "train", ("job",), SECONDS
)
TRAIN_RESUMED = Metric("danlu_train_resumed", "counter", "", "Times a run went on from a checkpoint.", "train", ("job",))

SERVE_REQUESTS = Metric("danlu_serve_requests", "counter", "requests", "Requests answered.", "serve", ("model", "route", "status"))
SERVE_SECONDS = Metric(
    "danlu_serve_request_seconds", "histogram", "s", "From the request's arrival to its answer.", "serve", ("model", "route"), SECONDS
)
SERVE_QUEUE_SECONDS = Metric(
    "danlu_serve_queue_seconds", "histogram", "s", "How long a text waited for its batch.", "serve", ("model",), SECONDS
)
SERVE_BATCH_ROWS = Metric("danlu_serve_batch_rows", "histogram", "rows", "Texts in one forward.", "serve", ("model",), SIZES)
SERVE_BATCH_SECONDS = Metric("danlu_serve_batch_seconds", "histogram", "s", "Time of one forward.", "serve", ("model",), SECONDS)
SERVE_INPUTS = Metric("danlu_serve_inputs", "counter", "texts", "Texts answered.", "serve", ("model",))
SERVE_TOKENS = Metric("danlu_serve_tokens", "counter", "tokens", "Tokens of the texts answered, after cutting.", "serve", ("model",))
SERVE_REFUSALS = Metric("danlu_serve_refusals", "counter", "requests", "Requests refused, by reason.", "serve", ("model", "reason"))
SERVE_IN_FLIGHT = Metric("danlu_serve_in_flight", "gauge", "requests", "Requests being worked on in a replica.", "serve", ("model",))

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
    "danlu_serve_prefix_queried_tokens", "gauge", "tokens", "Tokens looked up in the prefix cache since the start.", "serve", ("model",)
)
SERVE_PREFIX_HIT = Metric(
    "danlu_serve_prefix_hit_tokens", "gauge", "tokens", "Tokens found in the prefix cache since the start.", "serve", ("model",)
)

ALL: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
