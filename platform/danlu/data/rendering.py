"""Conversations as the tokenizer's own chat template renders them, and which of the tokens the assistant says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from danlu.data.conversations import BadRow, Conversation
from danlu.data.encode import NO_TARGET, Encoded, cached, encoded_rows
from danlu.errors import DataError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHUNK = 1024


@dataclass(frozen=True)
class Rendered:
    """A text as the model reads it; `spans`: (start, stop) characters of what the assistant says."""

    text: str
    spans: tuple[tuple[int, int], ...]


def need_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """DataError if the tokenizer has none."""
    if not tokenizer.chat_template:
        raise DataError(
            "the model's tokenizer has no chat template, and nothing else says how its conversations are written",
            where="model.model_name_or_path",
            fix="a model that was tuned on conversations; or put its chat_template.jinja into the model's folder",
        )


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, turns: str) -> list[Rendered]:
    """The conversation with its learned turns: `all` or the `last` one, or one text for `each`. BadRow if that cannot be told exactly.

    Where a turn begins and ends is what the template marks with {% generation %}; else a turn is what the text grows by between asking
    for it (the generation prompt) and having it. Both ends have to be beginnings of the whole text, or the masks would be guesses.
    """
    if conversation.text is not None:
        return [Rendered(conversation.text, ())]
    learned = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant" and i >= conversation.learned_from]
    match turns:
        case "all":
            return [_rendered(conversation, tokenizer, learned)]
        case "last":
            return [_rendered(conversation, tokenizer, learned[-1:])]
        case _:
            parts = [Conversation(conversation.messages[: i + 1], conversation.tools) for i in learned]
            return [_rendered(part, tokenizer, [len(part.messages) - 1]) for part in parts]


def prompt_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation with the assistant asked to go on: what a server renders. BadRow if the template refuses it."""
    return _apply(tokenizer, conversation.messages, conversation.tools, add_generation_prompt=True)


def _rendered(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, learned: Sequence[int]) -> Rendered:
    messages, tools = conversation.messages, conversation.tools
    whole = _apply(tokenizer, messages, tools)
    template = tokenizer.get_chat_template(tools=list(tools) or None)
    if GENERATION.search(template):
        spans = _marked(tokenizer, template, conversation)
        number = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != number:
            raise BadRow("the template marks another number of assistant turns than the conversation has")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return Rendered(whole, tuple(spans[turns.index(i)] for i in learned))
    found = []
    for i in learned:
        start, stop = _apply(tokenizer, messages[:i], tools, add_generation_prompt=True), whole
        if i + 1 < len(messages):
            stop = _apply(tokenizer, messages[: i + 1], tools)
        if not (whole.startswith(start) and whole.startswith(stop) and len(start) < len(stop)):
            raise BadRow(
                "the template renders a turn otherwise when more of the conversation follows, so it cannot be told which tokens are the "
                "assistant's; task.assistant_turns=each trains every turn as it stands when it is said"
            )
        found.append((len(start), len(stop)))
    return Rendered(whole, tuple(found))


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], tools: Sequence[Any], *, add_generation_prompt: bool = False
) -> str:
    if not messages:
        raise BadRow("the conversation begins with an assistant turn, which answers nothing")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is a program that came with the model: it may raise anything
        raise BadRow(f"the chat template refuses it: {error}") from error
    return str(text)


def _marked(tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation) -> list[tuple[int, int]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        conversations=[[dict(message) for message in conversation.messages]],
        tools=[dict(tool) for tool in conversation.tools] or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [(int(start), int(stop)) for start, stop in spans[0]]


def tokenise(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, *, max_length: int, cache_dir: str | Path | None) -> Encoded:
    """Token ids, each row cut at its end to `max_length`, and at every position the next token if the assistant says it.

    A row whose targets could not be told, because what a server would read as the prompt makes other tokens than the beginning of the
    row does, has no target at all; nor has one whose assistant speaks behind the cut.
    """
    return cached(
        lambda: _tokenise(rendered, tokenizer, max_length),
        ([one.text for one in rendered], [repr(one.spans) for one in rendered]),
        tokenizer,
        settings=f"rendered {max_length} {sorted(special_ids(tokenizer))}",
        cache_dir=cache_dir,
    )


def _tokenise(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    special = special_ids(tokenizer)
    for start in range(0, len(rendered), CHUNK):
        some = rendered[start : start + CHUNK]
        texts = [one.text for one in some]
        # Every place where the assistant begins, tokenised as the prompt that it is when the model is asked.
        prompts = [one.text[:begin] for one in some for begin, _ in one.spans]
        ids, offsets = _ids(tokenizer, texts)
        prompt_ids = iter(_ids(tokenizer, prompts)[0] if prompts else [])
        for i, one in enumerate(some):
            spans = [(next(prompt_ids), stop) for _, stop in one.spans]
            row = np.asarray(ids[i], dtype=np.int32)
            rows.append(row)
            targets.append(_targets(row, offsets[i], spans, special))
    cut = [len(row) > max_length for row in rows]
    for index in (i for i in range(len(rows)) if cut[i]):
        rows[index], targets[index] = rows[index][:max_length], targets[index][:max_length].copy()
        targets[index][-1] = NO_TARGET
    return encoded_rows(rows, cut, token_labels=targets)


def tokenise_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Encoded:
    """Plain texts with the tokenizer's special tokens and an end; every token but the first is learned."""
    rows = []
    end = tokenizer.eos_token_id
    for encoding in tokenizer(list(texts)).encodings or ():
        ids = np.asarray(encoding.ids, dtype=np.int32)
        rows.append(ids if end is None or (len(ids) and ids[-1] == end) else np.append(ids, np.int32(end)))
    cut = [len(row) > max_length for row in rows]
    rows = [row[:max_length] for row in rows]
    return encoded_rows(rows, cut, token_labels=[next_tokens(row) for row in rows])


def next_tokens(row: np.ndarray) -> np.ndarray:
    """At each position the token after it."""
    return np.append(row[1:], NO_TARGET).astype(np.int32)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that stand for no text: ends, roles, padding."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def show(encoded: Encoded, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row as the model reads it, what it learns between ⟦ and ⟧."""
    ids, targets = encoded.row(index).tolist(), encoded.row_labels(index)
    # Position i learns token i + 1.
    learned = np.concatenate([[False], targets[:-1] != NO_TARGET])
    edges = [0, *(np.flatnonzero(np.diff(learned.astype(np.int8))) + 1).tolist(), len(ids)]
    parts = []
    for start, stop in pairwise(edges):
        text = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(f"⟦{text}⟧" if learned[start] else text)
    return "".join(parts)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    # The template has written the special tokens already.
    encodings = tokenizer(list(texts), add_special_tokens=False).encodings or ()
    return [one.ids for one in encodings], [one.offsets for one in encodings]


def _targets(row: np.ndarray, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[list[int], int]], special: set[int]) -> np.ndarray:
    targets = np.full(len(row), NO_TARGET, dtype=np.int32)
    starts = np.asarray([start for start, _ in offsets], dtype=np.int64)
    for prompt, stop_at in spans:
        first = len(prompt)
        if row[:first].tolist() != prompt:
            return np.full(len(row), NO_TARGET, dtype=np.int32)
        stop = max(first, int(np.searchsorted(starts, stop_at)))
        # Behind the token that ends the turn nothing is generated any more.
        ends = [i for i in range(first, stop) if int(row[i]) in special]
        stop = ends[-1] + 1 if ends else stop
        first = max(first, 1)
        targets[first - 1 : stop - 1] = row[first:stop]
    return targets
