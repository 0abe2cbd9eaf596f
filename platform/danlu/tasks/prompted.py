"""Prompt learning: virtual tokens, or keys and values, in front of every row. Such rows are padded, not packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from danlu.tasks.packed import PackedModel

if TYPE_CHECKING:
    from peft import PeftModel


def put_prompt(module: PackedModel, prompted: PeftModel) -> None:
    """Let `module` call its model with PEFT's prompt in front of each row."""
    prompted.get_base_model().set_attn_implementation("sdpa")  # the packed attention sees no rows' ends here
    module.model, module.packed, module.prompted = prompted, False, True


def load_prompt(base: PreTrainedModel, module: PackedModel, folder: Path) -> PackedModel:
    """`module`, which wraps `base`, with the prompt of a PEFT folder."""
    from peft import PeftModel

    put_prompt(module, PeftModel.from_pretrained(base, folder))
    return module


def hidden_behind_prompt(prompted: PeftModel, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states of a decoder's padded rows [rows, length], without those of the prompt: [rows, length, hidden]."""
    config, backbone = prompted.active_peft_config, prompted.get_base_model().get_decoder()
    rows, length = input_ids.shape
    seen = torch.cat([mask.new_ones(rows, config.num_virtual_tokens), mask], dim=1)
    if config.peft_type == "PREFIX_TUNING":
        past = prompted.get_prompt(rows, max_cache_len=length + config.num_virtual_tokens)
        output = backbone(input_ids=input_ids, attention_mask=seen, past_key_values=past)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden
    embedded = backbone.get_input_embeddings()(input_ids)
    prompt = prompted.get_prompt(rows).to(embedded.dtype)
    output = backbone(inputs_embeds=torch.cat([prompt, embedded], dim=1), attention_mask=seen, use_cache=False)
    hidden = output.last_hidden_state[:, config.num_virtual_tokens :]
    return hidden
