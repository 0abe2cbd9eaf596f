"""Judges of the models that are no decoders: one fills in masks, one writes a text for a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig

from danlu.artifact.bundle import Probe
from danlu.data.encode import NO_TARGET
from danlu.data.pack import by_length, pack
from danlu.errors import DataError
from danlu.spec.task import Seq2Seq
from danlu.tasks.judge import PROBE_TOKENS, Completion, LanguageJudge
from danlu.tasks.packed_masked import PackedMaskedLM
from danlu.tasks.rows import Scored, Split
from danlu.tasks.seq2seq import Seq2SeqScores, with_generated


class MaskedJudge(LanguageJudge):
    """A masked language model; a text says with the mask token what is to be filled in."""

    def answers(self, texts: Sequence[str]) -> list[Completion]:
        """The most probable token at each mask of each text."""
        mask = str(self.tokenizer.mask_token)
        for number, text in enumerate(texts, start=1):
            if mask not in text:
                raise DataError(f"text {number} has no {mask}", where="texts", fix=f"put {mask} where a word is to be filled in")
        rows = [self.tokenizer(text, truncation=True, max_length=self.max_length).input_ids for text in texts]
        return [self.filled(text, ids) for text, ids in zip(texts, rows, strict=True)]

    def probes(self, split: Split, rows: Sequence[int]) -> list[Probe]:
        """The first masked piece of each of some rows."""
        made = []
        for index in rows:
            ids = split.encoded.row(index).copy()
            targets = split.encoded.row_labels(index)
            # One mask each, so that there is one answer, and nothing but the mask is drawn.
            ids[targets != NO_TARGET] = targets[targets != NO_TARGET]
            ids[np.flatnonzero(targets != NO_TARGET)[:1]] = self.tokenizer.mask_token_id
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            found = self.filled(text, ids.tolist())
            made.append(
                Probe(
                    text=text,
                    prompt_token_ids=ids.tolist(),
                    completion=found.completion,
                    completion_token_ids=list(found.token_ids),
                    logprobs=list(found.logprobs),
                )
            )
        return made

    @torch.inference_mode()
    def filled(self, text: str, ids: Sequence[int]) -> Completion:
        """The most probable token at each mask of a row."""
        assert isinstance(self.model, PackedMaskedLM)
        batch = pack([np.asarray(ids)]).to(self.device)
        chosen = batch.input_ids == self.tokenizer.mask_token_id
        with self.autocast():
            logits = self.model.logits(batch.input_ids, batch.position_ids, batch.cu_seqlens, chosen)
        logprobs, tokens = logits.float().log_softmax(-1).max(-1)
        return Completion(text, self.tokenizer.decode(tokens), tuple(tokens.tolist()), tuple(logprobs.tolist()))


class Seq2SeqJudge(LanguageJudge):
    """An encoder-decoder. Its scores are also of what it writes by itself, with the task's number of beams."""

    task: Seq2Seq

    def scores(self, outputs: np.ndarray, split: Split) -> Scored:
        """The task's scores with those of the written texts."""
        found = super().scores(outputs, split)
        assert isinstance(found, Seq2SeqScores)
        assert split.texts.pairs is not None
        written = [answer.completion for answer in self.answers(split.texts.texts)]
        return with_generated(found, written, split.texts.pairs)

    def answers(self, texts: Sequence[str]) -> list[Completion]:
        """What the model writes for each text."""
        prefixed = [self.task.source_prefix + text for text in texts]
        rows = [np.asarray(ids) for ids in self.tokenizer(prefixed, truncation=True, max_length=self.max_length).input_ids]
        found: dict[int, Completion] = {}
        for group in by_length([len(row) for row in rows], 2048):
            for index, answer in zip(group, self.written([rows[int(i)] for i in group], self.task.max_target_length), strict=True):
                found[int(index)] = Completion(texts[int(index)], answer.completion, answer.token_ids, answer.logprobs)
        return [found[i] for i in range(len(texts))]

    def probes(self, split: Split, rows: Sequence[int]) -> list[Probe]:
        """The beginning of what the model writes for some rows, each asked for alone."""
        made = []
        for index in rows:
            text = self.task.source_prefix + split.texts.texts[index]
            ids = self.tokenizer(text, truncation=True, max_length=self.max_length).input_ids
            found = self.written([np.asarray(ids)], PROBE_TOKENS, num_beams=1)[0]
            made.append(
                Probe(
                    text=text,
                    prompt_token_ids=list(ids),
                    completion=found.completion,
                    completion_token_ids=list(found.token_ids),
                    logprobs=list(found.logprobs),
                )
            )
        return made

    @torch.inference_mode()
    def written(self, rows: Sequence[np.ndarray], max_new_tokens: int, num_beams: int | None = None) -> list[Completion]:
        """What the model writes for rows of token ids; log probabilities are of a forward over what was written."""
        model, pad = self.pretrained, int(self.tokenizer.pad_token_id or 0)
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row.astype(np.int64)), 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        settings = GenerationConfig(
            do_sample=False,
            num_beams=num_beams or self.task.num_beams,
            max_new_tokens=max_new_tokens,
            decoder_start_token_id=model.config.decoder_start_token_id,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=pad,
        )
        with self.autocast():
            whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=whole[:, :-1], use_cache=False).logits
        logprobs = logits.float().log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
        found = []
        for tokens, probable in zip(whole[:, 1:].tolist(), logprobs.tolist(), strict=True):
            stop = tokens.index(model.config.eos_token_id) + 1 if model.config.eos_token_id in tokens else len(tokens)
            text = self.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
            found.append(Completion("", text, tuple(tokens[:stop]), tuple(probable[:stop])))
        return found
