"""A Hugging Face model cut into stages of layers, whatever its family: the same modules under the same names, less those of other stages.

A stage runs the model's own forward. Modules before its layers give the hidden states that were handed over, whatever they are asked; the
first layer after them ends the forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from danlu.errors import ModelError


@dataclass(frozen=True)
class Anatomy:
    """The list of layers, and the modules with weights that are called before and behind them, by name."""

    layers: str
    num_layers: int
    before: frozenset[str]
    behind: frozenset[str]

    def stages_of(self, stages: Sequence[range], module: str) -> list[int]:
        """The stages that hold a module."""
        if module in self.before:
            return [0]
        if module.startswith(f"{self.layers}."):
            number = int(module.removeprefix(f"{self.layers}.").partition(".")[0])
            return [index for index, layers in enumerate(stages) if number in layers]
        return [len(stages) - 1]


class Reached(Exception):
    """A stage has done its layers: what ends its forward, and no error."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass
class Handed:
    """What the stage before handed over."""

    hidden: torch.Tensor | None = None


class Earlier(nn.Module):
    """Stands where a module of an earlier stage was."""

    def __init__(self, handed: Handed) -> None:
        super().__init__()
        self.handed = handed

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        assert self.handed.hidden is not None
        return self.handed.hidden


class Later(nn.Module):
    """Stands where a layer of a later stage was."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        raise Reached(hidden)


@dataclass
class _Calls:
    layers: list[int] = field(default_factory=list)
    before: set[str] = field(default_factory=set)
    behind: set[str] = field(default_factory=set)


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Anatomy]]:
    """Its anatomy, once the model has been called inside of the block. ModelError if it is not a stack of layers."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise _uncut(model, f"has {len(outer)} lists of layers ({', '.join(outer) or 'none'})")
    layers = model.get_submodule(outer[0])
    assert isinstance(layers, nn.ModuleList)
    calls, hooks = _Calls(), []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: calls.layers.append(number)))
    for name, module in model.named_modules():
        if module._parameters and not name.startswith(f"{outer[0]}."):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: _note(calls, name)))
    found: list[Anatomy] = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if calls.layers != list(range(len(layers))) or calls.before & calls.behind:
        raise _uncut(model, "does not call its layers one after the other")
    found.append(Anatomy(outer[0], len(layers), frozenset(calls.before), frozenset(calls.behind)))


def _note(calls: _Calls, name: str) -> None:
    (calls.behind if calls.layers else calls.before).add(name)


def cut(model: nn.Module, anatomy: Anatomy, layers: range, handed: Handed) -> nn.Module:
    """The stage of these layers: other module objects, the same parameters."""
    stage = _copied(model)
    stack = stage.get_submodule(anatomy.layers)
    assert isinstance(stack, nn.ModuleList)
    for number in range(anatomy.num_layers):
        if number not in layers:
            stack[number] = Earlier(handed) if number < layers.start else Later()
    for names, kept in ((anatomy.before, layers.start == 0), (anatomy.behind, layers.stop == anatomy.num_layers)):
        for name in () if kept else names:
            if not any(name.startswith(f"{outer}.") for outer in names):  # a head may have a weight of its own beside its layers
                stage.set_submodule(name, Earlier(handed))
    return stage


def _copied(module: nn.Module) -> nn.Module:
    made = copy(module)
    made._modules = {name: None if child is None else _copied(child) for name, child in module._modules.items()}
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    return made


def forget_weights(model: nn.Module) -> None:
    """Let go of a model's parameters: only their shapes stay."""
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = empty.setdefault(id(parameter), nn.Parameter(shape, requires_grad=parameter.requires_grad))


def _uncut(model: nn.Module, why: str) -> ModelError:
    name = type(getattr(model, "model", model)).__name__
    return ModelError(
        f"{name} {why}, so it cannot be cut into stages", where="parallel.kind", fix="parallel.kind=fsdp, which shards any model"
    )
