"""A language model and its tokenizer, as evaluation, a bundle's probes and prediction share them: scores of rows, answers to texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from danlu.artifact.bundle import Probe
from danlu.data.conversations import Conversation
from danlu.data.pack import by_length, pack_rows
from danlu.data.rendering import prompt_text
from danlu.spec.task import LanguageTask, Pretrain
from danlu.tasks.packed import PackedModel
from danlu.tasks.rows import Scored, Split
from danlu.tasks.task import task_file

NEW_TOKENS = 128
"""Of a prediction, at most; a bundle's generation_config.json may say another number."""

PROBE_TOKENS = 16


@dataclass(frozen=True)
class Completion:
    """What a model answers to `text`, its tokens, and their log probabilities (natural logarithms)."""

    text: str
    completion: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...] = ()
    """How far ahead of the second each most probable token is, in nats: where that is less than rounding, either may come."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for people."""
        mean = sum(self.logprobs) / max(1, len(self.logprobs))
        return {"completion": self.completion, "mean_logprob": round(mean, 4), "tokens": len(self.token_ids), "text": self.text}


class RowScorer:
    """A language model that reads a task's rows: outputs and scores of a split, as training made them."""

    def __init__(
        self, model: PackedModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int, task: LanguageTask, bf16: bool = False
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length, self.bf16 = max_length, bf16
        self.task, self.file = task, task_file(task)
        self.device = next(model.parameters()).device

    @property
    def pretrained(self) -> PreTrainedModel:
        """The Hugging Face model."""
        return self.model.model

    def outputs(self, split: Split, *, batch_tokens: int = 2048) -> np.ndarray:
        """`row_outputs` of all rows in their order, float32 [rows, width]."""
        found: np.ndarray | None = None
        for rows in by_length(split.encoded.lengths, batch_tokens):
            batch = pack_rows(split.encoded, rows, reference=split.reference).to(self.device)
            with torch.inference_mode(), self.autocast():
                out = self.file.row_outputs(self.model, batch).float().cpu().numpy()
            if found is None:
                found = np.empty((len(split), out.shape[1]), dtype=np.float32)
            found[rows] = out
        assert found is not None
        return found

    def scores(self, outputs: np.ndarray, split: Split) -> Scored:
        """The task's scores of a split's outputs."""
        return self.file.scores(outputs, split, (), self.task)

    def autocast(self) -> torch.autocast:
        """What the bundle was evaluated in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


class LanguageJudge(RowScorer, ABC):
    """What every language task's judge can do beside: answer texts, and give probes."""

    @abstractmethod
    def answers(self, texts: Sequence[str]) -> list[Completion]:
        """What the model makes of texts."""

    @abstractmethod
    def probes(self, split: Split, rows: Sequence[int]) -> list[Probe]:
        """The named rows with the answers that whoever serves the bundle must give."""


class DecoderJudge(LanguageJudge):
    """A causal language model. One that chats: a text is what a user says, and the answer the assistant's."""

    def __init__(
        self,
        model: PackedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        task: LanguageTask,
        end_ids: Sequence[int],
        bf16: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, task=task, bf16=bf16)
        self.chats, self.end_ids = not isinstance(task, Pretrain), list(end_ids)

    def losses(self, texts: Sequence[str]) -> list[float]:
        """Nats a token of each plain text, cut at max_length."""
        from danlu.tasks import pretrain

        return pretrain.text_losses(self, texts)

    def answers(self, texts: Sequence[str]) -> list[Completion]:
        """The most probable continuation, token by token."""
        found = []
        for text in texts:
            prompt = prompt_text(Conversation(({"role": "user", "content": text},)), self.tokenizer) if self.chats else text
            found.append(self.continued(text, self.ids(prompt), self.max_new_tokens))
        return found

    def probes(self, split: Split, rows: Sequence[int]) -> list[Probe]:
        """Each row's last turn asked for, or its text gone on with."""
        made = []
        texts = [split.texts.texts[i] for i in rows]
        losses = [None] * len(texts) if self.chats else self.losses(texts)
        for index, text, loss in zip(rows, texts, losses, strict=True):
            asked, ids = self.asked(split, index)
            if asked.messages:
                text = prompt_text(asked, self.tokenizer)
            answer = self.continued(text, ids, PROBE_TOKENS)
            made.append(
                Probe(
                    text=text,
                    loss=loss,
                    messages=[dict(message) for message in asked.messages],
                    tools=[dict(tool) for tool in asked.tools],
                    prompt_token_ids=ids,
                    completion=answer.completion,
                    completion_token_ids=list(answer.token_ids),
                    logprobs=list(answer.logprobs),
                )
            )
        return made

    def asked(self, split: Split, row: int) -> tuple[Conversation, list[int]]:
        """What a row asks for: its conversation without the last turn, or of plain text the half of it, so that there is a place to go on
        at; and the tokens that the model reads."""
        whole = split.conversations[row] if split.conversations else Conversation((), text=split.texts.texts[row])
        if whole.text is None:
            asked = Conversation(whole.messages[:-1], whole.tools)
            return asked, self.ids(prompt_text(asked, self.tokenizer))
        return Conversation((), text=whole.text), self._plain_ids(whole.text)[: self.max_length // 2]

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt; a rendered conversation has its special tokens already. Plain text is not ended."""
        if self.chats:
            return list(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        return self._plain_ids(prompt)

    def _plain_ids(self, prompt: str) -> list[int]:
        ids = list(self.tokenizer(prompt).input_ids)
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    @torch.inference_mode()
    def continued(self, text: str, ids: Sequence[int], max_new_tokens: int) -> Completion:
        """`ids` with the most probable tokens behind them, until an end or `max_new_tokens`."""
        room = int(getattr(self.pretrained.config, "max_position_embeddings", 0) or 1 << 30)
        ids = list(ids)[-(room - 1) :]
        new = min(max_new_tokens, room - len(ids))
        prompt = torch.tensor([ids], device=self.device)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=new, eos_token_id=self.end_ids or None, pad_token_id=self.tokenizer.pad_token_id or 0
        )
        with self.plain_attention(), self.autocast():
            whole = self.pretrained.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        made = whole.sequences[0, len(ids) :].tolist()
        steps = [step[0].float().log_softmax(-1) for step in whole.logits]
        chosen = tuple(float(step[token]) for step, token in zip(steps, made, strict=True))
        margins = tuple(float(first - second) for first, second in (step.topk(2).values for step in steps))
        return Completion(text, self.tokenizer.decode(made, skip_special_tokens=True), tuple(made), chosen, margins)

    @property
    def max_new_tokens(self) -> int:
        return int(getattr(self.pretrained.generation_config, "max_new_tokens", None) or NEW_TOKENS)

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """The packed attention knows no cache."""
        before = self.pretrained.config._attn_implementation
        self.pretrained.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.pretrained.set_attn_implementation(before)


class PreferenceJudge(DecoderJudge):
    """A decoder that is compared with its start model: `start` loads that one when rows come without its log probabilities."""

    start: Callable[[], RowScorer] | None = None

    def outputs(self, split: Split, *, batch_tokens: int = 2048) -> np.ndarray:
        """`row_outputs` with the start model's log probabilities."""
        if self.start is not None and split.reference is None:
            from danlu.tasks.preference import with_reference

            split = with_reference(split, partial(self.start().outputs, batch_tokens=batch_tokens))
        return super().outputs(split, batch_tokens=batch_tokens)


def end_ids(folders: Sequence[Path], tokenizer: PreTrainedTokenizerBase, more: Sequence[int] = ()) -> list[int]:
    """Tokens that end an answer: `more`, the tokenizer's, and those that the model's folders name."""
    found = list(more)
    for folder in folders:
        if (folder / "generation_config.json").exists():
            named = GenerationConfig.from_pretrained(folder).eos_token_id
            found += named if isinstance(named, list) else [] if named is None else [named]
    if tokenizer.eos_token_id is not None:
        found.append(int(tokenizer.eos_token_id))
    return list(dict.fromkeys(int(token) for token in found))


def write_generation_defaults(folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase, more_ends: Sequence[int]) -> None:
    """generation_config.json in a bundle's model folder: the base model's own settings, with every token that ends an answer."""
    settings = GenerationConfig.from_pretrained(base) if (base / "generation_config.json").exists() else GenerationConfig()
    settings.eos_token_id = end_ids([base], tokenizer, more_ends) or None
    if settings.pad_token_id is None and tokenizer.pad_token_id is not None:
        settings.pad_token_id = int(tokenizer.pad_token_id)
    settings.save_pretrained(folder)
