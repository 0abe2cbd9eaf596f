"""The step's forward in plain PyTorch for the Llama family (Llama, Qwen2, Qwen3, Mistral): the same weights, a third of the operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel

from danlu.compress.weight_only import WeightOnlyLinear
from danlu.serve.engines.torch.attention import Batch, attend
from danlu.serve.engines.torch.cache import Cache
from danlu.serve.engines.torch.kernels import Kernels
from danlu.serve.engines.torch.linear import Linear
from danlu.serve.engines.torch.native import NativeStep
from danlu.serve.engines.torch.pages import Pages

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone; others change with the length of the text."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its four products and its norms' weights."""

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    norm_in: torch.Tensor
    norm_mlp: torch.Tensor
    norm_qk: torch.Tensor | None
    """Qwen3's, of query heads and then key heads: [heads + kv heads, head_dim]."""
    window: int | None


class FusedForward:
    """Query, key and value in one product, gate and up in another, rotary angles looked up, residuals added in place. With the compiled
    kernels they make the whole step."""

    def __init__(self, model: PreTrainedModel, max_model_len: int, kernels: Kernels | None = None) -> None:
        config, backbone = model.config, model.model
        names = {module: name for name, module in model.named_modules()}
        self.embedding: torch.Tensor = backbone.embed_tokens.weight.detach()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps = config.rms_norm_eps
        positions = torch.arange(max_model_len, device=model.device)[None]
        cos, sin = backbone.rotary_emb(self.embedding[:1, None], positions)
        half = self.head_dim // 2
        self.cos = cos[0].clone()
        # x * cos + rotate_half(x) * sin, where rotate_half negates what it moves up: the sign may as well stand in the table.
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        self.kernels = kernels
        self.pages = Pages()
        self.layers = [self._layer(layer, names) for layer in backbone.layers]
        self.norm: torch.Tensor = backbone.norm.weight.detach()
        self.head = Linear([(names[model.lm_head], model.lm_head)], kernels, dtype=self.embedding.dtype, empty=self.pages.empty)
        self.native = None if kernels is None else NativeStep(kernels, self)

    @property
    def linears(self) -> list[Linear]:
        """All products but the head's."""
        return [linear for one in self.layers for linear in (one.qkv, one.out, one.gate_up, one.down)]

    def __call__(self, batch: Batch, cache: Cache) -> torch.Tensor:
        if self.native is not None:
            return self.native(batch, cache)
        hidden = self.embedding[batch.input_ids]
        cos, sin = self.cos[batch.position_ids, None], self.sin[batch.position_ids, None]
        for layer, kept in zip(self.layers, cache.layers.values(), strict=True):
            hidden += self._attention(layer, rms_norm(hidden, hidden.shape[1:], layer.norm_in, self.eps), cos, sin, batch, kept)
            gate, up = layer.gate_up(rms_norm(hidden, hidden.shape[1:], layer.norm_mlp, self.eps)).chunk(2, dim=-1)
            hidden += layer.down(silu(gate).mul_(up))
        wanted = hidden[batch.wanted]
        if not len(wanted):
            return wanted.new_zeros(0, self.head.shape[0], dtype=torch.float32)
        return self.head(rms_norm(wanted, wanted.shape[1:], self.norm, self.eps)).float()

    def _attention(
        self, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch, kept: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        qkv = layer.qkv(x).view(len(x), -1, self.head_dim)
        qk, value = qkv[:, : self.heads + self.kv_heads], qkv[:, self.heads + self.kv_heads :]
        if layer.norm_qk is not None:
            qk = rms_norm(qk, (self.head_dim,), None, self.eps).mul_(layer.norm_qk)
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
        query, key = qk[:, : self.heads], qk[:, self.heads :]
        seen = attend(kept, batch, query, key, value, scale=self.head_dim**-0.5, window=layer.window)
        return layer.out(seen.view(len(x), -1))

    def _layer(self, layer: Any, names: dict[nn.Module, str]) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp

        def product(*modules: nn.Linear | WeightOnlyLinear) -> Linear:
            made = Linear([(names[module], module) for module in modules], self.kernels, dtype=self.embedding.dtype, empty=self.pages.empty)
            for module in modules:  # a second copy of a model is what nobody has room for
                nothing = module.weight.new_empty(0)
                module.weight = nothing if isinstance(module, WeightOnlyLinear) else nn.Parameter(nothing, requires_grad=False)
            return made

        norm_qk = None
        if hasattr(attention, "q_norm"):
            norm_qk = torch.cat(
                [attention.q_norm.weight.expand(self.heads, -1), attention.k_norm.weight.expand(self.kv_heads, -1)]
            ).detach()
        return Layer(
            product(attention.q_proj, attention.k_proj, attention.v_proj),
            product(attention.o_proj),
            product(mlp.gate_proj, mlp.up_proj),
            product(mlp.down_proj),
            layer.input_layernorm.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            norm_qk,
            attention.sliding_window if hasattr(attention, "sliding_window") else _window(attention),
        )


def can_be_fused(model: PreTrainedModel) -> bool:
    """Whether the model is one of those that this forward is written for, with nothing exchanged in it."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    plain = rope.get("rope_type", "default") in ROPES and rope.get("partial_rotary_factor", 1.0) == 1.0
    shapes = config.model_type in FAMILIES and config.hidden_act == "silu" and plain
    # bitsandbytes' linears and adapters bring their own classes; bottleneck adapters are hooks.
    products = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        return False
    return shapes and all(type(module) in (nn.Linear, WeightOnlyLinear) and not module._forward_hooks for module in products)


def _window(attention: Any) -> int | None:
    """Mistral reads it from the config at each call."""
    window: int | None = getattr(attention.config, "sliding_window", None) if attention.config.model_type == "mistral" else None
    return window
