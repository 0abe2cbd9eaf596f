"""From a Generation to a Sequence: prompts become tokens, and what can never be answered is refused."""

from __future__ import annotations

from collections.abc import Sequence as Several

from transformers import PreTrainedTokenizerBase

from danlu.errors import RequestError
from danlu.serve.engines.torch.guide import Guides
from danlu.serve.engines.torch.sampler import Chooser
from danlu.serve.engines.torch.sequence import Key, Sequence
from danlu.serve.engines.torch.text import TextMaker
from danlu.serve.generation import Chat, Generation, Prompt, Sampling
from danlu.tasks.vocabulary import FIX


class Reader:
    """Reads requests for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_model_len: int, end_ids: list[int]) -> None:
        self.tokenizer, self.vocab_size, self.max_model_len, self.end_ids = tokenizer, vocab_size, max_model_len, end_ids
        self.texts: dict[int, str] = {}
        self.anchor = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        self.anchor_text = self._decoded(self.anchor)
        self._guides: Guides | None = None

    @property
    def guides(self) -> Guides:
        """Made when the first guide comes: it takes about a second."""
        if self._guides is None:
            self._guides = Guides(self.tokenizer, self.vocab_size, self.end_ids)
        return self._guides

    def sequence(self, generation: Generation, key: Key) -> Sequence:
        """The request, checked and ready to be queued; RequestError says what cannot be done and what can."""
        sampling = generation.sampling
        tokens = self.tokenize(generation.prompt)
        if not tokens:
            raise RequestError("the prompt has no tokens", param="prompt", fix="at least one token")
        room = self.max_model_len - len(tokens)
        if room < (1 if sampling.max_tokens is None else sampling.max_tokens):
            asked = f" and max_tokens={sampling.max_tokens}" if sampling.max_tokens and room >= 1 else ""
            raise RequestError(
                f"a prompt of {len(tokens)} tokens{asked} is more than the {self.max_model_len} tokens of the model's context",
                param="max_tokens" if asked else "prompt",
                fix=f"max_tokens of {room} at most" if asked else f"a prompt of {self.max_model_len - 1} tokens at most",
            )
        _check(sampling, self.vocab_size)
        if generation.guide is not None and sampling.min_tokens:
            raise RequestError("min_tokens with a guide: a complete answer cannot be made longer", param="min_tokens", fix="leave it out")
        matcher = None if generation.guide is None else self.guides.compile(generation.guide)
        sequence = Sequence(generation, tokens, room if sampling.max_tokens is None else sampling.max_tokens, key)
        sequence.chooser = Chooser(sampling, tokens, self.end_ids, matcher)
        sequence.text = TextMaker(self.tokenizer, tokens, sampling.stop)
        return sequence

    def tokenize(self, prompt: Prompt) -> list[int]:
        """See TextEngine.tokenize."""
        match prompt:
            case str():
                ids = list(self.tokenizer(prompt)["input_ids"])
            case Chat():
                ids = self._rendered(prompt)
            case _:
                ids = list(prompt)
        self._check_ids(ids, "messages" if isinstance(prompt, Chat) else "prompt")
        return ids

    def detokenize(self, token_ids: Several[int]) -> str:
        """See TextEngine.detokenize."""
        self._check_ids(token_ids, "tokens")
        return self._decoded(list(token_ids))

    def token_text(self, token_id: int) -> str:
        """A token as it stands within a text: with its leading space, where it has one."""
        if token_id not in self.texts:
            text = self._decoded([*self.anchor, token_id])
            self.texts[token_id] = text[len(self.anchor_text) :] if text.startswith(self.anchor_text) else self._decoded([token_id])
        return self.texts[token_id]

    def _decoded(self, ids: list[int]) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _rendered(self, chat: Chat) -> list[int]:
        if not self.tokenizer.chat_template:
            raise RequestError("the model's tokenizer has no chat template", param="messages", fix="a prompt as a text")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in chat.messages],
                tools=[dict(tool) for tool in chat.tools] or None,
                tokenize=False,
                add_generation_prompt=True,
                **chat.template_arguments,
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise RequestError(f"the model's chat template refuses the messages: {error}", param="messages") from error
        # The template writes the special tokens itself.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_ids(self, ids: Several[int], param: str) -> None:
        wrong = next((one for one in ids if not 0 <= one < self.vocab_size), None)
        if wrong is None:
            return
        if 0 <= wrong < len(self.tokenizer):  # the tokenizer was given tokens that the model was not
            raise RequestError(
                f"the prompt has {self._decoded([wrong])!r}, the tokenizer's token {wrong}, and the model has {self.vocab_size}",
                param=param,
                fix=f"leave it out, or serve {FIX}",
            )
        raise RequestError(f"there is no token {wrong}", param=param, fix=f"ids from 0 to {self.vocab_size - 1}")


def _check(sampling: Sampling, vocab_size: int) -> None:
    """The ranges are vLLM's."""
    s = sampling
    longest = s.min_tokens if s.max_tokens is None else s.max_tokens
    rules: list[tuple[str, object, bool, str]] = [
        ("max_tokens", s.max_tokens, s.max_tokens is None or s.max_tokens >= 0, "0 (only read) or more"),
        (
            "min_tokens",
            s.min_tokens,
            0 <= s.min_tokens <= longest,
            "between 0 and max_tokens",
        ),
        ("temperature", s.temperature, 0 <= s.temperature <= 100, "between 0 and 2, as a rule"),
        ("top_p", s.top_p, 0 < s.top_p <= 1, "above 0, at most 1"),
        ("top_k", s.top_k, s.top_k >= 0, "0 (all) or more"),
        ("min_p", s.min_p, 0 <= s.min_p <= 1, "between 0 and 1"),
        ("seed", s.seed, s.seed is None or 0 <= s.seed < 2**64, "between 0 and 2^64 - 1"),
        ("presence_penalty", s.presence_penalty, -2 <= s.presence_penalty <= 2, "between -2 and 2"),
        ("frequency_penalty", s.frequency_penalty, -2 <= s.frequency_penalty <= 2, "between -2 and 2"),
        ("repetition_penalty", s.repetition_penalty, 0.01 <= s.repetition_penalty <= 100, "between 0.01 and 100; 1 is none"),
        ("stop", s.stop, all(s.stop), "texts that are not empty"),
        ("logprobs", s.logprobs, s.logprobs is None or 0 <= s.logprobs <= vocab_size, f"between 0 and {vocab_size}"),
    ]
    for ids, name in ((s.stop_token_ids, "stop_token_ids"), (tuple(s.logit_bias), "logit_bias")):
        wrong = [one for one in ids if not 0 <= one < vocab_size]
        rules.append((name, wrong[:1], not wrong, f"ids from 0 to {vocab_size - 1}"))
    for name, value, holds, fix in rules:
        if not holds:
            raise RequestError(f"{name}={value!r} is out of its range", param=name, fix=fix)
