"""The step's forward in one call of the compiled kernels: what `fused` does."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch

from danlu.serve.engines.torch.attention import Batch
from danlu.serve.engines.torch.cache import Cache
from danlu.serve.engines.torch.kernels import PANEL, Empty, Kernels, LinearStruct, LoraStruct, PartStruct
from danlu.serve.engines.torch.pages import Pages

if TYPE_CHECKING:
    from danlu.serve.engines.torch.fused import FusedForward
    from danlu.serve.engines.torch.lora import LoraSite


NOBODY = -2
"""Owns the ranks that fill a panel up."""


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, LinearStruct) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm_in", "norm_mlp", "norm_qk", "keys", "values")),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("is_bf16", "num_layers", "hidden", "intermediate", "heads", "kv_heads", "dim", "max_len", "largest_rank")
        ),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
        *((name, ctypes.c_void_p) for name in ("embedding", "cos", "sin", "norm")),
        ("head", LinearStruct),
        ("layers", ctypes.c_void_p),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "num_wanted")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "slots", "wanted", "owners", "logits")),
    ]


class NativeStep:
    """Pointers to all of a fused forward's tensors, which it must outlive, and of the cache that it was last given."""

    def __init__(self, kernels: Kernels, fused: FusedForward) -> None:
        self.kernels, self.fused = kernels, fused
        self.cache: Cache | None = None
        self.linears = fused.linears
        self.sites: list[LoraSite | None] = [None] * len(self.linears)
        self.changing: LoraSite | None = None
        self.packed: list[PackedLora] = []
        first = fused.layers[0]
        self.layers = (_Layer * len(fused.layers))()
        self.model = _Model(
            is_bf16=fused.embedding.dtype == torch.bfloat16,
            num_layers=len(fused.layers),
            hidden=fused.embedding.shape[1],
            intermediate=first.down.shape[1],
            heads=fused.heads,
            kv_heads=fused.kv_heads,
            dim=fused.head_dim,
            max_len=0,
            largest_rank=0,
            eps=fused.eps,
            scale=fused.head_dim**-0.5,
            embedding=fused.embedding.data_ptr(),
            cos=fused.cos.data_ptr(),
            sin=fused.sin.data_ptr(),
            norm=fused.norm.data_ptr(),
            head=fused.head.struct(),
            layers=ctypes.addressof(self.layers),
        )
        for struct, layer in zip(self.layers, fused.layers, strict=True):
            struct.qkv, struct.out, struct.gate_up, struct.down = (
                one.struct() for one in (layer.qkv, layer.out, layer.gate_up, layer.down)
            )
            struct.norm_in, struct.norm_mlp = layer.norm_in.data_ptr(), layer.norm_mlp.data_ptr()
            struct.norm_qk = None if layer.norm_qk is None else layer.norm_qk.data_ptr()
            struct.window = layer.window or 0
        # In the order of `linears`.
        self.structs = [one for struct in self.layers for one in (struct.qkv, struct.out, struct.gate_up, struct.down)]

    def __call__(self, batch: Batch, cache: Cache) -> torch.Tensor:
        """See Forward."""
        if cache is not self.cache:
            self._point_to(cache)
        owners = self._set_adapters()
        logits = torch.empty(len(batch.wanted), self.fused.head.shape[0])
        step = _Batch(
            len(batch.input_ids),
            len(batch.wanted),
            *(one.data_ptr() for one in (batch.input_ids, batch.position_ids, batch.slots, batch.wanted)),
            None if owners is None else owners.data_ptr(),
            logits.data_ptr(),
        )
        self.kernels.library.danlu_step(ctypes.byref(self.model), ctypes.byref(step))
        return logits

    def _point_to(self, cache: Cache) -> None:
        for struct, (keys, values) in zip(self.layers, cache.layers.values(), strict=True):
            struct.keys, struct.values = keys.data_ptr(), values.data_ptr()
        self.model.max_len, self.cache = cache.max_model_len, cache

    def _set_adapters(self) -> torch.Tensor | None:
        """Whose the step's tokens are; None where no adapter changes anything."""
        sites = [linear.lora for linear in self.linears]
        if sites != self.sites:
            self._pack(sites)
        return self.changing.token_owners.places if self.changing is not None else None

    def _pack(self, sites: list[LoraSite | None]) -> None:
        """Adapters have come or gone."""
        self.sites = sites
        self.changing = next((site for site in sites if site is not None), None)
        self.packed = []
        pages = Pages()
        for site, struct in zip(sites, self.structs, strict=True):
            struct.lora = LoraStruct()
            if site is not None:
                self.packed.append(packed := PackedLora(site, self.kernels, pages.empty))
                struct.lora = packed.struct
        self.model.largest_rank = max((packed.struct.rank for packed in self.packed), default=0)


class PackedLora:
    """What adapters add to a product, as the kernels read it. Each change's ranks begin a panel, so that a panel's outputs read no other's,
    and ranks of adapters that a step has no tokens of are passed over."""

    def __init__(self, site: LoraSite, kernels: Kernels, empty: Empty) -> None:
        parted = all(change.start % PANEL == 0 and (change.stop % PANEL == 0 or change.stop == site.shape[0]) for change in site.changes)
        changes = site.changes if parted else [site.joined]
        owners, downs, ups, firsts = list[int](), list[torch.Tensor](), list[torch.Tensor](), list[int]()
        for change in changes:
            number, missing = len(change.owners), -len(change.owners) % PANEL
            firsts.append(len(owners))
            owners += [*change.owners, *[NOBODY] * missing]
            downs += [*change.downs, change.downs[0].new_zeros(missing, site.shape[1])]
            pair = change.ups[0].new_zeros(change.stop - change.start, number % 2)  # bf16 is multiplied in pairs
            ups.append(kernels.pack(torch.cat([*change.ups, pair], dim=1), empty))
        panels = [set(owners[first : first + PANEL]) - {NOBODY} for first in range(0, len(owners), PANEL)]
        self.owners = np.array(owners, dtype=np.int64)
        self.present = np.array([sum(1 << place for place in {owner % 64 for owner in panel}) for panel in panels], dtype=np.uint64)
        self.down, self.ups = kernels.pack(torch.cat(downs), empty), ups
        self.parts = (PartStruct * len(changes))()
        for struct, change, up, first in zip(self.parts, changes, ups, firsts, strict=True):
            struct.up, struct.first_panel, struct.stop_panel = up.data_ptr(), change.start // PANEL, -(-change.stop // PANEL)
            struct.first_rank, struct.ranks = first, up.shape[1]
        self.struct = LoraStruct(
            down=self.down.data_ptr(),
            rank=len(self.owners),
            owners=self.owners.ctypes.data,
            present=self.present.ctypes.data,
            parts=ctypes.addressof(self.parts),
            num_parts=len(self.parts),
        )
