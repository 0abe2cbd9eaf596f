"""The compiled kernels (kernels.cpp) of a language model's steps. Nothing needs them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from danlu.compiled import KernelsUnavailable, load
from danlu.errors import ModelError

SOURCE = Path(__file__).with_name("kernels.cpp")
PANEL = 32
"""Outputs of a panel of weights: kernels.cpp's."""

Empty = Callable[..., torch.Tensor]
"""torch.empty, or another that takes its memory elsewhere."""


class PartStruct(ctypes.Structure):
    """kernels.cpp's Part."""

    _fields_ = [
        ("up", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first_panel", "stop_panel", "first_rank", "ranks")),
    ]


class LoraStruct(ctypes.Structure):
    """kernels.cpp's Lora."""

    _fields_ = [
        ("down", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("owners", "present", "parts")),
        ("num_parts", ctypes.c_int64),
    ]


class LinearStruct(ctypes.Structure):
    """kernels.cpp's Linear."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("outs", ctypes.c_int64),
        ("ins", ctypes.c_int64),
        ("lora", LoraStruct),
    ]


class Kernels:
    """The library, loaded. It takes as many threads as PyTorch would: `torch.set_num_threads` in the thread that calls counts here too."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.danlu_vectors.restype = ctypes.c_char_p
        self.library.danlu_pack.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        self.library.danlu_pack_integers.argtypes = (ctypes.c_int, *self.library.danlu_pack.argtypes)
        self.library.danlu_linear.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        self.library.danlu_step.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        for function in ("danlu_pack", "danlu_pack_integers", "danlu_linear", "danlu_step"):
            getattr(self.library, function).restype = None

    @property
    def vectors(self) -> str:
        """The widest instructions they were built with."""
        found: bytes = self.library.danlu_vectors()
        return found.decode()

    def pack(self, weight: torch.Tensor, empty: Empty = torch.empty) -> torch.Tensor:
        """A weight [out, in] as they read it: [panels, in, 32] elements in their own order. `empty`: whose memory. ModelError: bf16 goes
        in pairs of inputs."""
        outs, ins = weight.shape
        _check_pairs(weight.dtype, ins)
        packed = empty(-(-outs // PANEL), ins, PANEL, dtype=weight.dtype)
        weight = weight.contiguous()
        self.library.danlu_pack(weight.dtype == torch.bfloat16, weight.data_ptr(), outs, ins, packed.data_ptr())
        return packed

    def pack_integers(
        self, values: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype, empty: Empty = torch.empty
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight of 8 or 4 bits as they multiply activations of `dtype` with it, and its scales. values: int8 [out, in]; scale:
        [out, groups]. ModelError as of `pack`."""
        outs, ins = values.shape
        _check_pairs(dtype, ins)
        packed = empty(-(-outs // PANEL) * PANEL * ins * bits // 8, dtype=torch.uint8)
        values = values.contiguous()
        self.library.danlu_pack_integers(dtype == torch.bfloat16, bits, values.data_ptr(), outs, ins, packed.data_ptr())
        whole = nn.functional.pad(scale.float(), (0, 0, 0, -outs % PANEL))
        if bits == 8:
            return packed, whole[:, 0].contiguous()
        whole = whole.view(-1, PANEL, whole.shape[1]).transpose(1, 2)
        return packed, empty(*whole.shape, dtype=torch.bfloat16).copy_(whole)

    def linear(self, struct: LinearStruct, x: torch.Tensor) -> torch.Tensor:
        """One of a step's products by itself, so that it can be compared. x: [tokens, in]; returns x @ weight.T + bias, [tokens, out]."""
        x = x.contiguous()
        y = x.new_empty(len(x), struct.outs)
        self.library.danlu_linear(x.dtype == torch.bfloat16, ctypes.byref(struct), x.data_ptr(), len(x), y.data_ptr())
        return y


def _check_pairs(dtype: torch.dtype, ins: int) -> None:
    if dtype == torch.bfloat16 and ins % 2:
        raise ModelError(f"a product of {ins} inputs cannot be made in pairs of bf16", where="engine.dtype", fix="dtype: fp32")


def need_kernels(dtype: torch.dtype) -> None:
    """KernelsUnavailable where they compute in other numbers than the model."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise KernelsUnavailable(f"they are for fp32 and bf16, not for {dtype}")


def load_kernels() -> Kernels:
    """KernelsUnavailable says why there are none; once a process."""
    if isinstance(found := _found(), KernelsUnavailable):
        raise found
    return found


@functools.cache
def _found() -> Kernels | KernelsUnavailable:
    try:
        return Kernels(load(SOURCE))
    except KernelsUnavailable as error:
        return error
