"""Packed decoders: an unmodified Hugging Face causal language model that reads rows laid end to end, and never holds all its logits."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from danlu.errors import ModelError
from danlu.tasks.context import Context
from danlu.tasks.custom_autograd import use_custom_autograd
from danlu.tasks.packed import PackedModel, padded_rows, try_packing

CHUNK_TOKENS, CHUNK_NUMBERS = 1024, 1 << 26
"""Logits that stand in memory at once: this many tokens by the vocabulary, or so many numbers if that is more. 1,024 tokens by 150,000
entries are 0.6 GB in float32; a small vocabulary need not make its logits twice."""


def token_losses(
    hidden: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of each position, float32 [tokens], 0 where the target is -100. hidden: [tokens, hidden]; targets: int64 [tokens].

    Chunk by chunk, each chunk's logits made again for its backward: what is kept is the hidden states, not tokens x vocabulary
    (the idea of https://arxiv.org/abs/2410.10989 without its kernels).
    """
    chunk_tokens = chunk_tokens or _chunk_of(head)
    pieces = []
    for some, aims in zip(torch.split(hidden, chunk_tokens), torch.split(targets, chunk_tokens), strict=True):
        if torch.is_grad_enabled() and hidden.requires_grad and len(hidden) > chunk_tokens:
            piece = checkpoint(_chunk_losses, some, head, aims, softcap, scale, use_reentrant=False)
        else:
            piece = _chunk_losses(some, head, aims, softcap, scale)
        pieces.append(piece)
    return torch.cat(pieces)


@torch.no_grad()
def token_scores(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, *, softcap: float | None = None, scale: float = 1.0
) -> torch.Tensor:
    """Each position's cross-entropy and whether the most probable token is the target, float32 [tokens, 2]."""
    pieces = []
    for some, aims in zip(torch.split(hidden, CHUNK_TOKENS), torch.split(targets, CHUNK_TOKENS), strict=True):
        logits = _logits(some, head, softcap, scale)
        losses = nn.functional.cross_entropy(logits, aims, reduction="none", ignore_index=-100)
        pieces.append(torch.stack([losses, (logits.argmax(-1) == aims).float()], dim=1))
    return torch.cat(pieces)


def _chunk_of(head: nn.Module) -> int:
    entries = getattr(head, "out_features", None)
    return max(CHUNK_TOKENS, CHUNK_NUMBERS // entries) if isinstance(entries, int) else CHUNK_TOKENS


def _chunk_losses(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, softcap: float | None, scale: float) -> torch.Tensor:
    return nn.functional.cross_entropy(_logits(hidden, head, softcap, scale), targets, reduction="none", ignore_index=-100)


def _logits(hidden: torch.Tensor, head: nn.Module, softcap: float | None, scale: float) -> torch.Tensor:
    logits: torch.Tensor = head(hidden).float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def next_tokens(input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The target of each position of packed rows, int64 [tokens]: the token after it, -100 at the end of its row."""
    targets = torch.cat([input_ids[1:], input_ids.new_full((1,), -100)])
    targets[cu_seqlens[1:].to(targets.device, torch.int64) - 1] = -100
    return targets


class PackedDecoder(PackedModel):
    """A Hugging Face `...ForCausalLM` whose forward takes packed rows and gives each row's summed next-token loss.

    The loss is made inside, so that DDP, FSDP and DeepSpeed see one forward. Whether the packed rows get the model's own answers is tried
    out once; any model for which they do not is fed padded batches instead.
    """

    context: Context | None = None
    """The workers that a pass's tokens are shared out over (`danlu.tasks.context`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = int(model.config.pad_token_id or 0)
        use_custom_autograd(model)
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.scale = scale_of_logits(model, self.softcap)
        try_packing(self, _lengths(model), self.hidden)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        with_hits: bool = False,
    ) -> torch.Tensor:
        """Summed loss of each row's targets, float32 [rows]; `targets` are every next token unless they are given.

        `with_hits`, for scoring only: beside it how many of them are the most probable token, [rows, 2].
        """
        given = targets is not None
        targets = next_tokens(input_ids, cu_seqlens) if targets is None else targets
        lengths = cu_seqlens.diff().to(input_ids.device, torch.int64)
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=input_ids.device), lengths)
        if self.context is not None:
            input_ids, position_ids, rows = (self.context.part(tensor, 0) for tensor in (input_ids, position_ids, rows))
            targets = self.context.part(targets, -100)
            cu_seqlens = self.context.cu_seqlens(cu_seqlens)
        hidden = self.hidden(input_ids, position_ids, cu_seqlens)
        if given:
            # Prompts are read and not learned: no logits are made for them.
            learned = targets != -100
            hidden, targets, rows = hidden[learned], targets[learned], rows[learned]
        head = self.model.get_output_embeddings()
        found = (token_scores if with_hits else token_losses)(hidden, head, targets, softcap=self.softcap, scale=self.scale)
        by_row = torch.zeros(len(lengths), *found.shape[1:], device=found.device).index_add(0, rows, found)
        return by_row if self.context is None else self.context.whole_sum(by_row)

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Last hidden states, [tokens, hidden]."""
        backbone = self.model.get_decoder()
        if self.packed:
            # No attention_mask at all: even one of ones would make some models forget where rows end.
            shared = {} if self.context is None else {"context": self.context}
            output = backbone(input_ids=input_ids[None], position_ids=position_ids[None], cu_seqlens=cu_seqlens, use_cache=False, **shared)
            packed: torch.Tensor = output.last_hidden_state[0]
            return packed
        lengths = cu_seqlens.diff().tolist()

        mask = padded_rows(torch.ones_like(input_ids), lengths)
        if self.prompted:
            from danlu.tasks.prompted import hidden_behind_prompt

            behind = hidden_behind_prompt(self.model, padded_rows(input_ids, lengths, self.pad_token_id), mask)
            return behind[mask.bool()]
        output = backbone(input_ids=padded_rows(input_ids, lengths, self.pad_token_id), attention_mask=mask, use_cache=False)
        flat: torch.Tensor = output.last_hidden_state[mask.bool()]
        return flat


@torch.no_grad()
def scale_of_logits(model: PreTrainedModel, softcap: float | None) -> float:
    """What a model multiplies its output layer's numbers by (Cohere's `logit_scale`, Granite's `logits_scaling`), found in its own logits;
    ModelError if they are made in another way, which losses made of the output layer would not follow."""
    was_training = model.training
    model.eval()
    ids = torch.randint(3, model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(1)).to(model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = _logits(hidden, model.get_output_embeddings(), softcap, 1.0)
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    model.train(was_training)
    within = 1e-3 if hidden.dtype == torch.float32 else 5e-2
    fitted = float((own * ours).sum() / ours.square().sum().clamp_min(1e-30))
    for scale in (1.0, fitted) if softcap is None else (1.0,):
        if torch.allclose(own, scale * ours, rtol=within, atol=within * float(own.abs().max())):
            return scale
    raise ModelError(
        f"{type(model).__name__} does more to its output layer's numbers than to multiply them, so losses made here would not be its own",
        where="model.model_name_or_path",
        fix="a model of another family",
    )


def _lengths(model: PreTrainedModel) -> list[int]:
    """Rows to try packing with: longer than a sliding window, where that is short enough to try, so that the window is seen too."""
    window = getattr(model.config, "sliding_window", None)
    table = int(getattr(model.config, "max_position_embeddings", 0) or 64)
    return [5, 2, 17, min(window + 8, table) if isinstance(window, int) and window <= 512 else min(48, table)]
