"""The compiled kernels of training on a CPU (attention.cpp, layers.cpp, products.cpp, adamw.cpp): where they are used, and their calls."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from danlu.compiled import KernelsUnavailable, load

log = logging.getLogger(__name__)


class AttentionCall(ctypes.Structure):
    """attention.cpp's Attention."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out_gradient", "out", "out_rest", "log_sums")),
        *((name, ctypes.c_void_p) for name in ("query_gradient", "key_gradient", "value_gradient", "starts")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "key_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_int64) for name in ("gradient_stride", "key_gradient_stride", "causal", "window")),
        *((name, ctypes.c_float) for name in ("scaling", "dropout")),
        ("seed", ctypes.c_uint64),
    ]


class NormCall(ctypes.Structure):
    """layers.cpp's Norm."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("update", "residual", "weight", "bias", "out", "normed", "scales", "rounded")),
        *((name, ctypes.c_void_p) for name in ("out_gradient", "rounded_gradient", "residual_gradient", "update_gradient", "sums")),
        ("tokens", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("dropout", ctypes.c_float),
        ("seed", ctypes.c_uint64),
    ]


class AdamWParameter(ctypes.Structure):
    """adamw.cpp's Parameter."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "average", "square_average", "gradient", "places", "still")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "gradient_rows")),
        *((name, ctypes.c_float) for name in ("kept", "rate", "correction")),
    ]


@dataclass(frozen=True)
class Kernels:
    """The libraries, loaded."""

    attention: ctypes.CDLL
    layers: ctypes.CDLL
    products: ctypes.CDLL | None
    """For CPUs with AMX; on others PyTorch's products are as fast."""
    adamw: ctypes.CDLL


_used = False


@contextmanager
def compiled_kernels() -> Iterator[None]:
    """While it lasts, attention learns by the compiled kernels where they are there; the log says why they are not."""
    global _used
    before = _used
    try:
        if isinstance(found := _kernels(), KernelsUnavailable):
            log.warning("no compiled kernels, so this CPU trains more slowly: %s", found)
        _used = True
        yield
    finally:
        _used = before


def kernels() -> Kernels | None:
    """The libraries; None where they are not wanted or not there."""
    if not _used or isinstance(found := _kernels(), KernelsUnavailable):
        return None
    return found


def loaded() -> Kernels:
    """The libraries, of whoever was given them before: a backward takes what its forward did."""
    found = _kernels()
    assert isinstance(found, Kernels)
    return found


@functools.cache
def _kernels() -> Kernels | KernelsUnavailable:
    here = Path(__file__).parent
    try:
        attention, layers, products, adamw = (load(here / f"{name}.cpp") for name in ("attention", "layers", "products", "adamw"))
    except KernelsUnavailable as error:
        return error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    attention.danlu_attention.argtypes = attention.danlu_attention_backward.argtypes = (ctypes.POINTER(AttentionCall),)
    layers.danlu_norm.argtypes = layers.danlu_norm_backward.argtypes = (ctypes.POINTER(NormCall),)
    layers.danlu_gelu.argtypes = layers.danlu_sums.argtypes = (pointer, pointer, number, number)
    layers.danlu_gelu_backward.argtypes = (pointer, pointer, pointer, number, number)
    products.danlu_lay_out.argtypes = (pointer, number, number, number, number, pointer, pointer)
    products.danlu_product.argtypes = (pointer, number, number, pointer, number, pointer, pointer)
    products.danlu_product_add.argtypes = (pointer, number, number, pointer, number, pointer)
    products.danlu_product_gelu.argtypes = (pointer, number, number, pointer, number, pointer, pointer, pointer)
    products.danlu_product_gelu_backward.argtypes = products.danlu_product_gelu.argtypes
    products.danlu_weight_gradient.argtypes = (pointer, number, pointer, number, number, pointer)
    parameters, real = ctypes.POINTER(AdamWParameter), ctypes.c_float
    adamw.danlu_gradient_squares.argtypes, adamw.danlu_gradient_squares.restype = (parameters, number), ctypes.c_double
    adamw.danlu_adamw.argtypes = (parameters, number, real, real, real, real)
    if not attention.danlu_attention_ready():
        return KernelsUnavailable("they are for CPUs that multiply bf16 (AVX512-BF16)")
    return Kernels(attention, layers, products if products.danlu_products_ready() else None, adamw)


def draw_seed() -> int:
    """Of a call's dropout, from PyTorch's generator: a run that goes on draws what the uninterrupted one would have."""
    return int(torch.randint(2**63 - 1, ()))
