"""A model ready for steps: its forward, its cache, and whoever reads requests for it. Checked before it serves."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from danlu.artifact.bundle import Bundle
from danlu.errors import ModelError, QualityError
from danlu.serve.engines.torch.attention import make_batch
from danlu.serve.engines.torch.cache import Cache, num_slots
from danlu.serve.engines.torch.forward import Forward, HuggingFaceForward, check_answers, own_logits, trial_row
from danlu.serve.engines.torch.fused import FusedForward, can_be_fused
from danlu.serve.engines.torch.linear import exchange_linears
from danlu.serve.engines.torch.load import Loaded, load
from danlu.serve.engines.torch.lora import Adapters
from danlu.serve.engines.torch.requests import Reader
from danlu.serve.engines.torch.scheduler import Piece
from danlu.serve.engines.torch.sequence import Sequence
from danlu.serve.generation import Generation
from danlu.spec.serve import Torch

log = logging.getLogger(__name__)

TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""How far a probe's loss (nats a token) may be from the evaluation's: kernels differ between CPUs, and the evaluation computes in bf16
over float32 weights where the engine's weights are bf16 too."""


@dataclass(frozen=True)
class Runner:
    """What a step needs."""

    forward: Forward
    cache: Cache
    reader: Reader
    adapters: Adapters
    device: torch.device


def make_runner(spec: Torch, bundle: Bundle | None) -> Runner:
    """Load, check that packed and cached answers are the model's own, and that a bundle's probes come out as its evaluation had them."""
    loaded = load(spec, bundle)
    runner = None
    if can_be_fused(loaded.model):
        try:
            runner = _assemble(spec, loaded, fuses=True)
        except ModelError as error:
            log.warning("the fused forward does not fit this model (%s): its own classes answer, more slowly", error.problem)
            loaded = load(spec, bundle)  # the fused forward has taken the other one's weights
    runner = runner or _assemble(spec, loaded, fuses=False)
    if bundle is not None:
        check_probes(runner, loaded, bundle, spec.max_num_batched_tokens)
    return runner


def _assemble(spec: Torch, loaded: Loaded, *, fuses: bool) -> Runner:
    """ModelError if its answers are not the model's own."""
    model = loaded.model
    ids = trial_row(model)[: loaded.max_model_len]
    reference = own_logits(model, ids)
    plain = HuggingFaceForward(model)
    shapes = plain.shapes()
    forward: Forward = plain
    if fuses:
        forward = fused = FusedForward(model, loaded.max_model_len)
        linears = fused.linears
    else:
        linears = exchange_linears(model, model.get_output_embeddings())
    slots = num_slots(shapes, loaded.max_model_len, spec.kv_cache_memory_gb * 2**30, model.dtype, max_num_seqs=spec.max_num_seqs)
    cache = Cache(shapes, slots, loaded.max_model_len, dtype=model.dtype, device=model.device)
    check_answers(forward, reference, ids, cache, model)
    reader = Reader(loaded.tokenizer, loaded.vocab_size, loaded.max_model_len, loaded.end_ids)
    adapters = Adapters(linears, max_loras=spec.max_loras, dtype=model.dtype, device=model.device)
    return Runner(forward, cache, reader, adapters, model.device)


def check_probes(runner: Runner, loaded: Loaded, bundle: Bundle, chunk: int) -> None:
    """What is served is what was evaluated: the probes' losses have to come out again."""
    meta = bundle.meta
    low = meta.precision == "bf16" or loaded.model.dtype != torch.float32 or meta.quantization is not None
    for probe in meta.probes:
        if probe.loss is None:
            continue
        ids = loaded.tokenizer(probe.text, truncation=True, max_length=min(meta.max_length, loaded.max_model_len))["input_ids"]
        loss = _loss(runner, list(ids), chunk)
        if abs(loss - probe.loss) > TOLERANCE["bf16" if low else "fp32"] * max(1.0, probe.loss):
            raise QualityError(
                f"the engine finds a loss of {loss:.4f} nats a token where the bundle's evaluation found {probe.loss:.4f}",
                where=f"{meta.name}: probe {probe.text[:60]!r}",
                fix="the same library versions as in the bundle's lineage, or evaluate and store it again",
            )


def _loss(runner: Runner, ids: list[int], chunk: int) -> float:
    """Mean nats of the tokens behind the first."""
    sequence = Sequence(Generation("probe", tuple(ids)), ids, 1)
    sequence.slot = 0
    total = 0.0
    for start in range(0, len(ids), min(chunk, 128)):
        stop = min(len(ids), start + min(chunk, 128))
        batch = make_batch([Piece(sequence, start, stop)], device=runner.device, all_wanted=True)
        logits = runner.forward(batch, runner.cache)
        targets = torch.tensor(ids[start + 1 : stop + 1], device=logits.device)
        total += float(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum")) if len(targets) else 0.0
    return total / max(1, len(ids) - 1) if not math.isnan(total) else math.inf
