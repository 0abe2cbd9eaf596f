"""Packed masked language models: an unmodified `...ForMaskedLM` whose output layer sees only the positions that are learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from danlu.tasks.fused_layer import use_fused_layers
from danlu.tasks.packed import PackedModel, first_position, layer_stack, padded_rows, try_packing


class PackedMaskedLM(PackedModel):
    """Gives each row's summed loss of its targets. A hook behind the encoder leaves only the learned positions to the model's own head.

    Whether packed rows get the model's own answers is tried out once; any model for which they do not is fed padded batches instead.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = int(model.config.pad_token_id or 0)
        self.first_position = 0
        self.packed = False
        self._chosen = _Chosen()
        model.base_model.register_forward_hook(self._chosen.leave)
        if layer_stack(model) is not None:
            self.first_position = first_position(model)
            table = int(getattr(model.config, "max_position_embeddings", 0) or 64) - self.first_position
            if try_packing(self, [5, 3, min(17, table), min(48, table)], self._every):
                use_fused_layers(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        with_hits: bool = False,
    ) -> torch.Tensor:
        """Summed loss of each row's targets (every token unless they are given), float32 [rows]; `with_hits`: beside it how many are the
        most probable token, [rows, 2]."""
        targets = input_ids if targets is None else targets
        learned = targets != -100
        logits = self.logits(input_ids, position_ids, cu_seqlens, learned)
        lengths = cu_seqlens.diff().to(logits.device, torch.int64)
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=logits.device), lengths)[learned]
        losses = nn.functional.cross_entropy(logits.float(), targets[learned], reduction="none")
        if with_hits:
            hits = (logits.argmax(-1) == targets[learned]).float()
            return torch.zeros(len(lengths), 2, device=logits.device).index_add(0, rows, torch.stack([losses, hits], dim=1))
        return torch.zeros(len(lengths), device=logits.device).index_add(0, rows, losses)

    def _every(self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return self.logits(input_ids, position_ids, cu_seqlens, torch.ones_like(input_ids, dtype=torch.bool))

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Logits of the chosen positions (bool [tokens]) of packed rows: [chosen, vocabulary]."""
        try:
            if self.packed:
                self._chosen.places = chosen[None]
                positions = position_ids[None] + self.first_position
                output = self.model(input_ids=input_ids[None], position_ids=positions, cu_seqlens=cu_seqlens)
            else:
                lengths = cu_seqlens.diff().tolist()
                self._chosen.places = padded_rows(chosen.to(torch.int64), lengths).bool()
                mask = padded_rows(torch.ones_like(input_ids), lengths)
                output = self.model(input_ids=padded_rows(input_ids, lengths, self.pad_token_id), attention_mask=mask)
        finally:
            self._chosen.places = None
        logits: torch.Tensor = output.logits[0]
        return logits


class _Chosen:
    """The positions of the pass that is running; the stages of a pipeline, which are copies of the module, share it."""

    places: torch.Tensor | None = None

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.places is not None:
            output.last_hidden_state = output[0][self.places][None]
        return output
