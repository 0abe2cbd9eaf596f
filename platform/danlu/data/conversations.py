"""Rows as conversations: alpaca, sharegpt, OpenAI messages, prompt and completion, plain text; and what is wrong with a row, in words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from danlu.data.formats import Rows
from danlu.errors import DataError

Message = Mapping[str, Any]
Row = Mapping[str, Any]
T = TypeVar("T")

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "system": "system", "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


class BadRow(ValueError):
    """Why a row is left out; the same reason is worded the same, so that reasons can be counted."""


@dataclass(frozen=True)
class Conversation:
    """Messages as OpenAI's API has them, arguments of tool calls as objects. Turns before `learned_from` are read and never learned.

    `text` is set, and `messages` empty, for plain text that no template is applied to.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    learned_from: int = 0
    text: str | None = None


@dataclass(frozen=True)
class Kept(Generic[T]):
    """What could be read, with the 1-based numbers of their rows in the source; reasons and counts of the rest."""

    items: list[T]
    row_numbers: list[int]
    dropped: Mapping[str, int] = field(default_factory=dict)
    first_dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> the first such row."""

    def notes(self, name: str) -> list[str]:
        """A line for each reason."""
        return [
            f"{name}: {count} row{'s' if count > 1 else ''} dropped, the first row {self.first_dropped[reason]}: {reason}"
            for reason, count in self.dropped.items()
        ]


def keep(items: Iterable[tuple[int, Any]], read: Callable[[Any], Sequence[T]], *, where: str, before: Kept[Any] | None = None) -> Kept[T]:
    """`read` each numbered item; BadRow leaves it out. DataError if half of them or more are left out, with the first one's row."""
    kept: list[T] = []
    numbers: list[int] = []
    dropped: Counter[str] = Counter() if before is None else Counter(before.dropped)
    first = {} if before is None else dict(before.first_dropped)
    read_rows = sum(dropped.values())
    for number, item in items:
        read_rows += 1
        try:
            found = read(item)
        except BadRow as error:
            dropped[str(error)] += 1
            first.setdefault(str(error), number)
            continue
        kept += found
        numbers += [number] * len(found)
    lost = sum(dropped.values())
    if not kept or 2 * lost >= read_rows:
        reason, count = dropped.most_common(1)[0] if dropped else ("there are no rows", 0)
        raise DataError(
            f"{lost} of {read_rows} rows cannot be learned from; row {first.get(reason, 1)}: {reason} ({count} such rows)",
            where=where,
            fix="correct those rows; task.row_format says how rows are read",
        )
    return Kept(kept, numbers, dict(dropped), first)


def records(rows: Rows) -> list[tuple[int, Row]]:
    """Rows as numbered records, without what is missing in them."""
    names = list(rows.columns)
    columns = [rows.columns[name] for name in names]
    return [
        (number, {name: value for name, value in zip(names, values, strict=True) if not _missing(value)})
        for number, values in enumerate(zip(*columns, strict=True), start=1)
    ]


def detect(rows: Rows, *, where: str) -> str:
    """Which of the row formats these are, by their columns and the first rows that have them."""
    names = set(rows.columns)
    if "messages" in names:
        return "messages"
    for name in ("conversations", "conversation"):
        if name in names:
            first: Any = next((turns[0] for turns in rows.columns[name] if isinstance(turns, list) and turns), None)
            return "messages" if isinstance(first, Mapping) and "role" in first else "sharegpt"
    if {"instruction", "output"} <= names:
        return "alpaca"
    if {"prompt", "completion"} <= names:
        return "prompt_completion"
    if "text" in names:
        return "text"
    raise DataError(
        f"the columns {', '.join(map(repr, rows.columns))} are none of the conversation formats",
        where=where,
        fix="messages (OpenAI), conversations (sharegpt), instruction + output (alpaca), prompt + completion, or text",
    )


def reader(row_format: str) -> Callable[[Row], list[Conversation]]:
    """What reads a row of a format; it raises BadRow."""
    readers: dict[str, Callable[[Row], Conversation]] = {
        "messages": _openai,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "prompt_completion": _prompt_completion,
        "text": _plain,
    }
    return lambda row: [readers[row_format](row)]


def as_messages(value: object, role: str) -> list[Message]:
    """A string as one message of `role`; a list of messages as it is, checked."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRow(f"a text or a list of messages is needed, not {type(value).__name__}")
    return [_message(one) for one in value]


def checked(messages: Sequence[Message], tools: object = None, *, learned_from: int = 0) -> Conversation:
    """A conversation that something can be learned from; what comes after the last assistant turn is left out, since nothing follows it."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    if last < learned_from:
        raise BadRow("there is no assistant turn to learn")
    for i, message in enumerate(messages[: last + 1]):
        if message["role"] == "assistant" and i >= learned_from and not _says_something(message):
            raise BadRow("an assistant turn is empty")
    return Conversation(tuple(messages[: last + 1]), tuple(_tools(tools)), learned_from)


def _openai(row: Row) -> Conversation:
    turns = next((row[name] for name in ("messages", "conversations", "conversation") if name in row), None)
    return checked(as_messages(_json(turns, "messages") if isinstance(turns, str) else turns, "user"), row.get("tools"))


def _sharegpt(row: Row) -> Conversation:
    turns = row.get("conversations", row.get("conversation"))
    if not isinstance(turns, list) or not turns:
        raise BadRow("conversations has to be a list of turns")
    messages: list[Message] = [{"role": "system", "content": str(row["system"])}] if str(row.get("system", "")).strip() else []
    for turn in turns:
        if not isinstance(turn, Mapping) or "from" not in turn or not isinstance(turn.get("value"), str):
            raise BadRow('a turn has to be {"from": ..., "value": a text}')
        said_by, value = turn["from"], turn["value"]
        if said_by not in SHAREGPT_ROLES:
            raise BadRow(f"nobody is called {said_by!r} in sharegpt: {', '.join(SHAREGPT_ROLES)}")
        if said_by == "function_call":
            calls = _json(value, "a function_call")
            messages.append(_message({"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}))
        else:
            messages.append({"role": SHAREGPT_ROLES[said_by], "content": value})
    return checked(messages, row.get("tools"))


def _alpaca(row: Row) -> Conversation:
    messages: list[Message] = [{"role": "system", "content": str(row["system"])}] if str(row.get("system", "")).strip() else []
    for pair in row.get("history") or ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRow("history has to be a list of [question, answer]")
        messages += [{"role": "user", "content": str(pair[0])}, {"role": "assistant", "content": str(pair[1])}]
    instruction, more = str(row.get("instruction", "")), str(row.get("input", ""))
    if not (instruction.strip() or more.strip()):
        raise BadRow("instruction and input are both empty")
    asked = "\n".join(part for part in (instruction, more) if part.strip())
    return checked([*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": str(row.get("output", ""))}])


def _prompt_completion(row: Row) -> Conversation:
    if "prompt" not in row or "completion" not in row:
        raise BadRow("prompt or completion is missing")
    prompt = as_messages(row["prompt"], "user")
    return checked([*prompt, *as_messages(row["completion"], "assistant")], row.get("tools"), learned_from=len(prompt))


def _plain(row: Row) -> Conversation:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise BadRow("the text is empty")
    return Conversation((), text=text)


def _message(value: object) -> Message:
    if not isinstance(value, Mapping) or value.get("role") not in ROLES:
        raise BadRow(f'a message has to be {{"role": one of {", ".join(ROLES)}, "content": ...}}')
    message = {name: part for name, part in value.items() if part is not None}
    if (content := message.get("content")) is not None and not isinstance(content, str):
        if not isinstance(content, list) or not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise BadRow("a message's content has to be a text, or a list of text parts")
        message["content"] = "".join(str(part.get("text", "")) for part in content)
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise BadRow("tool_calls has to be a list")
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        else:
            del message["tool_calls"]
    if message["role"] != "assistant" and "content" not in message:
        raise BadRow(f"a {message['role']} message has no content")
    # An assistant's call without words: templates that ask for the key anyway get an empty text, as vLLM gives them.
    return message if "content" in message else message | {"content": ""}


def _call(value: object) -> Mapping[str, Any]:
    """OpenAI's form; templates want the arguments as an object, and vLLM parses them into one before it renders."""
    if not isinstance(value, Mapping):
        raise BadRow("a tool call has to be an object")
    function = value.get("function", value)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call has no function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", "a tool call's arguments")
    if not isinstance(arguments, Mapping):
        raise BadRow("a tool call's arguments have to be an object")
    call: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": _without_missing(arguments)}}
    return call | ({"id": value["id"]} if value.get("id") is not None else {})


def _tools(value: object) -> list[Mapping[str, Any]]:
    tools = _json(value, "tools") if isinstance(value, str) and value.strip() else value
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("tools have to be a list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in map(_without_missing, tools)]


def _without_missing(value: Any) -> Any:
    """Parquet gives every object the keys of all of them."""
    if isinstance(value, Mapping):
        return {name: _without_missing(part) for name, part in value.items() if part is not None}
    return [_without_missing(part) for part in value] if isinstance(value, list) else value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(f"{what} is not JSON") from error


def _says_something(message: Message) -> bool:
    return bool(str(message.get("content", "")).strip() or message.get("tool_calls"))


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)
