"""Packed encoders: unmodified Hugging Face models that read sequences laid end to end, each seeing only itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from danlu.data.pack import Packed
from danlu.errors import ModelError
from danlu.tasks.fused_layer import use_fused_layers
from danlu.tasks.packed_attention import ATTENTION

log = logging.getLogger(__name__)

Answers = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""What a model makes of input_ids [tokens], position_ids [tokens] and cu_seqlens [rows + 1]."""


class PackedModel(nn.Module):
    """A Hugging Face model, called with packed rows. `packed` is False where it gets padded ones inside, as with a learned prompt
    (`prompted`)."""

    model: PreTrainedModel
    packed: bool
    prompted: bool = False


def check_packed(model: nn.Module, who: str, *, where: str, fix: str) -> PackedModel:
    """The model of a task; ModelError if it is fed padded batches."""
    assert isinstance(model, PackedModel)
    if not model.packed:
        its = "is fed padded batches, since its packed answers are not its own"
        raise ModelError(f"{type(model.model).__name__} {its}; {who} takes packed ones only", where=where, fix=fix)
    return model


class PackedEncoder(PackedModel):
    """A Hugging Face encoder, with or without a head, whose forward takes packed sequences and gives an output for each (`per_token`: for
    each of their tokens).

    Encoders (BERT, RoBERTa, ELECTRA, DistilBERT ...) read sequences end to end: attention splits on the offsets, and where the head looks
    at first tokens a hook behind the last layer hands it each sequence's own. Whether that gives the model's own answers is tried out
    once; any model for which it does not is fed padded batches instead.

    `packed` is for quantized weights, whose rounding looks like another answer: what the same model in floating point has.
    """

    per_token = False
    reads_first_tokens = True

    def __init__(self, model: PreTrainedModel, *, packed: bool | None = None) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = int(model.config.pad_token_id or 0)
        # RoBERTa and its kin count positions from pad_token_id + 1 (and find them from the ids, if not given).
        self.first_position = 0
        # A tokenizer numbers segments whether the model tells them apart or not.
        self.has_segments = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
        self.packed = False
        layers = layer_stack(model)
        if layers is not None and packed is not False:
            self.first_position = first_position(model)
            hook = layers.register_forward_hook(_first_tokens, with_kwargs=True) if self.reads_first_tokens else None
            if packed:
                model.set_attn_implementation(ATTENTION)
                self.packed = True
            elif not try_packing(self, _lengths(model, self.first_position), partial(PackedEncoder.forward, self)) and hook is not None:
                hook.remove()
        if self.packed:
            use_fused_layers(model)

    def call(self, input_ids: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
        """The model on [batch, length]: what its head says of each sequence, [batch, width], or of each token, [batch, length, width]."""
        logits: torch.Tensor = self.model(input_ids=input_ids, **arguments).logits
        return logits

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Outputs [sequences, width], or [tokens, width] with `per_token`, of a batch (see `danlu.data.pack.Packed`)."""
        types = token_type_ids if self.has_segments else None
        return (self._forward_packed if self.packed else self._forward_padded)(input_ids, position_ids, cu_seqlens, types)

    def logits(self, batch: Packed) -> torch.Tensor:
        """The outputs of a batch; not for training, where the wrapped module has to be called."""
        logits: torch.Tensor = self(*inputs(batch))
        return logits

    def _forward_packed(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, token_type_ids: torch.Tensor | None
    ) -> torch.Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids[None]}
        positions = position_ids[None] + self.first_position
        output = self.call(input_ids[None], position_ids=positions, cu_seqlens=cu_seqlens, **types)
        return output if self.reads_first_tokens else output[0]

    def _forward_padded(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, token_type_ids: torch.Tensor | None
    ) -> torch.Tensor:
        lengths = cu_seqlens.diff().tolist()
        types = {} if token_type_ids is None else {"token_type_ids": padded_rows(token_type_ids, lengths)}
        mask = padded_rows(torch.ones_like(input_ids), lengths)
        output = self.call(padded_rows(input_ids, lengths, self.pad_token_id), attention_mask=mask, **types)
        return output if self.reads_first_tokens else output[mask.bool()]


class PackedClassifier(PackedEncoder):
    """`...ForSequenceClassification`: logits [sequences, labels]."""


class PackedChooser(PackedEncoder):
    """`...ForMultipleChoice`: a score for each option, [sequences, 1]. Its softmax is left to whoever knows which belong together."""

    def call(self, input_ids: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
        """One option a row: that class wants [batch, options, length], and flattens it (not every family's also position_ids)."""
        logits: torch.Tensor = self.model(input_ids=input_ids[:, None], **arguments).logits
        return logits


class PackedTagger(PackedEncoder):
    """`...ForTokenClassification`: logits [tokens, labels]."""

    per_token = True
    reads_first_tokens = False


class PackedReader(PackedEncoder):
    """`...ForQuestionAnswering`: each token's logits of being an answer's first and its last, [tokens, 2]."""

    per_token = True
    reads_first_tokens = False

    def call(self, input_ids: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
        """Start and end beside each other."""
        output = self.model(input_ids=input_ids, **arguments)
        return torch.stack([output.start_logits, output.end_logits], dim=-1)


class PackedEmbedder(PackedEncoder):
    """An encoder without a head: a vector of length 1 for each sequence, [sequences, hidden], float32."""

    reads_first_tokens = False

    def __init__(self, model: PreTrainedModel, *, pooling: Literal["mean", "cls"], packed: bool | None = None) -> None:
        super().__init__(model, packed=packed)
        self.pooling = pooling

    def call(self, input_ids: torch.Tensor, **arguments: torch.Tensor) -> torch.Tensor:
        """Hidden states."""
        hidden: torch.Tensor = self.model(input_ids=input_ids, **arguments).last_hidden_state
        return hidden

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Vectors of a batch's sequences."""
        hidden = super().forward(input_ids, position_ids, cu_seqlens, token_type_ids).float()
        starts, lengths = cu_seqlens[:-1].to(hidden.device, torch.int64), cu_seqlens.diff().to(hidden.device, torch.int64)
        if self.pooling == "cls":
            pooled = hidden[starts]
        else:
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
            pooled = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, owner, hidden) / lengths[:, None]
        return nn.functional.normalize(pooled, dim=-1)


def padded_rows(tensor: torch.Tensor, lengths: list[int], value: float = 0) -> torch.Tensor:
    """[tokens] of packed rows -> [rows, longest], `value` behind each row's end."""
    return nn.utils.rnn.pad_sequence(list(torch.split(tensor, lengths)), batch_first=True, padding_value=value)


def inputs(batch: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A batch as the arguments of PackedEncoder.forward."""
    return batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.token_type_ids


def layer_stack(model: PreTrainedModel) -> nn.Module | None:
    """What holds the layers of an encoder; None if the model is none."""
    backbone = model.base_model
    stack = getattr(backbone, "encoder", None) or getattr(backbone, "transformer", None)
    return stack if isinstance(stack, nn.Module) and not getattr(model.config, "is_decoder", False) else None


def first_position(model: PreTrainedModel) -> int:
    """The position of a row's first token: RoBERTa and its kin begin behind their padding token's."""
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding: int | None = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest row that the model's table of positions has room for; None if it computes positions instead."""
    rooms = [
        # RoBERTa and its kin begin behind the padding token's row, BART's behind two.
        module.num_embeddings - getattr(module, "offset", 0) - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe", "embed_positions")
    ]
    return min(rooms, default=None)


def _first_tokens(stack: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Turn the last layer's [1, tokens, hidden] into [rows, 1, hidden], so that 'the first token' is each row's own."""
    cu_seqlens = kwargs.get("cu_seqlens")
    if cu_seqlens is None:
        return output
    hidden = output[0]
    output.last_hidden_state = hidden[0].index_select(0, cu_seqlens[:-1].to(hidden.device, torch.int64))[:, None]
    return output


def _lengths(model: PreTrainedModel, first_position: int) -> list[int]:
    """Rows to try packing with: more tokens in all than a short position table has."""
    table = int(getattr(model.config, "max_position_embeddings", 0) or 0) - first_position
    return [5, 3, 7] + [min(64, table)] * (table // 64 + 1 if 0 < table <= 1024 else 0)


@torch.no_grad()
def try_packing(wrapper: PackedModel, lengths: Sequence[int], answers: Answers) -> bool:
    """Leave `wrapper.packed` and its model's attention packed if that gives the model's own answers, else as they were; True if it does.

    `answers` are the wrapper's, packed or padded as `wrapper.packed` says. Rows of different `lengths`: a leak between them or a wrong
    position shows.
    """
    model, before = wrapper.model, wrapper.model.config._attn_implementation
    was_training = model.training
    model.eval()
    ids = torch.randint(3, model.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    try:
        wrapper.packed = False
        padded = answers(ids, positions, cu_seqlens)
        model.set_attn_implementation(ATTENTION)
        wrapper.packed = True
        packed = answers(ids, positions, cu_seqlens)
        tolerance = 1e-4 if packed.dtype == torch.float32 else 2e-2
        largest = max(1.0, float(padded.float().abs().max()))
        wrapper.packed = torch.allclose(padded.float(), packed.float(), rtol=tolerance, atol=tolerance * largest)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        log.info("packing is not possible for %s: %s", type(model).__name__, error)
        wrapper.packed = False
    if not wrapper.packed:
        model.set_attn_implementation(before)
        log.info("%s is fed padded batches: its packed answers are not its own", type(model).__name__)
    model.train(was_training)
    return wrapper.packed
