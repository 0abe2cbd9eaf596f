"""BERT's layer and those of its kin as one step of autograd: by the compiled kernels.

The modules, their parameters and their answers stay. A layer is run this way while it learns under bf16 autocast on packed rows, and only
if it is made of exactly what is computed here: an adapter, a hook or a parameter that is somebody's own takes the layer's own way.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from danlu.tasks.fused_attention import STEP, attend, attend_backward
from danlu.tasks.kernels import Kernels, NormCall, draw_seed, kernels, loaded
from danlu.tasks.products import BLOCK, Products

LAYERS = ("bert.modeling_bert.BertLayer", "roberta.modeling_roberta.RobertaLayer", "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer",
          "electra.modeling_electra.ElectraLayer", "camembert.modeling_camembert.CamembertLayer")  # fmt: skip
"""Classes of transformers.models whose layers are one."""

PARTS = {
    "attention.self.query": nn.Linear,
    "attention.self.key": nn.Linear,
    "attention.self.value": nn.Linear,
    "attention.self.dropout": nn.Dropout,
    "attention.output.dense": nn.Linear,
    "attention.output.dropout": nn.Dropout,
    "attention.output.LayerNorm": nn.LayerNorm,
    "intermediate.dense": nn.Linear,
    "intermediate.intermediate_act_fn": GELUActivation,
    "output.dense": nn.Linear,
    "output.dropout": nn.Dropout,
    "output.LayerNorm": nn.LayerNorm,
}
WITH_PARAMETERS = (nn.Linear, nn.LayerNorm)


def use_fused_layers(model: PreTrainedModel) -> None:
    """Put the way in one step before the model's own layers, in place."""
    for module in model.modules():
        cls = type(module)
        if f"{cls.__module__}.{cls.__qualname__}".removeprefix("transformers.models.") in LAYERS:
            # The class, not the bound method: copies of the module are whole.
            module.__class__ = type(cls.__name__, (FusedLayer, cls), {"__module__": cls.__module__})


class FusedLayer(nn.Module):
    """A layer of LAYERS."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Hidden states [1, tokens, width] to the same."""
        starts = kwargs.get("cu_seqlens")
        if kernels() is None or starts is None or attention_mask is not None or not _can_be_fused(self, hidden_states):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        parameters = [getattr(part, name) for part in _parts(self) if type(part) in WITH_PARAMETERS for name in ("weight", "bias")]
        out, rounded = _Layer.apply(hidden_states, rounded_of(hidden_states), starts, _settings(self), *parameters)  # type: ignore[no-untyped-call]
        # The next layer's products read them rounded: they were at hand, in the caches.
        out.rounded, out.rounded_version = rounded, out._version
        return out


def rounded_of(hidden: torch.Tensor) -> torch.Tensor | None:
    """Hidden states in bf16 [tokens, width], if the layer before has left them and nobody has changed them since."""
    return getattr(hidden, "rounded", None) if getattr(hidden, "rounded_version", None) == hidden._version else None


def _parts(layer: nn.Module) -> list[nn.Module]:
    return [layer.get_submodule(name) for name in PARTS]


def _can_be_fused(layer: Any, hidden: torch.Tensor) -> bool:
    learns = torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in layer.parameters()))
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if not (learns and autocast and hidden.device.type == "cpu" and hidden.dtype == torch.float32 and len(hidden) == 1):
        return False
    if torch.compiler.is_compiling() or layer.is_decoder or layer.add_cross_attention or layer.chunk_size_feed_forward:
        return False
    if layer.attention.self.attention_head_size % STEP:
        return False
    found = dict(layer.named_modules())
    inner = {
        "": type(layer),
        **PARTS,
        **dict.fromkeys(("attention", "attention.self", "attention.output", "intermediate", "output")),
    }
    if found.keys() != inner.keys() or any(cls is not None and type(found[name]) is not cls for name, cls in inner.items()):
        return False
    if layer.intermediate.intermediate_act_fn.act is not nn.functional.gelu:
        return False
    if any(_has_hooks(module) for name, module in found.items() if name):
        return False
    return all(type(p) is nn.Parameter and p.dtype == torch.float32 and p.is_contiguous() for p in layer.parameters())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _settings(layer: Any) -> dict[str, Any]:
    """What a pass of the layer has besides tensors; seeds are drawn now, in the order of the layer's own dropouts."""
    dropouts = (layer.attention.self.dropout, layer.attention.output.dropout, layer.output.dropout)
    shares = [dropout.p if dropout.training else 0.0 for dropout in dropouts]
    return {
        "heads": layer.attention.self.num_attention_heads,
        "dim": layer.attention.self.attention_head_size,
        "in_blocks": all(size % BLOCK == 0 for size in layer.intermediate.dense.weight.shape),
        "scaling": layer.attention.self.scaling,
        "epsilon": (layer.attention.output.LayerNorm.eps, layer.output.LayerNorm.eps),
        "dropout": shares,
        "seed": [draw_seed() if share else 0 for share in shares],
    }


class _Layer(torch.autograd.Function):
    """hidden: float32 [1, tokens, width], and rounded if it is at hand; the same of the answer. What is kept for the backward is bf16, but
    for what the norms had normed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        rounded_hidden: torch.Tensor | None,
        starts: torch.Tensor,
        settings: dict[str, Any],
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = loaded()
        q, q_bias, k, k_bias, v, v_bias, o, o_bias, norm, norm_bias, up, up_bias, down, down_bias, last, last_bias = parameters
        residual, starts = hidden[0].contiguous(), starts.to("cpu", torch.int32).contiguous()
        products = _products(found, settings)
        with torch.autocast("cpu", enabled=False):
            x = residual.bfloat16() if rounded_hidden is None else rounded_hidden
            into, from_qkv = products.lay_out([q, k, v])
            qkv = products.product(x, into, torch.cat([q_bias, k_bias, v_bias]))
            attended, rest, log_sums = torch.empty_like(x), torch.empty_like(x), residual.new_empty(settings["heads"], len(x))
            attend(_heads(qkv, settings), starts, (attended, rest), log_sums, _attention(settings))
            o, from_o = products.lay_out([o])
            update = products.product(attended, o, o_bias)
            middle, rounded, normed, scales = _norm(found, update, residual, norm, norm_bias, settings, 0)
            up, from_up = products.lay_out([up])
            inner, active = products.product_and_gelu(rounded, up, up_bias)
            down, from_down = products.lay_out([down])
            update = products.product(active, down, down_bias)
            out, rounded_out, last_normed, last_scales = _norm(found, update, middle, last, last_bias, settings, 1)
        ctx.settings = settings
        ctx.save_for_backward(
            *(starts, x, qkv, attended, rest, log_sums, rounded, normed, scales, inner, active, last_normed, last_scales),
            *(from_qkv, from_o, from_up, from_down, norm, last),
        )
        ctx.mark_non_differentiable(rounded_out)
        return out[None], rounded_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        found = loaded()
        starts, x, qkv, attended, rest, log_sums, rounded, normed, scales, inner, active, *saved = ctx.saved_tensors
        last_normed, last_scales, from_qkv, from_o, from_up, from_down, norm, last = saved
        settings: dict[str, Any] = ctx.settings
        tokens, width = x.shape
        products, of_hidden, needs = _products(found, settings), None, ctx.needs_input_grad[4:]

        def of_weight(index: int, of_out: torch.Tensor, of_in: torch.Tensor) -> torch.Tensor | None:
            return products.of_weight(of_out, of_in) if needs[index] else None

        with torch.autocast("cpu", enabled=False):
            of_residual, of_update, (of_last, of_last_bias, of_down_bias) = _norm_backward(
                found, gradient[0].contiguous(), None, last_normed, last_scales, last, settings, 1
            )
            of_down = of_weight(12, of_update, active)
            of_inner, of_up_bias = products.of_gelus_input(of_update, from_down, inner)
            of_up = of_weight(10, of_inner, rounded)
            of_residual, of_update, (of_norm, of_norm_bias, of_o_bias) = _norm_backward(
                found, of_residual, products.of_input(of_inner, from_up), normed, scales, norm, settings, 0
            )
            of_o = of_weight(6, of_update, attended)
            of_attended, of_qkv = products.of_input(of_update, from_o), torch.empty_like(qkv)
            q_k_v, of_q_k_v = _heads(qkv, settings), _heads(of_qkv, settings)
            attend_backward(q_k_v, starts, (attended, rest), log_sums, _attention(settings), of_attended, of_q_k_v)
            of_into_bias = x.new_empty(3 * width, dtype=torch.float32)
            found.layers.danlu_sums(of_qkv.data_ptr(), of_into_bias.data_ptr(), tokens, 3 * width)
            of_into = products.of_weight(of_qkv, x) if any(needs[:6]) else x.new_empty(3 * width, 0)
            if ctx.needs_input_grad[0]:
                of_hidden = products.added_of_input(of_qkv, from_qkv, of_residual)[None]
        of_q, of_k, of_v = of_into.chunk(3)
        of_q_bias, of_k_bias, of_v_bias = of_into_bias.chunk(3)
        of_parameters = (of_q, of_q_bias, of_k, of_k_bias, of_v, of_v_bias, of_o, of_o_bias, of_norm, of_norm_bias, of_up, of_up_bias,
                         of_down, of_down_bias, of_last, of_last_bias)  # fmt: skip
        return of_hidden, None, None, None, *(tensor if need else None for tensor, need in zip(of_parameters, needs, strict=True))


def _products(found: Kernels, settings: dict[str, Any]) -> Products:
    return Products(found.products if settings["in_blocks"] else None, found.layers)


def _heads(tensor: torch.Tensor, settings: dict[str, Any]) -> list[torch.Tensor]:
    """[tokens, 3 x width] -> three of [tokens, heads, dim]."""
    return list(tensor.view(len(tensor), 3, settings["heads"], settings["dim"]).unbind(1))


def _attention(settings: dict[str, Any]) -> dict[str, Any]:
    return {"scaling": settings["scaling"], "causal": 0, "window": 0, "dropout": settings["dropout"][0], "seed": settings["seed"][0]}


def _norm(
    found: Kernels,
    update: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    settings: dict[str, Any],
    which: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm(residual + dropout(update)) [tokens, width] in float32 and in bf16; what was normed, and each row's scale."""
    out, normed, rounded = torch.empty_like(residual), torch.empty_like(residual), torch.empty_like(update)
    scales = residual.new_empty(len(residual))
    call = _norm_call(normed, scales, weight, settings, which)
    call.update, call.residual, call.bias = update.data_ptr(), residual.data_ptr(), bias.data_ptr()
    call.out, call.rounded = out.data_ptr(), rounded.data_ptr()
    found.layers.danlu_norm(ctypes.byref(call))
    return out, rounded, normed, scales


def _norm_backward(
    found: Kernels,
    gradient: torch.Tensor,
    rounded_gradient: torch.Tensor | None,
    normed: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    settings: dict[str, Any],
    which: int,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """The gradients of residual (float32) and update (bf16), and of weight, bias and the bias of the product that made the update."""
    of_residual, of_update = torch.empty_like(normed), torch.empty_like(normed, dtype=torch.bfloat16)
    sums = normed.new_empty(3, normed.shape[1])
    call = _norm_call(normed, scales, weight, settings, which)
    call.out_gradient, call.rounded_gradient = gradient.data_ptr(), None if rounded_gradient is None else rounded_gradient.data_ptr()
    call.residual_gradient, call.update_gradient, call.sums = of_residual.data_ptr(), of_update.data_ptr(), sums.data_ptr()
    found.layers.danlu_norm_backward(ctypes.byref(call))
    return of_residual, of_update, sums.unbind()


def _norm_call(normed: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, settings: dict[str, Any], which: int) -> NormCall:
    tokens, width = normed.shape
    return NormCall(
        normed=normed.data_ptr(),
        scales=scales.data_ptr(),
        weight=weight.data_ptr(),
        tokens=tokens,
        width=width,
        epsilon=settings["epsilon"][which],
        dropout=settings["dropout"][1 + which],
        seed=settings["seed"][1 + which],
    )
