"""The compiled kernels that an image brings: the widest that its CPU has, and the same answers."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from danlu import compiled, doctor
from danlu.compiled import LEVELS, find_prebuilt, prebuild, prebuilt_path
from danlu.serve.engines.torch import kernels
from danlu.serve.engines.torch.kernels import Kernels, LinearStruct

HASWELL = frozenset(["fpu", "sse4_2", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
SKYLAKE = HASWELL | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
ZEN_4 = SKYLAKE | {"avx512_bf16", "avx512vbmi", "avx512_vnni"}
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copy(kernels.SOURCE, tmp_path))


@pytest.mark.parametrize(
    ("flags", "level"),
    [(SAPPHIRE_RAPIDS, "amx"), (ZEN_4, "avx512-bf16"), (SKYLAKE, "avx512"), (HASWELL, "avx2"), (HASWELL - {"fma"}, None)],
)
def test_a_cpu_gets_the_widest_that_it_has(flags: frozenset[str], level: str | None, source: Path) -> None:
    for one in LEVELS:
        prebuilt_path(source, one).touch()
    found = find_prebuilt(source, flags)
    assert (found and found.name.removeprefix("kernels-").rpartition("-")[0]) == level


def test_libraries_of_another_source_are_not_taken(source: Path) -> None:
    prebuilt_path(source, LEVELS[-1]).touch()
    assert find_prebuilt(source, HASWELL)
    source.write_text(source.read_text() + "// changed")
    assert find_prebuilt(source, HASWELL) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are x86-64's")
def test_without_a_compiler_the_image_still_has_them(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One level is built here, the soak test of the image builds all."""
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(compiled, "LEVELS", LEVELS[-1:])
    (path,) = prebuild(source)
    if not find_prebuilt(source):
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setenv("CXX", "nosuch-g++")
    monkeypatch.setattr(kernels, "SOURCE", source)
    assert [(one.verdict, path.name in one.found) for one in doctor._kernels()] == [("ok", True)]
    loaded = kernels._found.__wrapped__()
    assert isinstance(loaded, Kernels)
    assert (loaded.library._name, loaded.vectors) == (str(path), "AVX2")
    x, weight = torch.randn(5, 96), torch.randn(33, 96)
    packed = loaded.pack(weight)
    found = loaded.linear(LinearStruct(weight=packed.data_ptr(), outs=33, ins=96), x)
    torch.testing.assert_close(found, nn.functional.linear(x, weight), rtol=1e-5, atol=1e-4)
