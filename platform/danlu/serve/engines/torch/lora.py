"""Several LoRA adapters in one batch: their A and B side by side in one product, of which each token takes its own adapter's part."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from danlu.artifact.bundle import Bundle
from danlu.compress.fits import changed_layers, does_not_fit
from danlu.errors import ModelError, ResourceError
from danlu.serve.adapters import WEIGHTS, adapter_folder, no_adapter
from danlu.serve.engines.torch.sequence import Key

if TYPE_CHECKING:
    from danlu.serve.engines.torch.linear import Linear, Part


@dataclass(frozen=True)
class Adapter:
    """Of each linear layer that it changes: A [r, in] and B [out, r], the scaling already in B, as the engine's other weights are."""

    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class TokenOwners:
    """Whose the tokens of the step that runs are."""

    places: torch.Tensor | None = None
    """int64 [tokens], on the CPU: the place of a token's adapter, -1 of the base's; None where no token has one."""
    masks: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    """What the sites have made of it: [tokens, ranks], whether a rank is of another than the token's adapter."""


@dataclass(frozen=True)
class Change:
    """What adapters add to outputs [start, stop) of a product, their ranks side by side."""

    start: int
    stop: int
    owners: tuple[int, ...]
    """Of each rank: the place of its adapter."""
    downs: Sequence[torch.Tensor]
    """[r, in] of one adapter after the other."""
    ups: Sequence[torch.Tensor]
    """[stop - start, r]"""


class LoraSite:
    """What the adapters add to one product. The compiled kernels read its changes; PyTorch multiplies them as one."""

    def __init__(self, changes: Sequence[Change], shape: tuple[int, int], token_owners: TokenOwners) -> None:
        """`shape`: the product's, out and in."""
        self.changes, self.shape, self.token_owners = changes, shape, token_owners

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x: [tokens, in]; added to y [tokens, out] in place."""
        if (others := self._others(x.device)) is not None:
            (down,), (up,) = self.joined.downs, self.joined.ups
            y.addmm_(nn.functional.linear(x, down).masked_fill_(others, 0), up.t())

    @functools.cached_property
    def joined(self) -> Change:
        """All changes as one of all outputs, and as one adapter."""
        owners = tuple(itertools.chain.from_iterable(change.owners for change in self.changes))
        wide = self.changes[0].ups[0].new_zeros(self.shape[0], len(owners))
        rank = 0
        for change in self.changes:
            torch.cat(list(change.ups), dim=1, out=wide[change.start : change.stop, rank : rank + len(change.owners)])
            rank += len(change.owners)
        return Change(0, self.shape[0], owners, [torch.cat([down for change in self.changes for down in change.downs])], [wide])

    def _others(self, device: torch.device) -> torch.Tensor | None:
        owners = self.joined.owners
        if self.token_owners.places is not None and owners not in self.token_owners.masks:
            self.token_owners.masks[owners] = (self.token_owners.places[:, None] != torch.tensor(owners)).to(device)
        return self.token_owners.masks.get(owners)


class Adapters:
    """The adapters that are loaded. Those that are not used for longest make room for new ones."""

    def __init__(self, linears: Sequence[Linear], *, max_loras: int, dtype: torch.dtype, device: torch.device) -> None:
        self.linears, self.max_loras, self.dtype, self.device = linears, max_loras, dtype, device
        self.loaded: dict[Key, Adapter] = {}
        self.last_used: dict[Key, int] = {}
        self.step = 0
        self.token_owners = TokenOwners()

    def check(self, adapter: Adapter, name: str) -> None:
        """ModelError if it is for another model."""
        shapes = {part.name: (part.stop - part.start, linear.shape[1]) for linear in self.linears for part in linear.parts}
        for layer, (down, up) in adapter.weights.items():
            changed = (up.shape[0], down.shape[1])
            if shapes.get(layer) != changed:
                raise does_not_fit("the adapter", layer, changed, shapes.get(layer), name)

    def add(self, key: Key, adapter: Adapter, busy: set[Key]) -> list[Key]:
        """Load; what had to go for it, the longest unused of those that are not `busy`. ResourceError if all are."""
        gone: list[Key] = []
        while len(self.loaded) - len(gone) >= self.max_loras:
            idle = [other for other in self.loaded if other not in busy and other not in gone]
            if not idle:
                raise ResourceError(
                    f"max_loras={self.max_loras} adapters are all in use", where="engine.max_loras", fix="a larger max_loras, or later"
                )
            gone.append(min(idle, key=self.last_used.__getitem__))
        for other in gone:
            del self.loaded[other]
        self.loaded[key], self.last_used[key] = adapter, self.step
        self._build()
        return gone

    def remove(self, key: Key) -> None:
        del self.loaded[key]
        self._build()

    def begin(self, keys: Sequence[tuple[Key, int]]) -> None:
        """Before a step: whose its tokens are, as (key, number of tokens) in their order."""
        self.step += 1
        self.token_owners.masks.clear()
        self.token_owners.places = None
        used = {key for key, _ in keys if key is not None}
        if not used:
            return
        self.last_used |= dict.fromkeys(used, self.step)
        places: dict[Key, int] = {key: place for place, key in enumerate(self.loaded)} | {None: -1}
        owners, numbers = [places[key] for key, _ in keys], [number for _, number in keys]
        self.token_owners.places = torch.from_numpy(np.repeat(np.array(owners, dtype=np.int64), numbers))

    def _build(self) -> None:
        for linear in self.linears:
            changes = [change for part in linear.parts if (change := self._change(part)) is not None]
            linear.lora = LoraSite(changes, linear.shape, self.token_owners) if changes else None

    def _change(self, part: Part) -> Change | None:
        """None where no adapter changes it."""
        own = {place: adapter.weights[part.name] for place, adapter in enumerate(self.loaded.values()) if part.name in adapter.weights}
        if not own:
            return None
        owners = tuple(itertools.chain.from_iterable((place,) * len(down) for place, (down, _) in own.items()))
        return Change(part.start, part.stop, owners, [down for down, _ in own.values()], [up for _, up in own.values()])


def read_adapter(
    source: str,
    name: str,
    storage: str,
    served: Bundle | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Adapter:
    """A LoRA adapter of a PEFT folder or a bundle: a folder, a URI, or a `name@alias` of the storage. ModelError names what cannot be
    served beside others in `dtype`, or beside what is merged into the bundle that is `served`."""
    folder, config = adapter_folder(source, name, storage, served)
    changed_layers(folder, source, name)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise no_adapter(source, name, error) from error
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for key, down in tensors.items():
        layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ModelError(f"{source} has {key}, which is no part of a plain LoRA", where=name, fix="merge it into the model")
        if key.endswith(".lora_A.weight"):
            try:
                scaling = _scaling(config, layer, down.shape[0])
            except (AttributeError, TypeError, ValueError, re.error) as error:
                raise no_adapter(source, name, error) from error
            up = tensors[key.replace(".lora_A.", ".lora_B.")].float() * scaling
            weights[layer] = (down.to(device, dtype), up.to(device, dtype))
    if sick := next((layer for layer, both in weights.items() if not all(bool(torch.isfinite(one).all()) for one in both)), None):
        raise ModelError(f"{source} holds values of {sick} that are no numbers in {dtype}", where=name, fix="copy or train it again")
    if not weights:
        raise ModelError(f"{source} changes nothing", where=name, fix="an adapter with lora_A and lora_B weights")
    return Adapter(weights)


def _scaling(config: Mapping[str, Any], layer: str, r: int) -> float:
    """PEFT's: lora_alpha / r, or / sqrt(r) with rsLoRA; a pattern's key is a regular expression of the end of a layer's name."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha", 8)))  # PEFT's when it is not said
    return alpha / (r**0.5 if config.get("use_rslora") else r)
