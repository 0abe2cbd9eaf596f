"""An unmodified Hugging Face encoder-decoder that takes packed rows, source and target end to end, and pads them inside."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from danlu.tasks.packed import PackedModel, padded_rows


class EncoderDecoder(PackedModel):
    """Gives each row's summed loss of its target's tokens. Token types tell the source (0) from the target (1)."""

    packed = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = int(model.config.pad_token_id or 0)
        self.start_token_id = int(model.config.decoder_start_token_id or 0)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        token_type_ids: torch.Tensor,
        with_hits: bool = False,
    ) -> torch.Tensor:
        """Summed loss of each row's target, float32 [rows]; `with_hits`: beside it how many are the most probable token, [rows, 2]."""
        rows = torch.split(input_ids, cu_seqlens.diff().tolist())
        lengths = [int(types.sum()) for types in torch.split(token_type_ids, cu_seqlens.diff().tolist())]
        sources = [row[: len(row) - length] for row, length in zip(rows, lengths, strict=True)]
        targets = torch.cat([row[len(row) - length :] for row, length in zip(rows, lengths, strict=True)])
        source_lengths = [len(source) for source in sources]
        mask = padded_rows(torch.ones_like(torch.cat(sources)), source_lengths)
        labels = padded_rows(targets, lengths, -100)
        # What was written so far, the start token before it (transformers' shift_tokens_right).
        written = labels.roll(1, dims=1)
        written[:, 0] = self.start_token_id
        output = self.model(
            input_ids=padded_rows(torch.cat(sources), source_lengths, self.pad_token_id),
            attention_mask=mask,
            decoder_input_ids=written.masked_fill(written == -100, self.pad_token_id),
            use_cache=False,
        )
        logits = output.logits.float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(1)
        if not with_hits:
            return losses
        return torch.stack([losses, (logits.argmax(-1) == labels).sum(1).float()], dim=1)
