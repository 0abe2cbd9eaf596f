"""Tool calls in a model's text, as they stream: Hermes' and Qwen's `<tool_call>` form, and the bare JSON of Llama."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from danlu.serve.openai.common import new_id

OPEN, CLOSE, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
_STRING = r'"(?:[^"\\]|\\.)*"'
_HEADER = re.compile(
    rf'\s*\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
)
_FIRST_KEY = re.compile(r'\{\s*"([^"]*)"')
_HELD_CHARACTERS = 200
"""A bare JSON object that has no call's head by then is an answer."""


@dataclass(frozen=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call: the first has its id and name, the others a piece of the arguments' JSON, as the model wrote it."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Piece = Content | CallDelta


class ToolCallParser:
    """Text in, pieces out: as early as it is certain what they are. `names` are the tools on offer.

    With `forced` the whole text is that tool's arguments. Without `parallel` every call after the first is dropped, without `bare` a
    document of JSON is an answer.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True, forced: str | None = None, bare: bool = True) -> None:
        self.names, self.parallel, self.may_be_bare = names, parallel, bare
        self.state: Literal["begin", "text", "head", "arguments", "tail", "forced"] = "forced" if forced else "begin"
        self.buffer, self.bare, self.num_calls = "", False, 0
        self.depth, self.in_string, self.escaped = 0, False, False
        self.pending: list[Piece] = self._begin_call(forced) if forced else []

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain now."""
        self.buffer += text
        found, self.pending = self.pending, []
        while (step := self._step()) is not None:
            found += step
        return self._allowed(found)

    def end(self) -> list[Piece]:
        """The pieces that were held back; after the text's end."""
        found = self.feed("")
        rest, self.buffer = self.buffer, ""
        match self.state:
            case "begin" | "text":
                found += self._content(rest)
            case "head":
                found += self._whole_call(rest) or self._content(rest if self.bare else OPEN + rest)
        return self._allowed(found)

    def _step(self) -> list[Piece] | None:
        """One transition; None where more text is needed."""
        match self.state:
            case "begin":
                return self._at_begin()
            case "text":
                return self._in_text()
            case "head":
                return self._in_bare_head() if self.bare else self._in_head()
            case "arguments":
                return self._in_arguments()
            case "tail":
                return self._in_tail()
        rest, self.buffer = self.buffer, ""
        return [CallDelta(self.num_calls - 1, rest)] if rest else None

    def _at_begin(self) -> list[Piece] | None:
        text = self.buffer.lstrip()
        if not text or (text != PYTHON_TAG and PYTHON_TAG.startswith(text)):
            return None
        self.bare = self.may_be_bare and text.startswith(("{", PYTHON_TAG))
        self.state = "head" if self.bare else "text"
        return []

    def _in_text(self) -> list[Piece] | None:
        before, tag, after = self.buffer.partition(OPEN)
        if tag:
            self.state, self.bare, self.buffer = "head", False, after
            return self._content(before)
        keep = next((n for n in range(min(len(before), len(OPEN) - 1), 0, -1) if OPEN.startswith(before[-n:])), 0)
        if self.num_calls and not before.strip():
            keep = len(before)  # between calls
        self.buffer = before[len(before) - keep :]
        return self._content(before[: len(before) - keep]) or None

    def _in_head(self) -> list[Piece] | None:
        if head := _HEADER.match(self.buffer):
            return self._begin_arguments(head)
        body, tag, after = self.buffer.partition(CLOSE)
        if not tag:
            return None
        self.state, self.buffer = "text", after
        return self._whole_call(body) or self._content(OPEN + body + CLOSE)

    def _in_bare_head(self) -> list[Piece] | None:
        text = self.buffer.lstrip().removeprefix(PYTHON_TAG)
        if (head := _HEADER.match(text)) and json.loads(head[1]) in self.names:
            self.buffer = text
            return self._begin_arguments(head)
        key = _FIRST_KEY.match(text.lstrip())
        if head or len(text) > _HELD_CHARACTERS or (key and key[1] not in ("type", "name", "arguments", "parameters")):
            self.state = "text"
            return []
        return None

    def _in_arguments(self) -> list[Piece] | None:
        for at, character in enumerate(self.buffer):
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped, self.in_string = character == "\\", character != '"'
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if not self.depth:
                    text, self.buffer, self.state = self.buffer[: at + 1], self.buffer[at + 1 :], "tail"
                    return [CallDelta(self.num_calls - 1, text)]
        text, self.buffer = self.buffer, ""
        return [CallDelta(self.num_calls - 1, text)] if text else None

    def _in_tail(self) -> list[Piece] | None:
        if not self.bare:
            _, tag, after = self.buffer.partition(CLOSE)
            if not tag:
                return None
            self.state, self.buffer = "text", after
            return []
        self.buffer = self.buffer.lstrip(" \n\t};,")
        if not self.buffer:
            return None
        self.state = "head" if self.buffer.startswith("{") else "text"
        return []

    def _begin_arguments(self, head: re.Match[str]) -> list[Piece]:
        self.buffer, self.state, self.depth = self.buffer[head.end() :], "arguments", 0
        return self._begin_call(json.loads(head[1]))

    def _begin_call(self, name: str) -> list[Piece]:
        self.num_calls += 1
        return [CallDelta(self.num_calls - 1, id=new_id("call_"), name=name)]

    def _whole_call(self, body: str) -> list[Piece]:
        """A call whose fields stand in another order, or whose arguments are no object; nothing if it is none."""
        try:
            found: Any = json.loads(body.strip().removeprefix(PYTHON_TAG))
        except ValueError:
            return []
        if not isinstance(found, dict) or not isinstance(found.get("name"), str) or (self.bare and found["name"] not in self.names):
            return []
        arguments = found.get("arguments", found.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        return [*self._begin_call(found["name"]), CallDelta(self.num_calls - 1, text)]

    def _content(self, text: str) -> list[Piece]:
        return [Content(text)] if text and not (self.num_calls and not text.strip()) else []

    def _allowed(self, pieces: list[Piece]) -> list[Piece]:
        return [piece for piece in pieces if self.parallel or isinstance(piece, Content) or piece.index == 0]
