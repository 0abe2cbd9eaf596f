"""AdaLoRA's moving ranks: what the loss gets, when ranks move, and how that survives a restart."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from peft import PeftModel

from danlu.train.peft import ADAPTER
from danlu.train.strategy import State

FILE = "adalora.pt"


class RankAllocator:
    """PEFT's allocator (https://arxiv.org/abs/2303.10512) of one model, with the step it is at.

    Its importances are made of the same whole gradients on every rank, so every rank takes the same decisions.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model, self.tuner = model, model.base_model
        self.config = self.tuner.peft_config[ADAPTER]
        self.parameters = [p for name, p in self.tuner.model.named_parameters() if p.requires_grad and ".lora_" in name]
        self.values = {name: p for name, p in self.tuner.model.named_parameters() if ".lora_E." in name}
        self.step = 0
        self.moved = False
        """True if the last update moved a rank."""

    def update(self) -> None:
        """Count a step and move ranks if it is time: after the weights were updated, with their gradients still in `.grad`."""
        before = self.ranks()
        self.step += 1
        self.tuner.update_and_allocate(self.step)
        self.moved = self.ranks() != before

    def penalty(self) -> torch.Tensor:
        """How far the directions of the modules are from right angles, times `orth_reg_weight`."""
        pairs = [(".lora_A." in name, p) for name, p in self.tuner.model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
        with torch.autocast(pairs[0][1].device.type, enabled=False):
            norms = []
            for is_a, parameter in pairs:
                matrix = parameter.float() if is_a else parameter.float().T
                norms.append(torch.linalg.matrix_norm(matrix @ matrix.T - torch.eye(len(matrix), device=matrix.device)))
            return torch.stack(norms).mean() * float(self.config.orth_reg_weight)

    def ranks(self) -> dict[str, int]:
        """Rank of each module, as last decided."""
        decided = self.config.rank_pattern
        if decided is None:
            return {name.partition(".lora_E")[0]: int(self.config.init_r) for name in self.values}
        return {name.partition(".lora_E")[0]: sum(kept) for name, kept in decided.items()}

    def save(self, folder: Path) -> None:
        """Write what the next decisions depend on."""
        allocator = self.tuner.rankallocator
        averages = {"ipt": allocator.exp_avg_ipt, "unc": allocator.exp_avg_unc, "last": allocator.ipt}
        torch.save({"step": self.step, "averages": averages, "rank_pattern": self.config.rank_pattern}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote."""
        state = torch.load(folder / FILE, map_location=self.parameters[0].device, weights_only=True)
        allocator = self.tuner.rankallocator
        allocator.exp_avg_ipt, allocator.exp_avg_unc, allocator.ipt = (state["averages"][name] for name in ("ipt", "unc", "last"))
        self.step, self.config.rank_pattern = state["step"], state["rank_pattern"]


class WithAllocator:
    """A strategy's state, and the allocator's beside it."""

    def __init__(self, state: State, allocator: RankAllocator, rank: int) -> None:
        self.inner, self.allocator, self.rank = state, allocator, rank

    def save(self, folder: Path) -> None:
        self.inner.save(folder)
        if self.rank == 0:
            self.allocator.save(folder)

    def load(self, folder: Path) -> None:
        self.inner.load(folder)
        self.allocator.load(folder)

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        return self.inner.weights(names)


def export_ranks(model: PeftModel, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter with only the directions in use.

    By the values themselves, not by the last decision: until the next one, a direction that was put out goes on learning.
    """
    config = model.peft_config[ADAPTER]
    decided = config.rank_pattern
    try:
        inside = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items() if ".lora_E." in name}
        config.rank_pattern = {name: (tensor != 0).view(-1).tolist() for name, tensor in inside.items()}
        model.save_pretrained(folder, state_dict=dict(state))
    finally:
        config.rank_pattern = decided


__all__ = ["RankAllocator", "WithAllocator", "export_ranks"]
