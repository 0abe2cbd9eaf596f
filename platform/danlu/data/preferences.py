"""Rows as pairs of conversations, one preferred to the other: the explicit and implicit forms of TRL, LLaMA-Factory's and OpenAI's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from danlu.data.conversations import SHAREGPT_ROLES, BadRow, Conversation, Message, Row, as_messages, checked, reader
from danlu.data.formats import Rows
from danlu.errors import DataError


@dataclass(frozen=True)
class Pair:
    """Two conversations that begin alike; only what follows the common beginning is compared."""

    chosen: Conversation
    rejected: Conversation


FORMATS: dict[str, str] = {
    "openai": "input + preferred_output + non_preferred_output (OpenAI)",
    "sharegpt": "conversations + chosen + rejected (sharegpt)",
    "alpaca": "instruction + chosen + rejected (alpaca)",
    "explicit": "prompt + chosen + rejected",
    "implicit": "chosen + rejected, the prompt in both",
}


def detect_pairs(rows: Rows, *, where: str) -> str:
    """Which form of pairs these rows have, by their columns."""
    names = set(rows.columns)
    if {"input", "preferred_output", "non_preferred_output"} <= names:
        return "openai"
    if {"chosen", "rejected"} <= names:
        for column, name in (("conversations", "sharegpt"), ("instruction", "alpaca"), ("prompt", "explicit")):
            if column in names:
                return name
        return "implicit"
    raise DataError(
        f"the columns {', '.join(map(repr, rows.columns))} hold no pairs", where=where, fix="one of: " + "; ".join(FORMATS.values())
    )


def pair_reader(form: str) -> Callable[[Row], list[Pair]]:
    """What reads a row of a form; it raises BadRow."""
    readers: dict[str, Callable[[Row], Pair]] = {
        "openai": _openai,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "explicit": lambda row: _pair(row, as_messages(row.get("prompt"), "user"), row.get("tools")),
        "implicit": _implicit,
    }
    return lambda row: [readers[form](row)]


def _pair(row: Row, prompt: list[Message], tools: object, chosen: str = "chosen", rejected: str = "rejected") -> Pair:
    if chosen not in row or rejected not in row:
        raise BadRow(f"{chosen} or {rejected} is missing")
    answers = [as_messages(_turn(row[name]), "assistant") for name in (chosen, rejected)]
    if answers[0] == answers[1]:
        raise BadRow(f"{chosen} and {rejected} are the same")
    sides = [checked([*prompt, *answer], tools, learned_from=len(prompt)) for answer in answers]
    return Pair(sides[0], sides[1])


def _turn(value: object) -> object:
    """A single message, in sharegpt's form or OpenAI's, as a list of one."""
    if not isinstance(value, Mapping):
        return value
    if "from" in value:
        if value["from"] not in SHAREGPT_ROLES:
            raise BadRow(f"nobody is called {value['from']!r} in sharegpt: {', '.join(SHAREGPT_ROLES)}")
        return [{"role": SHAREGPT_ROLES[value["from"]], "content": value.get("value")}]
    return [value]


def _implicit(row: Row) -> Pair:
    if not isinstance(row.get("chosen"), list) or not isinstance(row.get("rejected"), list):
        raise BadRow("without a prompt, chosen and rejected have to be lists of messages")
    chosen, rejected = as_messages(row["chosen"], "assistant"), as_messages(row["rejected"], "assistant")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if not common:
        raise BadRow("chosen and rejected do not begin alike, so there is no prompt")
    return _pair({"chosen": chosen[common:], "rejected": rejected[common:]}, chosen[:common], row.get("tools"))


def _openai(row: Row) -> Pair:
    asked = row.get("input")
    if not isinstance(asked, Mapping):
        raise BadRow('input has to be {"messages": [...]}')
    prompt = as_messages(asked.get("messages"), "user")
    return _pair(row, prompt, asked.get("tools"), "preferred_output", "non_preferred_output")


def _sharegpt(row: Row) -> Pair:
    # The reader wants an answer to learn; the pair's stand in columns of their own.
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise BadRow("conversations has to be a list of turns")
    whole = reader("sharegpt")({**row, "conversations": [*turns, {"from": "gpt", "value": "-"}]})[0]
    return _pair(row, list(whole.messages[:-1]), row.get("tools"))


def _alpaca(row: Row) -> Pair:
    asked = reader("alpaca")({**row, "output": "-"})[0]
    return _pair(row, list(asked.messages[:-1]), None)
