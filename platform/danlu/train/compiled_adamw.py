"""AdamW by the compiled kernels: gradients are read once for their norm, then all is read and written once.

It is torch.optim.AdamW to the last roundings, and its state is that one's: a run goes on with either.
"""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from danlu.tasks.kernels import AdamWParameter, kernels, loaded

LARGE_TABLE = 4096
"""Rows of a table whose gradient is worth keeping by rows: a step reads a few thousand tokens."""


def can_be_compiled(parameters: Collection[nn.Parameter]) -> bool:
    """Float32 parameters on a CPU, where there are kernels for them."""
    return kernels() is not None and all(
        parameter.device.type == "cpu" and parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in parameters
    )


class CompiledAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True). Gradients may be sparse along their rows; `clip` is to come before each step."""

    clip_factor = 1.0
    """What the next step multiplies its gradients by."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self._still: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """The gradients' norm; the next step's are scaled so that it is at most `max_norm`, as clip_grad_norm_ scales them."""
        found = [
            self._read(parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        calls = _array([call for call, _ in found])
        norm = math.sqrt(loaded().adamw.danlu_gradient_squares(calls, len(calls)))
        self.clip_factor = float(torch.clamp(torch.tensor(max_norm / (norm + 1e-6)), max=1.0))
        return norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update, then forget the factor."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            found = [
                self._call(parameter, parameter.grad, group, beta1, beta2) for parameter in group["params"] if parameter.grad is not None
            ]
            calls = _array([call for call, _ in found])
            loaded().adamw.danlu_adamw(calls, len(calls), self.clip_factor, 1 - beta1, 1 - beta2, group["eps"])
        self.clip_factor = 1.0

    def _call(
        self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any], beta1: float, beta2: float
    ) -> tuple[AdamWParameter, list[torch.Tensor]]:
        """One parameter's step, counted; and the tensors that have to live until it is done."""
        call, kept = self._read(parameter, gradient)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        taken = float(state["step"])
        average, square = state["exp_avg"], state["exp_avg_sq"]
        call.weight, call.average, call.square_average = parameter.data_ptr(), average.data_ptr(), square.data_ptr()
        call.kept = 1 - group["lr"] * group["weight_decay"]
        call.rate = group["lr"] / (1 - beta1**taken)
        call.correction = 1 / math.sqrt(1 - beta2**taken)
        if gradient.is_sparse:
            places = torch.full((len(parameter),), -1, dtype=torch.int32)
            rows = gradient.indices()[0]
            places[rows] = torch.arange(len(rows), dtype=torch.int32)
            still = self._still_rows(parameter, average, square)
            call.places, call.still = places.data_ptr(), still.data_ptr()
            kept += [places, still]
        elif parameter in self._still:
            del self._still[parameter]
        return call, kept

    def _read(self, parameter: nn.Parameter, gradient: torch.Tensor) -> tuple[AdamWParameter, list[torch.Tensor]]:
        """A call that knows its gradient, made one row for each that has one."""
        if gradient.is_sparse and not gradient.is_coalesced():
            parameter.grad = gradient = gradient.coalesce()
        values = (gradient.values() if gradient.is_sparse else gradient).contiguous()
        width = parameter.shape[-1] if gradient.is_sparse else parameter.numel()
        rows = len(parameter) if gradient.is_sparse else 1
        return AdamWParameter(gradient=values.data_ptr(), rows=rows, width=width, gradient_rows=len(values) if gradient.is_sparse else 1), [
            values
        ]

    def _still_rows(self, parameter: nn.Parameter, average: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """1 for each row whose moments are zeros, uint8 [rows]: the kernel's to keep, while the state is the same."""
        known = self._still.get(parameter)
        if known is None or known[0] is not average:
            known = self._still[parameter] = average, (~(average.any(1) | square.any(1))).to(torch.uint8)
        return known[1]


def use_row_gradients(model: nn.Module, trained: Collection[nn.Parameter]) -> None:
    """Have large tables of embeddings, in place, give the gradients of the rows that a pass has read, and no zeros for all the others."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    own = {id(parameter) for parameter in trained}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq:
            its = id(module.weight)
            if its in own and uses[its] == 1 and module.num_embeddings >= LARGE_TABLE:
                module.sparse = True
                module.weight.register_post_accumulate_grad_hook(_summed)  # type: ignore[no-untyped-call]


def _summed(parameter: torch.Tensor) -> None:
    """After each pass, one row for each that has a gradient: however many passes a step has, they are no more than the table's."""
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = parameter.grad.coalesce()


def _array(calls: list[AdamWParameter]) -> ctypes.Array[AdamWParameter]:
    return (AdamWParameter * len(calls))(*calls)
