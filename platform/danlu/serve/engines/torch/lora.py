"""Several LoRA adapters in one batch: their A and B side by side in one product, and a mask that says whose token it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from danlu.artifact.bundle import Bundle
from danlu.compress.fits import changed_layers, does_not_fit
from danlu.errors import ModelError, ResourceError
from danlu.serve.adapters import WEIGHTS, adapter_folder, no_adapter
from danlu.serve.engines.torch.sequence import Key

if TYPE_CHECKING:
    from danlu.serve.engines.torch.linear import Linear


@dataclass(frozen=True)
class Adapter:
    """Of each linear layer that it changes: A [r, in] and B [out, r], the scaling already in B."""

    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Mask:
    """Of the step that runs: which adapter each token belongs to. `by_owner` holds what the sites have made of it."""

    of_tokens: torch.Tensor | None = None
    """[tokens, adapters], 1 or 0; None where no token has one."""
    by_owner: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)


class LoraSite:
    """What the adapters add to one product."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, owners: tuple[int, ...], mask: Mask) -> None:
        self.down, self.up, self.owners, self.mask = down, up, owners, mask

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x: [tokens, in]; added to y [tokens, out] in place."""
        mask = self.owned()
        if mask is not None:
            y.addmm_((x @ self.down).mul_(mask), self.up)

    def owned(self) -> torch.Tensor | None:
        """Of the step that runs: [tokens, rank], 1 where a rank is of the token's adapter; None where no token has one."""
        if self.mask.of_tokens is None:
            return None
        mask = self.mask.by_owner.get(self.owners)
        if mask is None:
            mask = self.mask.by_owner[self.owners] = self.mask.of_tokens[:, list(self.owners)]
        return mask


class Adapters:
    """The adapters that are loaded. Those that are not used for longest make room for new ones."""

    def __init__(self, linears: Sequence[Linear], *, max_loras: int, dtype: torch.dtype, device: torch.device) -> None:
        self.linears, self.max_loras, self.dtype, self.device = linears, max_loras, dtype, device
        self.loaded: dict[Key, Adapter] = {}
        self.last_used: dict[Key, int] = {}
        self.step = 0
        self.mask = Mask()

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
        self.mask.by_owner.clear()
        self.mask.of_tokens = None
        used = {key for key, _ in keys if key is not None}
        if not used:
            return
        self.last_used |= dict.fromkeys(used, self.step)
        places = {key: i for i, key in enumerate(self.loaded)}
        owners = torch.tensor([-1 if key is None else places[key] for key, number in keys for _ in range(number)])
        self.mask.of_tokens = (owners[:, None] == torch.arange(len(places))).to(self.device, self.dtype)

    def _build(self) -> None:
        for linear in self.linears:
            downs: list[torch.Tensor] = []
            ups: list[torch.Tensor] = []
            owners: list[int] = []
            for place, adapter in enumerate(self.loaded.values()):
                for part in linear.parts:
                    if part.name not in adapter.weights:
                        continue
                    down, up = adapter.weights[part.name]
                    wide = torch.zeros(down.shape[0], linear.shape[0])
                    wide[:, part.start : part.stop] = up.t()
                    downs.append(down.t())
                    ups.append(wide)
                    owners += [place] * down.shape[0]
            if not downs:
                linear.lora = None
                continue
            if len(owners) % 2:  # bf16 is multiplied in pairs
                downs.append(torch.zeros(linear.shape[1], 1))
                ups.append(torch.zeros(1, linear.shape[0]))
                owners.append(owners[-1])
            down, up = torch.cat(downs, dim=1).contiguous(), torch.cat(ups)
            linear.lora = LoraSite(down.to(self.device, self.dtype), up.to(self.device, self.dtype), tuple(owners), self.mask)


def read_adapter(source: str, name: str, storage: str, served: Bundle | None = None) -> Adapter:
    """A LoRA adapter of a PEFT folder or a bundle: a folder, a URI, or a `name@alias` of the storage. ModelError names what cannot be
    served beside others, or beside what is merged into the bundle that is `served`."""
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
            up = tensors[key.replace(".lora_A.", ".lora_B.")].float() * _scaling(config, layer, down.shape[0])
            weights[layer] = (down.float(), up)
    if sick := next((layer for layer, both in weights.items() if not all(bool(torch.isfinite(one).all()) for one in both)), None):
        raise ModelError(f"{source} holds values of {sick} that are no numbers", where=name, fix="copy or train it again")
    if not weights:
        raise ModelError(f"{source} changes nothing", where=name, fix="an adapter with lora_A and lora_B weights")
    return Adapter(weights)


def _scaling(config: Mapping[str, Any], layer: str, r: int) -> float:
    """PEFT's: lora_alpha / r, or / sqrt(r) with rsLoRA; a pattern's key is the end of a layer's name."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = [value for key, value in patterns.items() if layer == key or layer.endswith(f".{key}")]
    alpha = float(own[0] if own else config["lora_alpha"])
    return alpha / (r**0.5 if config.get("use_rslora") else r)
