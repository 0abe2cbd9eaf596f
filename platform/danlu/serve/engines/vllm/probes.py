"""What is served is what was evaluated: a bundle's probes, asked of a running engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from danlu.artifact.bundle import Bundle, Probe
from danlu.errors import QualityError
from danlu.serve.engines.torch.requests import Reader
from danlu.serve.generation import Chat, TokenLogprob
from danlu.tasks.agreement import Tolerance, change, tolerance

Score = Callable[[Sequence[int]], Awaitable[Sequence[TokenLogprob]]]
"""The log probabilities of a text's tokens, the most probable one beside each."""


async def check_probes(score: Score, reader: Reader, bundle: Bundle, *, served_in_fp32: bool) -> None:
    """QualityError if a loss, a token or a log probability is another than the evaluation's, or if no probe fits."""
    meta, within = bundle.meta, tolerance(bundle.meta, served_in_fp32=served_in_fp32)
    asked = False
    for probe in meta.probes:
        texts: list[tuple[list[int], Callable[[Sequence[TokenLogprob]], str | None]]] = []
        if probe.loss is not None:
            ids = list(reader.tokenizer(probe.text, truncation=True, max_length=meta.max_length)["input_ids"])
            texts.append((ids, lambda found, probe=probe: _other_loss(found, probe, within)))  # type: ignore[misc]
        if probe.completion_token_ids:
            # The evaluation's own tokens are put in: a near tie that falls the other way must not make all that follows another text.
            ids = [*probe.prompt_token_ids, *probe.completion_token_ids]
            texts.append((ids, lambda found, probe=probe: _other_completion(found, probe, within, reader)))  # type: ignore[misc]
            if probe.messages and reader.tokenize(Chat(probe.messages, probe.tools)) != probe.prompt_token_ids:
                raise _other(bundle, probe, "makes other tokens of the conversation: another chat template or tokenizer")
        for ids, judge in texts:
            if len(ids) >= reader.max_model_len:
                continue
            asked = True
            if (problem := judge(await score(ids))) is not None:
                raise _other(bundle, probe, problem)
    if meta.probes and not asked:
        raise QualityError(
            f"none of the bundle's {len(meta.probes)} probes fits into max_model_len={reader.max_model_len}, so nothing says that what is "
            "served is what was evaluated",
            where="engine.max_model_len",
            fix="a larger one",
        )


def _other_loss(found: Sequence[TokenLogprob], probe: Probe, within: Tolerance) -> str | None:
    own = [one.logprob for one in found if one.logprob is not None]
    loss = -sum(own) / len(own) if own else 0.0
    assert probe.loss is not None
    if change(loss, probe.loss) <= within.loss:
        return None
    return f"finds a loss of {loss:.4f} nats a token where the bundle's evaluation found {probe.loss:.4f}"


def _other_completion(found: Sequence[TokenLogprob], probe: Probe, within: Tolerance, reader: Reader) -> str | None:
    made = found[-len(probe.completion_token_ids) :]
    for one, expected in zip(made, probe.logprobs, strict=True):
        assert one.logprob is not None
        text = reader.token_text(one.token_id)
        if not change(one.logprob, expected) <= within.logprob:
            return f"gives {text!r} a log probability of {one.logprob:.4f} where the bundle's evaluation gave it {expected:.4f}"
        if one.top[0][2] - one.logprob > 2 * within.logprob * max(1.0, abs(expected)):
            return f"would not say {text!r}, which the bundle's evaluation found the most probable"
    return None


def _other(bundle: Bundle, probe: Probe, problem: str) -> QualityError:
    return QualityError(
        f"vLLM {problem}",
        where=f"{bundle.meta.name}: probe {probe.text[:60]!r}",
        fix="engine.dtype as it was evaluated, another vLLM, or engine.kind: torch",
    )
