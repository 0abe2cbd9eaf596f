"""Rows as pairs of conversations, one preferred to the other: the explicit and implicit forms of TRL, LLaMA-Factory's and OpenAI's; and
conversations that are desirable or not, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from danlu.data.conversations import (
    SHAREGPT_ROLES,
    BadRow,
    Conversation,
    Kept,
    Message,
    Row,
    as_messages,
    checked,
    detect,
    keep,
    reader,
    records,
)
from danlu.data.formats import Rows
from danlu.errors import DataError


@dataclass(frozen=True)
class Pair:
    """Two conversations that begin alike; only what follows the common beginning is compared.

    Of an answer that is `desirable` or not, the second conversation has the answer to another prompt.
    """

    chosen: Conversation
    rejected: Conversation
    desirable: bool | None = None


@dataclass(frozen=True)
class Judged:
    """A conversation whose last answer is desirable, or is not."""

    conversation: Conversation
    desirable: bool


FORMATS: dict[str, str] = {
    "openai": "input + preferred_output + non_preferred_output (OpenAI)",
    "sharegpt": "conversations + chosen + rejected (sharegpt)",
    "alpaca": "instruction + chosen + rejected (alpaca)",
    "explicit": "prompt + chosen + rejected",
    "implicit": "chosen + rejected, the prompt in both",
}


UNPAIRED: dict[str, str] = {
    "prompt_completion": "prompt + completion + label",
    "messages": "messages + label or kto_tag",
    "sharegpt": "conversations + label or kto_tag (sharegpt)",
    "alpaca": "instruction + output + label or kto_tag (alpaca)",
}
TAGS = ("label", "kto_tag")


def read_pairs(rows: Rows, *, where: str) -> tuple[Kept[Pair], str]:
    """Rows as pairs, and the form they have in words."""
    form = detect_pairs(rows, where=where)
    return keep(records(rows), pair_reader(form), where=where), f"pairs as {FORMATS[form]}"


def read_judged(rows: Rows, *, where: str) -> tuple[Kept[Pair], str]:
    """Rows as answers that are desirable or not, each beside the answer to another prompt. DataError unless there are both kinds."""
    names = set(rows.columns)
    if not names & set(TAGS) and ({"chosen", "rejected"} <= names or "preferred_output" in names):
        form = detect_pairs(rows, where=where)
        pairs = pair_reader(form)
        read = keep(records(rows), lambda row: [one for pair in pairs(row) for one in _both(pair)], where=where)
        told = f"pairs as {FORMATS[form]}, each a desirable and an undesirable answer"
    elif not names & set(TAGS):
        raise DataError(
            f"the columns {', '.join(map(repr, rows.columns))} do not say which answers are desirable",
            where=where,
            fix="one of: " + "; ".join([*UNPAIRED.values(), *FORMATS.values()]),
        )
    else:
        form = detect(rows, where=where)
        conversations = reader(form)
        read = keep(records(rows), lambda row: [_judged(row, one) for one in conversations(row)], where=where)
        told = f"answers as {UNPAIRED.get(form, form)}"
    desirable = sum(one.desirable for one in read.items)
    if desirable in (0, len(read.items)):
        kind = "desirable" if desirable else "undesirable"
        raise DataError(f"every answer is {kind}: KTO tells two kinds apart", where=where, fix="rows of both kinds; true is desirable")
    return Kept(_beside_others(read.items, where), read.row_numbers, read.dropped, read.first_dropped), told


def _both(pair: Pair) -> list[Judged]:
    return [Judged(pair.chosen, True), Judged(pair.rejected, False)]


def _judged(row: Row, conversation: Conversation) -> Judged:
    tag = next((row[name] for name in TAGS if name in row), None)
    known = {"true": True, "false": False, "1": True, "0": False}
    tag = known.get(str(tag).strip().lower())
    if tag is None:
        raise BadRow("the label is neither true nor false")
    # What is judged is the last answer; a completion of several messages says where it begins.
    last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
    if not last:
        raise BadRow("the conversation begins with an assistant turn, which answers nothing")
    return Judged(replace(conversation, learned_from=conversation.learned_from or last), tag)


def _beside_others(items: Sequence[Judged], where: str) -> list[Pair]:
    """Each answer, and beside it its prompt with an answer from half the rows away, the first there that answers another prompt."""
    prompts = [repr(one.conversation.messages[: one.conversation.learned_from]) for one in items]
    if len(set(prompts)) < 2:
        raise DataError("every row has the same prompt: KTO pairs prompts with the answers to others", where=where, fix="more prompts")
    found = []
    for i, one in enumerate(items):
        j = (i + len(items) // 2) % len(items)
        while prompts[j] == prompts[i]:
            j = (j + 1) % len(items)
        mine, other = one.conversation, items[j].conversation
        messages = (*mine.messages[: mine.learned_from], *other.messages[other.learned_from :])
        found.append(Pair(mine, replace(mine, messages=messages), one.desirable))
    return found


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
