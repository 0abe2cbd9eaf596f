"""Data x pipeline x tensor: eight workers give a plain PyTorch loop's losses and gradient norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from test_parity import decoder_case, plain_decoder_run


@pytest.mark.soak
def test_eight_workers_in_three_dimensions_equal_the_plain_loop(tiny_decoder: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    cube: dict[str, Any] = {"kind": "pipeline", "tensor_parallel_size": 2}
    shape: dict[str, Any] = {"workers": {"num_workers": 8}, "micro_batch_size": 2}
    cases = {
        "data x pipeline x tensor": {"folder": str(tiny_decoder)} | decoder_case(tiny_decoder, **shape, parallel=cube),
        "and ZeRO-1": {"folder": str(tiny_decoder)} | decoder_case(tiny_decoder, **shape, parallel=cube | {"zero_stage": 1}),
        "resumed by four groups of two": {"folder": str(tiny_decoder), "goes_on_from": "and ZeRO-1"}
        | decoder_case(tiny_decoder, **shape, parallel={"kind": "tensor"}),
    }
    curves = on_ranks(8, cases, tmp_path, model=tiny_decoder, train_file=topic_files["train"]).curves
    plain = plain_decoder_run(tiny_decoder, topic_files["train"])[0]
    for name, expected in (("data x pipeline x tensor", plain), ("and ZeRO-1", plain), ("resumed by four groups of two", plain[2:])):
        for ours, theirs in zip(curves[name], expected, strict=True):
            assert ours == pytest.approx(theirs, abs=5e-6), name
