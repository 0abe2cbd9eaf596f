"""The step's forward in one call of the compiled kernels: what `fused` does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from danlu.serve.engines.torch.attention import Batch
from danlu.serve.engines.torch.cache import Cache
from danlu.serve.engines.torch.kernels import Kernels, LinearStruct

if TYPE_CHECKING:
    from danlu.serve.engines.torch.fused import FusedForward
    from danlu.serve.engines.torch.lora import LoraSite


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
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "slots", "wanted", "logits")),
    ]


class NativeStep:
    """Pointers to all of a fused forward's tensors, which it must outlive, and of the cache that it was last given."""

    def __init__(self, kernels: Kernels, fused: FusedForward) -> None:
        self.kernels, self.fused = kernels, fused
        self.cache: Cache | None = None
        self.linears = fused.linears
        self.sites: list[LoraSite | None] = [None] * len(self.linears)
        self.packed: list[torch.Tensor] = []
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
        masks = self._set_adapters()
        logits = torch.empty(len(batch.wanted), self.fused.head.shape[0])
        step = _Batch(
            len(batch.input_ids),
            len(batch.wanted),
            *(one.data_ptr() for one in (batch.input_ids, batch.position_ids, batch.slots, batch.wanted, logits)),
        )
        self.kernels.library.danlu_step(ctypes.byref(self.model), ctypes.byref(step))
        del masks  # they had to live until here
        return logits

    def _point_to(self, cache: Cache) -> None:
        for struct, (keys, values) in zip(self.layers, cache.layers.values(), strict=True):
            struct.keys, struct.values = keys.data_ptr(), values.data_ptr()
        self.model.max_len, self.cache = cache.max_model_len, cache

    def _set_adapters(self) -> Sequence[torch.Tensor]:
        """Whose tokens a step's are; the masks that are pointed to."""
        sites = [linear.lora for linear in self.linears]
        if sites != self.sites:
            self._pack(sites)
        masks = []
        for site, struct in zip(self.sites, self.structs, strict=True) if self.model.largest_rank else ():
            mask = None if site is None else site.owned()
            struct.mask = None if mask is None else mask.data_ptr()
            if mask is not None:
                masks.append(mask)
        return masks

    def _pack(self, sites: list[LoraSite | None]) -> None:
        """Adapters have come or gone."""
        self.sites = sites
        self.packed = []
        for site, struct in zip(sites, self.structs, strict=True):
            struct.mask = None
            if site is not None:
                down, up = self.kernels.pack(site.down.t()), self.kernels.pack(site.up.t())
                struct.down, struct.up, struct.rank = down.data_ptr(), up.data_ptr(), len(site.owners)
                self.packed += [down, up]
        self.model.largest_rank = max((len(site.owners) for site in sites if site is not None), default=0)
