"""nf4 bundles run on every CPU, whatever the model's width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from danlu.artifact.bundle import Bundle, BundleMeta, Lineage
from danlu.compress.load import load_model
from danlu.compress.quantize import quantize
from danlu.spec.compress import BnbNf4
from danlu.spec.task import Classification

bnb = pytest.importorskip("bitsandbytes")
LABELS = ["grain", "ship", "trade"]


def bundle(path: Path, quantization: BnbNf4 | None) -> Bundle:
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    meta = BundleMeta(
        name="topics",
        task=Classification(),
        labels=LABELS,
        max_length=32,
        precision="fp32",
        probes=[],
        lineage=lineage,
        quantization=quantization,
    )
    return Bundle(path, meta)


@pytest.mark.parametrize(("width", "double_quant", "tolerance"), [(48, False, 1e-4), (48, True, 1e-4), (96, False, 0.1), (64, False, 0.1)])
def test_its_answers_are_those_of_the_dequantized_weights(width: int, double_quant: bool, tolerance: float, tmp_path: Path) -> None:
    """Rows of whole blocks of 64 may go through a kernel that rounds to bf16."""
    whole = tmp_path / "whole"
    model = AutoModelForSequenceClassification.from_pretrained(
        write_tiny_model(whole / "model", hidden_size=width), num_labels=len(LABELS), dtype=torch.float32
    )
    model.save_pretrained(whole / "model")
    quantization = BnbNf4(double_quant=double_quant)
    quantize(bundle(whole, None), quantization, tmp_path / "small" / "model")
    found = load_model(bundle(tmp_path / "small", quantization)).eval()
    layers = {name: layer for name, layer in found.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert len(layers) == 13  # six in each of two layers, and the pooler's
    with torch.no_grad():
        for name, layer in layers.items():
            plain = model.get_submodule(name)
            assert isinstance(plain, nn.Linear)
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert not torch.equal(weight, plain.weight)
            plain.weight.copy_(weight)
        ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(1))
        expected = model.eval()(input_ids=ids).logits
        for _ in range(2):
            torch.testing.assert_close(found(input_ids=ids).logits, expected, atol=tolerance, rtol=0.0)
