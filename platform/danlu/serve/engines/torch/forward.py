"""The step's forward through an unmodified Hugging Face causal language model: any model whose attention is transformers' interface."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from danlu.errors import ModelError
from danlu.serve.engines.torch.attention import Batch, attend, make_batch
from danlu.serve.engines.torch.cache import Cache, LayerShape
from danlu.serve.engines.torch.scheduler import Piece
from danlu.serve.engines.torch.sequence import Sequence
from danlu.serve.generation import Generation

log = logging.getLogger(__name__)

ATTENTION = "danlu_slots"


class Forward(Protocol):
    """One step."""

    def __call__(self, batch: Batch, cache: Cache) -> torch.Tensor:
        """Logits of the wanted tokens, float32 [wanted, vocabulary]; keys and values of all tokens are in the cache afterwards."""
        ...


@dataclass
class Step:
    """What the attention function is handed through the model's keyword arguments."""

    batch: Batch
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]
    shapes: dict[int, LayerShape] | None = None
    """Filled by a step that is run to learn them."""

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.shapes is not None:
            self.shapes[index] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
            self.layers[index] = tuple(new.new_zeros(1, new.shape[1], len(new), new.shape[2]) for new in (key, value))  # type: ignore[assignment]
        return self.layers[index]


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    danlu_step: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: [1, heads, tokens, head_dim]; returns [1, tokens, heads, head_dim]."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer = danlu_step.layer(int(module.layer_idx), k, v)  # type: ignore[arg-type]
    return attend(layer, danlu_step.batch, q, k, v, scale=scaling, window=sliding_window, softcap=softcap)[None], None


AttentionInterface.register(ATTENTION, slot_attention)


class HuggingFaceForward:
    """The model's own classes, with the attention function exchanged."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    def __call__(self, batch: Batch, cache: Cache) -> torch.Tensor:
        return self._run(Step(batch, cache.layers))

    def shapes(self) -> Mapping[int, LayerShape]:
        """What each layer keeps of a token, as a step of two tokens shows it; ModelError if the model does not come by here."""
        before = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation(ATTENTION)
            step = Step(_trial(self.model, [0, 1]), {}, {})
            self._run(step)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            self.model.set_attn_implementation(before)
            raise _unsuitable(self.model, f"it fails on packed tokens ({type(error).__name__}: {error})") from error
        if not step.shapes:
            raise _unsuitable(self.model, "its attention does not go through transformers' AttentionInterface")
        return step.shapes

    def _run(self, step: Step) -> torch.Tensor:
        batch = step.batch
        # No attention_mask: even one of ones would make some models build their own. A step that wants no logits still makes one token's.
        wanted = batch.wanted if len(batch.wanted) else batch.wanted.new_zeros(1)
        output = self.model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            logits_to_keep=wanted,
            danlu_step=step,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits[: len(batch.wanted)]


@torch.inference_mode()
def check_answers(forward: Forward, reference: torch.Tensor, ids: list[int], cache: Cache, model: PreTrainedModel) -> None:
    """A row read in pieces, then token by token, must get the model's own logits; ModelError if it does not."""
    sequence = _sequence(ids)
    sequence.slot = 0
    third = max(1, len(ids) // 3)
    found = []
    for start, stop in [(0, third), (third, 2 * third), *((i, i + 1) for i in range(2 * third, len(ids)))]:
        batch = make_batch([Piece(sequence, start, stop)], device=model.device, all_wanted=True)
        found.append(forward(batch, cache).cpu())
    difference = float((torch.cat(found) - reference).abs().max() / reference.abs().max().clamp_min(1e-6))
    tolerance = 1e-3 if model.dtype == torch.float32 else 6e-2
    if not difference <= tolerance:
        raise _unsuitable(model, f"packed and cached it gives other logits than by itself (they differ by {difference:.1e} of the largest)")


@torch.inference_mode()
def own_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The model's own logits of a row, float32 [tokens, vocabulary], before anything is exchanged in it."""
    row = torch.tensor([ids], device=model.device)
    logits: torch.Tensor = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0].float().cpu()
    return logits


def trial_row(model: PreTrainedModel) -> list[int]:
    """Random tokens; more than a sliding window, where that is short enough to try."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    length = min(window + 8 if isinstance(window, int) and window <= 128 else 24, getattr(config, "max_position_embeddings", None) or 24)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()


def _sequence(ids: list[int]) -> Sequence:
    return Sequence(Generation("trial", tuple(ids)), list(ids), 1)


def _trial(model: PreTrainedModel, ids: list[int]) -> Batch:
    sequence = _sequence(ids)
    sequence.slot = 0
    return make_batch([Piece(sequence, 0, len(ids))], device=model.device)


def _unsuitable(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} cannot be served by engine.kind=torch: {why}", where="engine", fix="a decoder of the Llama or Qwen kind"
    )
