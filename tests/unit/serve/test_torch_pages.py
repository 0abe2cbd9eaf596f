"""Memory in large pages: tensors side by side."""

import re
from pathlib import Path

import pytest
import torch

from danlu.serve.engines.torch.pages import CACHE_LINE_BYTES, REGION_BYTES, Pages


def test_tensors_lie_side_by_side_and_do_not_share_an_element() -> None:
    pages = Pages()
    first, second = pages.empty(3, 5, dtype=torch.bfloat16), pages.empty(7, dtype=torch.float32)
    first.fill_(1)
    second.fill_(2)
    assert first.shape == (3, 5)
    assert first.is_contiguous()
    assert second.data_ptr() - first.data_ptr() == CACHE_LINE_BYTES
    assert bool((first == 1).all())
    assert bool((second == 2).all())


@pytest.mark.parametrize("length", [0, 1, REGION_BYTES + 1])
def test_a_tensor_has_the_size_that_was_asked_for(length: int) -> None:
    pages = Pages()
    before = pages.empty(1, dtype=torch.uint8).fill_(3)
    found = pages.empty(length, dtype=torch.uint8)
    assert found.shape == (length,)
    found.fill_(4)
    assert int(before[0]) == 3


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this kernel has no large pages to ask for")
def test_what_does_not_fill_a_large_page_is_in_one() -> None:
    assert "hg" in flags_of(Pages().empty(1000, dtype=torch.bfloat16).data_ptr())


def flags_of(address: int) -> list[str]:
    """Of the mapping that it lies in. https://docs.kernel.org/filesystems/proc.html"""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping has it")
