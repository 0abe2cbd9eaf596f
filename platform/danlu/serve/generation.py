"""What a language-model engine is asked for and what it answers, piece by piece; and the engine's protocol. Pure."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from danlu.metrics.catalog import Metric

FinishReason = Literal["stop", "length"]
"""`stop`: an end-of-text token, a stop text or id, or a guide that is complete. `length`: max_tokens, or the model's last position."""


@dataclass(frozen=True)
class Chat:
    """A conversation, rendered by the engine with the tokenizer's own chat template and nothing else."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True)
class Guide:
    """What the output must match, from the first token to the last."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "tool_calls"]
    pattern: str = ""
    """The JSON Schema as JSON, the regular expression, or the choices as a JSON list; empty for json_object. tool_calls: any text, in
    which calls are well formed: `{"tools": {name: schema of its arguments}, "strict": whether an answer without calls will not do,
    "answer": schema of what is no call, or null, "answer_param": who asks for that}`."""
    param: str = "guide"
    """The request's field that asks for it, which an error names."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names and meanings are OpenAI's and vLLM's. Penalties count as they do there."""

    max_tokens: int | None = None
    """New tokens at most; None is as many as the model has positions left. 0 only reads the prompt, for its log probabilities."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is all."""
    min_p: float = 0.0
    seed: int | None = None
    """The same seed and prompt give the same tokens, whatever else is in the batch."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no log probabilities; k: those of the chosen token and of the k most probable ones, before temperature and penalties."""
    prompt_logprobs: bool = False
    """The prompt's tokens too, with as many alternatives as `logprobs` (at least the token itself)."""


@dataclass(frozen=True)
class Generation:
    """One sequence to be continued. `n` choices are n of these."""

    request_id: str
    prompt: Prompt
    sampling: Sampling = Sampling()
    adapter: str | None = None
    """A loaded adapter's name; None is the base model."""
    guide: Guide | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log probability (natural logarithm; None for the first token of a prompt) and the most probable ones in its place."""

    token_id: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one sequence: read, of those found in the prefix cache, and made."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Delta:
    """A piece of the answer. The last one, and only that, has a finish_reason and the usage. A stop text is never sent."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    """All that were made, also those without a text of their own (the end of the text, a stop); `completion_tokens` is their number."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids`, if asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """On the first delta, if asked for."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    begun: float | None = None
    """On the first delta, of an engine that lets sequences wait: time.perf_counter() when it began to read the prompt."""


@runtime_checkable
class TextEngine(Protocol):
    """start once; generate from any number of coroutines at a time; stop once.

    Errors are raised, never yielded: RequestError for what the client can mend (a prompt that can never fit, an unknown adapter, a
    guide that does not compile), anything else for what it cannot. Closing the iterator cancels and frees what the sequence held.
    """

    max_model_len: int

    async def start(self) -> None:
        """Load, and answer the bundle's probes as the evaluation did; QualityError if the answers differ."""
        ...

    def generate(self, generation: Generation) -> AsyncGenerator[Delta]:
        """The answer, piece by piece, as it is made; exactly one terminal delta, or an error. `aclose()` cancels."""
        ...

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The ids `generate` would read; chats are rendered with the generation prompt. RequestError if the template refuses them."""
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids; RequestError for one outside the vocabulary."""
        ...

    async def load_adapter(self, name: str, source: str, *, in_place: bool = False) -> None:
        """Make a LoRA adapter (a PEFT folder, or a bundle, also of the store) answer to `name`, while others generate; ModelError names why
        it cannot. `in_place`: one that has the name already gives it up, once the new one is known to be servable."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; sequences that use it finish first."""
        ...

    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        ...

    def stats(self) -> Mapping[Metric, float]:
        """Running, waiting, cache use (0-1): numbers of now; prefix tokens queried and hit: totals since the start."""
        ...

    def check_health(self) -> None:
        """Raises if no answer can be expected any more."""
        ...

    async def stop(self) -> None:
        """Finish what has begun, then end the engine's thread."""
        ...
