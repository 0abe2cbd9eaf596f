"""A model ready for steps: its forward, its cache, and whoever reads requests for it. Checked before it serves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from danlu.artifact.bundle import Bundle, BundleMeta, Probe
from danlu.compiled import KernelsUnavailable
from danlu.errors import ModelError, QualityError
from danlu.serve.engines.torch.attention import make_batch
from danlu.serve.engines.torch.cache import Cache, LayerShape, num_slots
from danlu.serve.engines.torch.draft_model import DraftModel
from danlu.serve.engines.torch.forward import Forward, HuggingFaceForward, check_answers, own_logits, trial_row
from danlu.serve.engines.torch.fused import FusedForward, can_be_fused
from danlu.serve.engines.torch.kernels import Kernels, load_kernels, need_kernels
from danlu.serve.engines.torch.linear import exchange_linears
from danlu.serve.engines.torch.load import Loaded, load, load_draft
from danlu.serve.engines.torch.lora import Adapters
from danlu.serve.engines.torch.requests import Reader
from danlu.serve.engines.torch.scheduler import Piece
from danlu.serve.engines.torch.sequence import Sequence
from danlu.serve.generation import Chat, Generation
from danlu.spec.serve import Torch
from danlu.tasks.agreement import Tolerance, change, tolerance

log = logging.getLogger(__name__)

Tier = Literal["compiled kernels", "fused PyTorch", "the model's own classes"]
"""Who runs a step, the fastest first. Their answers are the same."""


@dataclass(frozen=True)
class Runner:
    """What a step needs."""

    forward: Forward
    cache: Cache
    reader: Reader
    adapters: Adapters
    device: torch.device
    tier: Tier
    draft: DraftModel | None = None


def make_runner(spec: Torch, bundle: Bundle | None) -> Runner:
    """Load, check that packed and cached answers are the model's own, and that a bundle's probes come out as its evaluation had them."""
    loaded = load(spec, bundle)
    if spec.draft_model is None:
        runner, loaded = _fastest(spec, loaded, lambda: load(spec, bundle), ())
    else:
        draft = load_draft(spec, loaded)
        shapes, beside = _shapes(loaded.model), _shapes(draft.model)
        runner, loaded = _fastest(spec, loaded, lambda: load(spec, bundle), beside)
        slots = {"max_num_seqs": runner.cache.num_slots}  # the budget holds as many of the two models' once more
        guessing, draft = _fastest(spec.model_copy(update=slots), draft, lambda: load_draft(spec, loaded), shapes)
        tokens = {"vocab_size": draft.vocab_size, "num_target_tokens": loaded.vocab_size}
        by = DraftModel(guessing.forward, guessing.cache, guessing.device, **tokens, chunk=spec.prefill_chunk_tokens)
        runner = replace(runner, draft=by)
    if bundle is not None:
        check_probes(runner, loaded, bundle, spec.max_num_batched_tokens)
    return runner


def _fastest(spec: Torch, loaded: Loaded, again: Callable[[], Loaded], beside: Collection[LayerShape]) -> tuple[Runner, Loaded]:
    """By the fastest of the ways whose answers are the model's own, and the model as it was loaded for that. `beside`: what else the
    cache's budget holds of each token."""
    kernels = _kernels(spec, loaded.model)
    tiers: list[Tier] = ["the model's own classes"]
    if can_be_fused(loaded.model):
        tiers = ["fused PyTorch", *tiers] if kernels is None else ["compiled kernels", "fused PyTorch", *tiers]
    for tier in tiers:
        try:
            runner = _assemble(spec, loaded, tier, kernels, beside)
        except ModelError as error:
            if tier == tiers[-1]:
                raise
            log.warning("not by %s, which gives other answers (%s): this model is answered more slowly", tier, error.problem)
            loaded = again()  # they have taken the other one's weights
        else:
            break
    log.info("a step is run by %s", f"{tier} for {kernels.vectors}" if kernels is not None and tier == "compiled kernels" else tier)
    return runner, loaded


def _shapes(model: PreTrainedModel) -> Collection[LayerShape]:
    """Of a model that stays as it is."""
    before = model.config._attn_implementation
    found = HuggingFaceForward(model).shapes().values()
    model.set_attn_implementation(before)
    return found


def _kernels(spec: Torch, model: PreTrainedModel) -> Kernels | None:
    """The compiled kernels, where they are wanted and this machine and model are theirs; the log says why not."""
    if spec.kernels == "off" or model.device.type != "cpu":
        return None
    try:
        need_kernels(model.dtype)
        return load_kernels()
    except KernelsUnavailable as error:
        log.warning("no compiled kernels, so answers come more slowly: %s", error)
        return None


def _assemble(spec: Torch, loaded: Loaded, tier: Tier, kernels: Kernels | None, beside: Collection[LayerShape]) -> Runner:
    """ModelError if its answers are not the model's own."""
    model = loaded.model
    ids = trial_row(model)[: loaded.max_model_len]
    reference = own_logits(model, ids)
    plain = HuggingFaceForward(model)
    shapes = plain.shapes()
    forward: Forward = plain
    if tier != "the model's own classes":
        forward = fused = FusedForward(model, loaded.max_model_len, kernels if tier == "compiled kernels" else None)
        linears = fused.linears
    else:
        linears = exchange_linears(model, model.get_output_embeddings())
    kept, budget = [*shapes.values(), *beside], spec.kv_cache_memory_gb * 2**30
    slots = num_slots(kept, loaded.max_model_len, budget, model.dtype, max_num_seqs=spec.max_num_seqs)
    cache = Cache(shapes, slots, loaded.max_model_len, dtype=model.dtype, device=model.device)
    check_answers(forward, reference, ids, cache, model)
    reader = Reader(loaded.tokenizer, loaded.vocab_size, loaded.max_model_len, loaded.end_ids)
    adapters = Adapters(linears, max_loras=spec.max_loras, dtype=model.dtype, device=model.device)
    return Runner(forward, cache, reader, adapters, model.device, tier)


def check_probes(runner: Runner, loaded: Loaded, bundle: Bundle, chunk: int) -> None:
    """What is served is what was evaluated: the probes' losses, tokens and log probabilities have to come out again."""
    within = tolerance(bundle.meta, served_in_fp32=loaded.model.dtype == torch.float32)
    asked = False
    for probe in bundle.meta.probes:
        try:
            asked |= _check_loss(runner, loaded, bundle.meta, probe, within, chunk)
            asked |= _check_completion(runner, loaded, probe, within, chunk)
        except _OtherAnswer as error:
            raise QualityError(
                f"the engine {error}",
                where=f"{bundle.meta.name}: probe {probe.text[:60]!r}",
                fix="the same library versions as in the bundle's lineage, or evaluate and store it again",
            ) from error
    if bundle.meta.probes and not asked:
        raise QualityError(
            f"none of the bundle's {len(bundle.meta.probes)} probes fits into max_model_len={loaded.max_model_len}, so nothing says that "
            "what is served is what was evaluated",
            where="engine.max_model_len",
            fix="a larger one",
        )


class _OtherAnswer(Exception):
    """What the engine does where the evaluation did something else."""


def _check_loss(runner: Runner, loaded: Loaded, meta: BundleMeta, probe: Probe, within: Tolerance, chunk: int) -> bool:
    """False if there is nothing to ask, or no room for it."""
    if probe.loss is None:
        return False
    ids = list(loaded.tokenizer(probe.text, truncation=True, max_length=meta.max_length)["input_ids"])
    if len(ids) > loaded.max_model_len:
        return False
    own, _ = _logprobs(runner, ids, chunk)
    loss = -float(own.mean()) if len(own) else 0.0
    if not change(loss, probe.loss) <= within.loss:
        raise _OtherAnswer(f"finds a loss of {loss:.4f} nats a token where the bundle's evaluation found {probe.loss:.4f}")
    return True


def _check_completion(runner: Runner, loaded: Loaded, probe: Probe, within: Tolerance, chunk: int) -> bool:
    """The evaluation's own tokens are put in, so that a near tie that falls the other way does not make all that follows another text."""
    prompt, made = probe.prompt_token_ids, probe.completion_token_ids
    if not made or len(prompt) + len(made) > loaded.max_model_len:
        return False
    if probe.messages and runner.reader.tokenize(Chat(probe.messages, probe.tools)) != prompt:
        raise _OtherAnswer("makes other tokens of the conversation than the bundle's evaluation did: another chat template or tokenizer")
    own, best = (found[-len(made) :].tolist() for found in _logprobs(runner, [*prompt, *made], chunk))
    for token, logprob, most, expected in zip(made, own, best, probe.logprobs, strict=True):
        text = loaded.tokenizer.decode([token])
        if not change(logprob, expected) <= within.logprob:
            raise _OtherAnswer(f"gives {text!r} a log probability of {logprob:.4f} where the bundle's evaluation gave it {expected:.4f}")
        if most - logprob > 2 * within.logprob * max(1.0, abs(expected)):
            raise _OtherAnswer(f"would not say {text!r}, which the bundle's evaluation found the most probable")
    return True


@torch.inference_mode()
def _logprobs(runner: Runner, ids: list[int], chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token behind the first: its log probability, and the highest of any; float32 [tokens - 1], on the CPU."""
    sequence = Sequence(Generation("probe", tuple(ids)), ids, 1)
    sequence.slot = 0
    own, best = [torch.empty(0)], [torch.empty(0)]
    for start in range(0, len(ids), min(chunk, 128)):
        stop = min(len(ids), start + min(chunk, 128))
        batch = make_batch([Piece(sequence, start, stop)], device=runner.device, all_wanted=True)
        targets = torch.tensor(ids[start + 1 : stop + 1], device=runner.device)
        logprobs = runner.forward(batch, runner.cache)[: len(targets)].log_softmax(-1)
        own.append(logprobs.gather(1, targets[:, None])[:, 0].cpu())
        best.append(logprobs.amax(-1).cpu())
    return torch.cat(own), torch.cat(best)
