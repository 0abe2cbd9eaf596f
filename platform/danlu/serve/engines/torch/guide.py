"""Output that must match: a JSON Schema, a regular expression, choices or valid calls, as a mask over the vocabulary (llguidance)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from danlu.errors import RequestError
from danlu.serve.generation import Guide
from danlu.serve.openai.tools import CLOSE, OPEN, PYTHON_TAG
from danlu.serve.tool_grammar import JSON, Markers, answer_grammar, tool_grammar


class Guides:
    """Compiles guides for one tokenizer. `vocab_size` is the model's, which may be more than the tokenizer's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: list[int]) -> None:
        self.plain = tokenizer
        self.tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=end_ids)

    def compile(self, guide: Guide) -> Matcher:
        """A matcher at its beginning; RequestError says why a guide does not compile."""
        try:
            grammar = self.lark(guide) if guide.kind == "tool_calls" else _grammar(guide)
        except (ValueError, TypeError) as error:
            raise _refusal(guide, str(error)) from error
        matcher = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refusal(guide, _told(matcher.get_error()))
        return Matcher(matcher, self.tokenizer.vocab_size, guide)

    def lark(self, guide: Guide) -> str:
        """The grammar of calls, with this vocabulary's tokens; RequestError names the tool whose schema cannot be followed."""
        asked = json.loads(guide.pattern)
        for i, schema in enumerate(asked["tools"].values()):
            if problem := self._problem(schema):
                param = f"tools[{i}].function.parameters"
                raise RequestError(f"`{param}` cannot be followed: {problem}", param=param, fix="a simpler schema, or strict: false")
        if asked["answer"] is not None and (problem := self._problem(asked["answer"])):
            raise _refusal(Guide("json_schema", param=asked["answer_param"]), problem)
        if asked["answer"] is not None and self.markers.hide_tags:
            if not asked["strict"]:
                return answer_grammar(asked["answer"])
            told = f"this model's tokenizer hides {OPEN}, so that a call and a document of JSON cannot be told apart"
            raise RequestError(told, param=guide.param, fix="strict tools or a response_format, not both")
        return tool_grammar(asked["tools"], asked["answer"], self.markers)

    def _problem(self, schema: Mapping[str, Any]) -> str:
        """Why no grammar can be made of a schema; empty if one can."""
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, JSON)
        return _told(llguidance.LLMatcher.validate_grammar(grammar, self.tokenizer))

    @cached_property
    def markers(self) -> Markers:
        """The added tokens that a grammar of texts leaves out, and that are to be seen in a text."""
        seen = {i: token.content for i, token in self.plain.added_tokens_decoder.items() if self.tokenizer.is_special_token(i)}
        hidden = {i for i, token in self.plain.added_tokens_decoder.items() if token.special}

        def of(marker: str) -> frozenset[int]:
            return frozenset(i for i, text in seen.items() if text == marker)

        before = of(PYTHON_TAG) | (of(OPEN) & hidden)
        others = frozenset(i for i, text in seen.items() if OPEN not in text and text not in (CLOSE, PYTHON_TAG))
        hides = bool((of(OPEN) | of(CLOSE)) & hidden)
        return Markers(of(OPEN) - hidden, of(CLOSE) - hidden, before, of(CLOSE) & hidden, others - hidden, hides)


class Matcher:
    """How far one sequence has come in its guide."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, guide: Guide) -> None:
        self.matcher, self.guide = matcher, guide
        self.bits = np.zeros((1, (vocab_size + 31) // 32), dtype=np.int32)

    def mask(self, logits: torch.Tensor) -> None:
        """Take what may not follow out of logits [vocabulary], in place."""
        llguidance.numpy.fill_next_token_bitmask(self.matcher, self.bits)
        if self.matcher.is_error():
            return  # `add` says so
        allowed = torch.from_numpy(np.unpackbits(self.bits.view(np.uint8), bitorder="little")[: len(logits)]).bool()
        logits[: len(allowed)].masked_fill_(~allowed.to(logits.device), -torch.inf)
        logits[len(allowed) :] = -torch.inf

    def add(self, token_id: int) -> None:
        """A token that was chosen. RequestError if the guide goes no further: some compile, and are then too much for the parser."""
        if not self.matcher.consume_token(token_id):
            told = self.matcher.get_error() or f"it refuses token {token_id}, which its mask had allowed"
            raise _refusal(self.guide, _told(told))

    @property
    def is_complete(self) -> bool:
        """Whether nothing more may follow."""
        return bool(self.matcher.is_stopped())


def _grammar(guide: Guide) -> str:
    match guide.kind:
        case "json_schema":
            return str(llguidance.LLMatcher.grammar_from_json_schema(guide.pattern, JSON))
        case "json_object":
            return str(llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}', JSON))
        case "regex":
            return str(llguidance.LLMatcher.grammar_from_regex(guide.pattern))
        case "choice":
            choices = json.loads(guide.pattern)
            if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
                raise ValueError("a JSON list of texts is needed, none of them empty")
            quoted = " | ".join(json.dumps(one, ensure_ascii=False) for one in choices)
            return str(llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {quoted}"))  # a rule has 2,000 alternatives at most
    raise AssertionError(f"{guide.kind} needs the vocabulary")


PLAINLY = {
    "NoExtensionBias": "there is no text that matches",
    "coerce_one_of": "more than one alternative of a oneOf may hold, which cannot be kept out; anyOf allows it",
}
"""What llguidance says to those who build with it -> to those who ask."""


def _told(error: str) -> str:
    """Its first line, and the one of a regular expression's that says why; empty if there is no error."""
    first = "".join(error.splitlines()[:1])
    plain = next((plain for word, plain in PLAINLY.items() if word in first), first)
    return " ".join([plain, *(line.removeprefix("error: ") for line in error.splitlines()[1:] if line.startswith("error: "))])


def _refusal(guide: Guide, why: str) -> RequestError:
    return RequestError(f"the {guide.kind} cannot be followed: {why}", param=guide.param, fix="a simpler one, or another kind")
