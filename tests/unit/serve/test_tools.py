"""Tool calls in a model's text: whole or in any pieces, the same calls; and text that only looks like one stays text."""

from __future__ import annotations

import json
import random

import pytest

from danlu.serve.openai.tools import CallDelta, Content, Piece, ToolCallParser

NAMES = ["weather", "search"]
TRICKY = json.dumps({"city": 'a "}{" \\', "深": ["}", {"x": 1}], "n": None}, ensure_ascii=False)

# Text -> the content, and the calls as (name, arguments).
HERMES = {
    "one call": ('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "", [("weather", '{"city": "Rome"}')]),
    "text before": ('Let me see. <tool_call>{"name": "search", "arguments": {}}</tool_call>', "Let me see. ", [("search", "{}")]),
    "two calls": (
        '<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>\n'
        '<tool_call>{"name": "search", "arguments": {"b": 2}}</tool_call>\n',
        "",
        [("weather", '{"a": 1}'), ("search", '{"b": 2}')],
    ),
    "braces and quotes in strings": (f'<tool_call>{{"name": "weather", "arguments": {TRICKY}}}</tool_call>', "", [("weather", TRICKY)]),
    "arguments first": ('<tool_call>{"arguments": {"a": 1}, "name": "weather"}</tool_call>', "", [("weather", '{"a": 1}')]),
    "arguments as a text": ('<tool_call>{"name": "weather", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("weather", '{"a": 1}')]),
    "no arguments": ('<tool_call>{"name": "weather"}</tool_call>', "", [("weather", "{}")]),
    "no end tag": ('<tool_call>{"name": "weather", "arguments": {"a": 1}}', "", [("weather", '{"a": 1}')]),
    "no call inside": ("<tool_call>not JSON</tool_call> and on", "<tool_call>not JSON</tool_call> and on", []),
    "half a tag": ("a < b <tool", "a < b <tool", []),
    "an open tag at the end": ("so <tool_call>", "so <tool_call>", []),
}
LLAMA = {
    "one call": ('{"name": "weather", "parameters": {"city": "Rome"}}', "", [("weather", '{"city": "Rome"}')]),
    "with its type": ('{"type": "function", "name": "weather", "parameters": {"a": [1]}}', "", [("weather", '{"a": [1]}')]),
    "after a tag": ('<|python_tag|>{"name": "search", "parameters": {"q": "x"}}', "", [("search", '{"q": "x"}')]),
    "two calls": (
        '{"name": "weather", "parameters": {}}; {"name": "search", "parameters": {"q": 1}}',
        "",
        [("weather", "{}"), ("search", '{"q": 1}')],
    ),
    "parameters first": ('{"parameters": {"a": 1}, "name": "weather"}', "", [("weather", '{"a": 1}')]),
    "an answer in JSON": ('{"answer": 42, "name": "weather"}', '{"answer": 42, "name": "weather"}', []),
    "a tool that is not on offer": ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    "a long object": ('{"name": "' + "x" * 300, '{"name": "' + "x" * 300, []),
    "plain text": ("  It is warm.", "  It is warm.", []),
}
CASES = {f"hermes, {name}": case for name, case in HERMES.items()} | {f"llama, {name}": case for name, case in LLAMA.items()}


def read(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls, put together as a client does."""
    content, calls = "", {}
    for piece in pieces:
        if isinstance(piece, Content):
            content += piece.text
        elif piece.name is not None:
            assert piece.id is not None
            calls[piece.index] = (piece.name, piece.arguments)
        else:
            assert piece.id is None
            calls[piece.index] = (calls[piece.index][0], calls[piece.index][1] + piece.arguments)
    assert list(calls) == list(range(len(calls)))
    return content, list(calls.values())


def parsed(parts: list[str], **how: object) -> list[Piece]:
    parser = ToolCallParser(NAMES, **how)  # type: ignore[arg-type]
    return [piece for part in parts for piece in parser.feed(part)] + parser.end()


@pytest.mark.parametrize("name", CASES)
def test_however_a_text_is_cut_its_calls_are_the_same(name: str) -> None:
    text, content, calls = CASES[name]
    assert read(parsed([text])) == (content, calls)
    assert read(parsed(list(text))) == (content, calls)
    draw = random.Random(1)
    for _ in range(50):
        cuts = sorted(draw.sample(range(len(text) + 1), k=min(4, len(text))))
        assert read(parsed([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])) == (content, calls)


def test_arguments_stream_as_they_are_written_and_text_is_not_held_back() -> None:
    parser = ToolCallParser(NAMES)
    assert parser.feed("Let me see. ") == [Content("Let me see. ")]
    assert parser.feed('<tool_call>{"name": "weather", "arguments": ')[0:] == []
    begin, first = parser.feed('{"city": "Ro')
    assert isinstance(begin, CallDelta)
    assert begin.name == "weather"
    assert first == CallDelta(0, '{"city": "Ro')
    assert parser.feed('me"}') == [CallDelta(0, 'me"}')]
    assert parser.feed("}</tool_call>") == []
    assert parser.end() == []


def test_without_parallel_calls_only_the_first_is_given() -> None:
    text, _, calls = HERMES["two calls"]
    assert read(parsed(list(text), parallel=False)) == ("", calls[:1])


def test_a_forced_call_takes_the_whole_text_as_its_arguments() -> None:
    pieces = parsed(['{"city": ', '"Rome"}'], forced="weather")
    assert read(pieces) == ("", [("weather", '{"city": "Rome"}')])
