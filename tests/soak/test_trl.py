"""KTO beside TRL's own trainer, where `make bench` has installed it: one loss and one gradient on the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import preferences, write_chat_model, write_rows
from transformers import AutoModelForCausalLM

from danlu.data.encode import NO_TARGET
from danlu.data.pack import pack_rows
from danlu.spec.data import Data
from danlu.spec.task import Kto, Preference
from danlu.tasks import preference
from danlu.tasks.tokenizer import load_tokenizer

pytestmark = pytest.mark.soak
TRL = Path(__file__).parents[2] / ".cache" / "bench" / "trl"
NUM_ROWS = 8


def moved(module: torch.nn.Module, by: float) -> None:
    """Weights that are not the start model's any more."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("by", [0.01, 0.1])
def test_the_kto_loss_and_its_gradient_are_trls(by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TRL)
    trl = pytest.importorskip("trl", reason="a peer: make bench installs it")
    import datasets
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    model = write_chat_model(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    task = Preference(loss=Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5))
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(preferences(NUM_ROWS))
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    split = preference.splits(Data(train=path, dev=path, cache_dir=str(tmp_path / "cache")), task, tokenizer, max_length=128, seed=1).train

    ours = preference.wrap(preference.build_model(model), task)
    with torch.no_grad():
        start = preference.row_outputs(ours, pack_rows(split.encoded, range(NUM_ROWS), None))[:, :2]
    moved(ours, by)
    found = preference.loss(ours, pack_rows(split.encoded, range(NUM_ROWS), None, start.numpy()), task) / NUM_ROWS
    found.backward()

    examples = [example(split, row) | {"label": rows[row]["label"]} for row in range(NUM_ROWS)]
    policy = AutoModelForCausalLM.from_pretrained(model)
    trainer = trl.KTOTrainer(
        policy,
        AutoModelForCausalLM.from_pretrained(model),
        trl.KTOConfig(
            str(tmp_path / "out"), beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, per_device_train_batch_size=NUM_ROWS,
            use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, train_sampling_strategy="sequential",
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2),  # which is not trained on
        processing_class=tokenizer,
    )  # fmt: skip
    moved(trainer.model, by)
    batch = DataCollatorForUnpairedPreference(pad_token_id=tokenizer.pad_token_id)(examples)
    expected = trainer._compute_loss(trainer.model.eval(), batch, False)
    expected.backward()
    assert (trainer._metrics["eval"]["kl"][-1] > 0) == (by == 0.01), "the divergence counts in one case, and would be below 0 in the other"
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    mine = {name.split("model.", 1)[1] if name.startswith("model.model.") else name: p.grad for name, p in ours.named_parameters()}
    compared = 0
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.allclose(mine[name], gradient, atol=1e-6), name
        compared += bool(gradient.abs().max() > 1e-6)
    assert compared > 10


def example(split: Any, row: int) -> dict[str, Any]:
    """A row's prompt and answer, and its prompt with the answer to another, as TRL's collator takes them: what is learned is an answer."""
    ids, types, labels = split.encoded.row(row), split.encoded.token_types(row), split.encoded.row_labels(row)
    parts = [(ids[side], labels[side]) for side in (types != preference.OTHER, types == preference.OTHER)]
    found = {}
    for name, (tokens, aims) in zip(("completion_ids", "KL_completion_ids"), parts, strict=True):
        learned = np.flatnonzero(aims[:-1] != NO_TARGET) + 1
        assert (np.diff(learned) == 1).all()
        found |= {"prompt_ids": tokens[: learned[0]].tolist(), name: tokens[learned].tolist()}
    return found
