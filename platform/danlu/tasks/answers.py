"""Judges of the models that are no decoders: one fills in masks, one writes a text for a text. They are scored as language models are, and
answer as an encoder's predictor does, so that an engine may batch what they are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from danlu.artifact.bundle import Probe
from danlu.data.encode import NO_TARGET, Encoded, encode
from danlu.data.pack import by_length, pack
from danlu.errors import DataError
from danlu.spec.task import Seq2Seq
from danlu.tasks.agreement import Tolerance
from danlu.tasks.exchange import MAX_TOP_K, BadExample, Example, Filled, Guess, MaskedText, Prediction, SourceText, Written
from danlu.tasks.judge import PROBE_TOKENS, Completion, LanguageJudge
from danlu.tasks.masked import with_a_mask
from danlu.tasks.packed import PackedModel
from danlu.tasks.packed_masked import PackedMaskedLM
from danlu.tasks.rows import Scored, Split
from danlu.tasks.seq2seq import Seq2SeqScores, with_generated

MAX_MASKS = 32
"""Of one text: a body of nothing but masks would be answered with hundreds of megabytes."""


class Answerer(Protocol):
    """A predictor, or one of the judges here: what an engine needs to answer requests a batch at a time."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def model(self) -> PackedModel: ...

    def encode(self, inputs: Sequence[Any]) -> Encoded:
        """Token ids of what is asked, a row each; BadExample for what this model cannot answer."""
        ...

    def each(self, sequences: Encoded) -> Sequence[Any]:
        """What one pass of the model gives for each of some sequences; the others change nothing in it but its rounding."""
        ...

    def made_of(self, outputs: Sequence[Any], encoded: Encoded, examples: Sequence[Any]) -> Sequence[Prediction]:
        """The answers in what `each` gave for the examples' sequences."""
        ...

    def predict(self, inputs: Sequence[Any]) -> Sequence[Prediction]:
        """All of that, without an engine."""
        ...

    def examples(self, split: Split, rows: Sequence[int]) -> Sequence[Example]:
        """What may be asked for some of a split's texts."""
        ...


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

    def filled(self, text: str, ids: Sequence[int]) -> Completion:
        """The most probable token at each mask of a row."""
        logprobs, tokens = self._at_masks([np.asarray(ids)]).max(-1)
        return Completion(text, self.tokenizer.decode(tokens), tuple(tokens.tolist()), tuple(logprobs.tolist()))

    def probe_logprobs(self, probe: Probe) -> list[float]:
        """Log probabilities of a probe's tokens, at its masks."""
        found = self._at_masks([np.asarray(probe.prompt_token_ids)])
        return found.gather(-1, torch.tensor(probe.completion_token_ids, device=found.device)[:, None])[:, 0].tolist()

    def encode(self, inputs: Sequence[MaskedText]) -> Encoded:
        """Token ids of texts, each cut to max_length; BadExample where a mask is missing, or cut off."""
        mask = str(self.tokenizer.mask_token)
        encoded = encode([one.text for one in inputs], None, self.tokenizer, max_length=self.max_length, cache_dir=None)
        for i, one in enumerate(inputs):
            asked, where = one.text.count(mask), f"input[{i}]"
            if not asked:
                raise BadExample(f"`{where}` has no {mask}", where, f"put {mask} where a word is to be filled in")
            if asked > MAX_MASKS:
                raise BadExample(f"`{where}` has {asked} masks; the limit is {MAX_MASKS}", where, "several texts")
            if int((encoded.row(i) == self.tokenizer.mask_token_id).sum()) < asked:
                told = f"`{where}` has a {mask} behind its first {self.max_length} tokens, which are all that is read"
                raise BadExample(told, where, "a shorter text")
        return encoded

    def each(self, sequences: Encoded) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The highest probabilities at each mask of each row, and their tokens, both [masks, MAX_TOP_K] on the CPU."""
        rows = [sequences.row(i) for i in range(len(sequences))]
        found = self._at_masks(rows).exp()
        best = found.topk(min(MAX_TOP_K, found.shape[-1]))
        numbers = [int((row == self.tokenizer.mask_token_id).sum()) for row in rows]
        return list(zip(torch.split(best.values.cpu(), numbers), torch.split(best.indices.cpu(), numbers), strict=True))

    def made_of(
        self, outputs: Sequence[tuple[torch.Tensor, torch.Tensor]], encoded: Encoded, examples: Sequence[MaskedText]
    ) -> list[Filled]:
        """Each example's likeliest tokens at each of its masks."""
        return [self._filled(one, encoded.row(i), *found) for i, (one, found) in enumerate(zip(examples, outputs, strict=True))]

    def predict(self, inputs: Sequence[MaskedText]) -> list[Filled]:
        """Answers to texts with masks."""
        encoded = self.encode(inputs)
        return self.made_of(_all(self, encoded), encoded, inputs)

    def examples(self, split: Split, rows: Sequence[int]) -> list[MaskedText]:
        """Some rows' texts, a token in the middle of each masked."""
        return [MaskedText(with_a_mask(split.texts.texts[row], self.tokenizer, self.max_length)[0]) for row in rows]

    def _filled(self, example: MaskedText, ids: np.ndarray, values: torch.Tensor, tokens: torch.Tensor) -> Filled:
        places = np.flatnonzero(ids == self.tokenizer.mask_token_id)
        masks = tuple(
            tuple(
                Guess(token, str(self.tokenizer.decode([token])), score, self._whole(ids, place, token) if len(places) == 1 else None)
                for score, token in zip(scores[: example.top_k], several[: example.top_k], strict=True)
            )
            for place, scores, several in zip(places.tolist(), values.tolist(), tokens.tolist(), strict=True)
        )
        best = [guesses[0] for guesses in masks]
        margin = min(float(one[0] - one[1]) for one in values) if values.shape[1] > 1 else 1.0
        return Filled(" ".join(one.token_str.strip() for one in best), [one.score for one in best], masks, margin)

    def _whole(self, ids: np.ndarray, place: int, token: int) -> str:
        whole = ids.copy()
        whole[place] = token
        return str(self.tokenizer.decode(whole, skip_special_tokens=True))

    @torch.inference_mode()
    def _at_masks(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """Log probabilities of all tokens at the masks of rows, float32 [masks, vocabulary]."""
        assert isinstance(self.model, PackedMaskedLM)
        batch = pack(list(rows)).to(self.device)
        chosen = batch.input_ids == self.tokenizer.mask_token_id
        with self.autocast():
            logits = self.model.logits(batch.input_ids, batch.position_ids, batch.cu_seqlens, chosen)
        return logits.float().log_softmax(-1)


class Seq2SeqJudge(LanguageJudge):
    """An encoder-decoder. Its scores are also of what it writes by itself, with the task's number of beams."""

    task: Seq2Seq
    on_token: Callable[[], None] | None = None
    """Called before each token that is written."""

    def scores(self, outputs: np.ndarray, split: Split) -> Scored:
        """The task's scores with those of the written texts."""
        found = super().scores(outputs, split)
        assert isinstance(found, Seq2SeqScores)
        assert split.texts.pairs is not None
        written = [answer.completion for answer in self.answers(split.texts.texts)]
        return with_generated(found, written, split.texts.pairs)

    def answers(self, texts: Sequence[str]) -> list[Completion]:
        """What the model writes for each text."""
        encoded = self.encode([SourceText(text) for text in texts])
        found: dict[int, Completion] = {}
        for group in by_length(encoded.lengths, 2048):
            rows = [encoded.row(int(i)) for i in group]
            for index, answer in zip(group, self.written(rows, self.task.max_target_length), strict=True):
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

    def probe_logprobs(self, probe: Probe) -> list[float]:
        """Log probabilities of a probe's tokens, each given its prompt and those before it."""
        return self.likelihood(probe.prompt_token_ids, probe.completion_token_ids).tolist()

    def likelihood(self, source: Sequence[int], target: Sequence[int]) -> torch.Tensor:
        """Log probability of each token of a target, given a source and the tokens before it: float32 [target]."""
        ids, mask = self._padded([np.asarray(source)])
        start = self.pretrained.config.decoder_start_token_id
        return self._logprobs(ids, mask, torch.tensor([[start, *target]], device=self.device))[0]

    def other_than(self, expected: str, found: str, text: str, within: Tolerance) -> str | None:
        """What is wrong where `found` was written for a text instead of what was expected; None if rounding may have chosen between them:
        where the two first differ, or between beams."""
        one, other = (list(self.tokenizer(text_target=written).input_ids) for written in (expected, found))
        at = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if expected == found or at is None:
            return None
        source = self.encode([SourceText(text)]).row(0).tolist()
        likely, other_likely = self.likelihood(source, one), self.likelihood(source, other)
        true, had = (likely.mean(), other_likely.mean()) if self.task.num_beams > 1 else (likely[at], other_likely[at])
        if abs(float(true - had)) <= 2 * within.logprob * max(1.0, abs(float(true))):
            return None
        return f"the endpoint writes {found!r} where the evaluation writes {expected!r}"

    def encode(self, inputs: Sequence[SourceText]) -> Encoded:
        """Token ids of texts behind the task's prefix, each cut to max_length; BadExample where more is to be written than was learned."""
        limit = self.task.max_target_length
        for one in inputs:
            if one.max_tokens is not None and one.max_tokens > limit:
                told = f"`max_tokens` is {one.max_tokens}; this model has learned to write {limit} at most"
                raise BadExample(told, "max_tokens", f"{limit} or fewer, or leave it out")
        texts = [self.task.source_prefix + one.text for one in inputs]
        return encode(texts, None, self.tokenizer, max_length=self.max_length, cache_dir=None)

    def each(self, sequences: Encoded) -> list[list[int]]:
        """The tokens that are written for each row."""
        ids, mask = self._padded([sequences.row(i) for i in range(len(sequences))])
        whole = self._generated(ids, mask, self.task.max_target_length, self.task.num_beams)
        return [self._ended(tokens) for tokens in whole[:, 1:].tolist()]

    def made_of(self, outputs: Sequence[list[int]], encoded: Encoded, examples: Sequence[SourceText]) -> list[Written]:
        """Each example's text, as long as it may be."""
        found = []
        for tokens, example in zip(outputs, examples, strict=True):
            some = tokens[: example.max_tokens]
            ended = len(some) == len(tokens) and bool(tokens) and tokens[-1] in self._ends
            text = str(self.tokenizer.decode(some, skip_special_tokens=True))
            found.append(Written(text, [], len(some), "stop" if ended else "length"))
        return found

    def predict(self, inputs: Sequence[SourceText]) -> list[Written]:
        """What is written for texts."""
        encoded = self.encode(inputs)
        return self.made_of(_all(self, encoded), encoded, inputs)

    def examples(self, split: Split, rows: Sequence[int]) -> list[SourceText]:
        """Some rows' sources."""
        return [SourceText(split.texts.texts[row]) for row in rows]

    def written(self, rows: Sequence[np.ndarray], max_new_tokens: int, num_beams: int | None = None) -> list[Completion]:
        """What the model writes for rows of token ids; log probabilities are of a forward over what was written."""
        ids, mask = self._padded(rows)
        whole = self._generated(ids, mask, max_new_tokens, num_beams or self.task.num_beams)
        found = []
        for tokens, probable in zip(whole[:, 1:].tolist(), self._logprobs(ids, mask, whole).tolist(), strict=True):
            made = self._ended(tokens)
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            found.append(Completion("", text, tuple(made), tuple(probable[: len(made)])))
        return found

    @torch.inference_mode()
    def _generated(self, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, num_beams: int) -> torch.Tensor:
        """transformers' own search, from the start token on; what is not said here the model's generation_config.json says."""
        config = self.pretrained.config
        settings = GenerationConfig(
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            decoder_start_token_id=config.decoder_start_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=int(self.tokenizer.pad_token_id or 0),
        )
        look = LogitsProcessorList([Looked(self.on_token)])
        with self.autocast():
            whole: torch.Tensor = self.pretrained.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=look
            )
        return whole

    @torch.inference_mode()
    def _logprobs(self, ids: torch.Tensor, mask: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Of each token of `whole` behind the start token, float32 [rows, tokens - 1]."""
        with self.autocast():
            logits = self.pretrained(input_ids=ids, attention_mask=mask, decoder_input_ids=whole[:, :-1], use_cache=False).logits
        found: torch.Tensor = logits.float().log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
        return found

    def _padded(self, rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as the encoder takes them, int64 [rows, longest], and which of it is theirs."""
        ids = torch.full((len(rows), max(len(row) for row in rows)), int(self.tokenizer.pad_token_id or 0), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row.astype(np.int64)), 1
        return ids.to(self.device), mask.to(self.device)

    def _ended(self, tokens: list[int]) -> list[int]:
        """Tokens up to the first that ends a text."""
        return tokens[: next((at + 1 for at, token in enumerate(tokens) if token in self._ends), len(tokens))]

    @property
    def _ends(self) -> list[int]:
        ends = self.pretrained.config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _all(judge: MaskedJudge | Seq2SeqJudge, encoded: Encoded) -> list[Any]:
    """What the model gives for every row, each in a pass of its own: none is padded to another's length."""
    return [judge.each(encoded.take([row]))[0] for row in range(len(encoded))]


class Looked(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing: FloatingPointError for scores that are no numbers, of which the search would make tokens all the same."""

    def __init__(self, on_token: Callable[[], None] | None) -> None:
        self.on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.on_token is not None:
            self.on_token()
        if not bool((scores.amax(-1) < torch.inf).all()):
            raise FloatingPointError("the model's logits are no numbers: NaN or infinity")
        return scores
