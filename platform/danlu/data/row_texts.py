"""What a row says, for reports on files of any kind: its text columns, every text in it, or its conversations as the model reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from danlu.data.columns import USUAL, as_label, choose
from danlu.data.conversations import Conversation, detect, reader
from danlu.data.formats import Rows
from danlu.data.row import strings
from danlu.errors import DataError
from danlu.spec.data import Columns
from danlu.spec.task import Chat, Kto, Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Values = Mapping[str, Any]
Reader = Callable[[Values], Sequence[str]]
"""The texts that the model reads of a row. BadRow if it can read none."""
MESSAGES = ({"role", "content"}, {"from", "value"})
"""A message's keys, in OpenAI's form and in sharegpt's: who speaks, and what is said."""


@dataclass(frozen=True)
class Reading:
    """How a task reads rows. `of_texts` as `roles_of` has it; `labels_of` a cell, None where a row's answer is none of a few;
    `reader_for` rows like a first one: what that cannot read is broken."""

    of_texts: bool | None = None
    labels_of: Callable[[object], Sequence[str]] | None = lambda value: [name] if (name := as_label(value)) else []
    reader_for: Callable[[Values], Reader | None] = lambda _: None


ANY = Reading()
"""Nobody says which task the rows are for."""


def roles_of(first: Values, columns: Columns, label_column: str | None, where: str, *, of_texts: bool | None = True) -> dict[str, str]:
    """What the columns of rows like the first are, or nothing where that cannot be told; a column that is named and not there is refused.

    `of_texts`: a row is one text, or two, and its label. False: rows are made of more (messages, options, answers), so only what `columns`
    names has a role, and every text of a row counts. None: nobody says which task the rows are for.
    """
    table = Rows({name: [] for name in first}, (), "", label_column)
    found = choose(table, columns, USUAL, (), where)
    named = {role: name for role, name in found.items() if getattr(columns, role) is not None}
    if of_texts is False:
        return named
    for needed in (("text", "label"), ("text",)):
        try:
            chosen = choose(table, columns, USUAL, needed, where)
        except DataError:
            continue
        text = chosen["text"]
        if "text" not in named and isinstance(first[text], list | dict):
            return named  # the only column, and no text: messages, words
        if "label" in needed or columns.label is not None:
            return chosen
        others = [name for name, value in first.items() if name != text and isinstance(value, str | list | dict)]
        if of_texts is None and "text" not in named and others:
            return named
        return {role: name for role, name in chosen.items() if role != "label"}
    return named


def row_text(values: Values, roles: Mapping[str, str]) -> str:
    """What a row says: its text and pair, or where that is unknown every text in it but the label."""
    if "text" in roles:
        parts = [values.get(roles[role]) for role in ("text", "text_pair") if role in roles]
        # A list or an object is no text, as the tasks see it.
        return "\n".join(str(value) for value in parts if isinstance(value, str | int | float))
    return "\n".join(part for name, value in values.items() if name != roles.get("label") for part in _said(value))


def _said(value: object) -> Iterator[str]:
    """Every text in a value; of a message what is said, and not who says it."""
    if isinstance(value, list):
        for one in value:
            yield from _said(one)
    elif isinstance(value, dict) and (keys := next((keys for keys in MESSAGES if keys <= value.keys()), None)):
        yield from strings([inner for name, inner in value.items() if name not in keys & {"role", "from"}])
    else:
        yield from strings(value)


def conversation_reader(task: Chat | Preference, tokenizer: PreTrainedTokenizerBase, first: Values) -> Reader | None:
    """How rows like the first are read through the chat template; None where they hold no conversations, or none by themselves."""
    from danlu.data.preferences import detect_pairs, pair_reader
    from danlu.data.rendering import render

    table = Rows({name: [value] for name, value in first.items()}, (), "")
    if not tokenizer.chat_template or (isinstance(task, Preference) and isinstance(task.loss, Kto)):
        return None
    conversations: Callable[[Values], Sequence[Conversation]]
    try:
        if isinstance(task, Chat):
            form = detect(table, where="") if task.row_format == "auto" else task.row_format
            conversations, turns = reader(form), task.assistant_turns
        else:
            pairs, turns = pair_reader(detect_pairs(table, where="")), "last"
            form = "pairs"
            conversations = lambda row: [side for pair in pairs(row) for side in (pair.chosen, pair.rejected)]  # noqa: E731
    except DataError:
        return None
    if form == "text":
        return None

    def read(values: Values) -> list[str]:
        row = {name: value for name, value in values.items() if value is not None}
        return [rendered.text for conversation in conversations(row) for rendered in render(conversation, tokenizer, turns)]

    return read
