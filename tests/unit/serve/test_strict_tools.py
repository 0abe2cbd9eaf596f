"""A strict tool's arguments follow its schema whoever chooses to call it: of all texts that the grammar lets through, and over HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import llguidance
import openai
import pytest
from jsonschema import Draft202012Validator
from lm import engine, write_family
from pydantic import BaseModel
from tokenizers import AddedToken
from transformers import AutoTokenizer

from danlu.errors import RequestError
from danlu.serve.engines.echo import EchoTextEngine
from danlu.serve.engines.torch.guide import Guides
from danlu.serve.gateway import Gateway
from danlu.serve.generation import Guide
from danlu.serve.openai.tools import CallDelta, ToolCallParser
from danlu.spec.serve import EchoText, Limits

Served = Callable[..., AbstractContextManager[str]]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: dict[str, Any] = {"weather": WEATHER, "search": {"type": "object"}}
ANSWER = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
ASKED: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "required": ["q"]}}},
]

ARGUMENTS = '{"city": "Rome", "days": 3}'
TAGGED = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
BARE = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'

# Text -> whether it may be said.
TALK = {
    "": True,
    "It is warm. 小麦 🚢 a < b": True,
    TAGGED: True,
    f"Let me see. {TAGGED}\n{TAGGED} So.": True,
    f"<think>a {{ b</think>\n{TAGGED}": True,
    f"<think>{BARE}</think>": True,
    BARE: True,
    f"{BARE}; {BARE}": True,
    f"<|python_tag|>{BARE}": True,
    f'{BARE[:1]}"type": "function", {BARE[1:]}': True,
    '<tool_call>{"name": "search", "arguments": {"q": [1, {"a": null}]}}</tool_call>': True,
    '{"answer": 42, "name": "weather"}': True,
    "{}": True,
    '{ "name': True,
    "so <tool_call": True,
    "<tool_call>so": False,
    "<tool_call>": False,
    TAGGED.replace("3", "0"): False,
    TAGGED.replace('"Rome"', '"Bonn"'): False,
    TAGGED.replace(', "days": 3', ""): False,
    TAGGED.replace("weather", "other"): False,
    TAGGED.replace(f'"name": "weather", "arguments": {ARGUMENTS}', f'"arguments": {ARGUMENTS}, "name": "weather"'): False,
    TAGGED.replace("</tool_call>", ""): False,
    f"{TAGGED}<tool_call>x": False,
    BARE.replace("3", "10"): False,
    f"\xa0{BARE}": False,
    f"<|python_tag|> {BARE.replace('3', '10')}": False,
    f"{BARE}; {BARE.replace('3', '10')}": False,
    f"{BARE} and so on": False,
    '{"type": "function", "name": "weather", "parameters": {"days": 1}}': False,
    '{"parameters": {"days": 1}, "name": "weather"}': False,
}
ANSWERED = {
    '{"ok": true}': True,
    TAGGED: True,
    f"{TAGGED}\n{TAGGED}": True,
    f"Well. {TAGGED}": False,
    TAGGED.replace("3", "0"): False,
    BARE: False,
    "Well.": False,
    "": False,
}


class Forecast(BaseModel):
    city: Literal["Rome", "Oslo"]
    days: int


class Ok(BaseModel):
    ok: bool


def write_model(folder: Path, markers: str) -> Path:
    """Whose vocabulary has tokens of its own for what opens and closes a call: none, such that a text shows, or hidden ones."""
    write_family(folder, "qwen3", vocab_size=336)
    if markers != "none":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        hidden = [AddedToken("<|python_tag|>", special=True), AddedToken("<|im_x|>", special=True)]
        tokenizer.add_tokens(hidden, special_tokens=True)
        shown = [AddedToken(text, special=markers == "hidden") for text in ("<tool_call>", "</tool_call>")]
        tokenizer.add_tokens(shown, special_tokens=markers == "hidden")
        tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>", "[x]")])
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["none", "shown", "hidden"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def guides(folder: Path) -> Guides:
    return Guides(AutoTokenizer.from_pretrained(folder), 336, [1])


def matcher(guides: Guides, answer: Any = None) -> llguidance.LLMatcher:
    asked = {"tools": TOOLS, "strict": True, "answer": answer, "answer_param": "response_format"}
    return guides.compile(Guide("tool_calls", json.dumps(asked), "tools")).matcher


def calls_of(text: str, *, bare: bool = True) -> list[tuple[str, str]]:
    parser = ToolCallParser(list(TOOLS), bare=bare)
    found: list[tuple[str, str]] = []
    for piece in parser.feed(text) + parser.end():
        if isinstance(piece, CallDelta):
            name, before = (piece.name, "") if piece.name else found.pop()
            found.append((name, before + piece.arguments))
    return found


def check(calls: list[tuple[str, str]]) -> int:
    for name, arguments in calls:
        Draft202012Validator(TOOLS[name]).validate(json.loads(arguments))
    return len(calls)


@pytest.mark.parametrize("answer", [None, ANSWER])
def test_a_text_may_be_said_if_its_calls_are_valid(answer: Any, guides: Guides) -> None:
    tokenizer = guides.plain
    if answer is not None and guides.markers.hide_tags:
        with pytest.raises(RequestError, match="cannot be told apart"):
            matcher(guides, answer)
        return
    for text, may in (TALK if answer is None else ANSWERED).items():
        pieces = [tokenizer(text, add_special_tokens=False).input_ids]  # with the tokens of the markers
        alphabet = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        pieces.append([tokenizer.convert_tokens_to_ids(character) for word, _ in alphabet for character in word])  # byte by byte
        told = []
        for ids in pieces:
            made = matcher(guides, answer)
            told.append(made.try_consume_tokens(ids) == len(ids) and made.is_accepting())
        if guides.markers.hide_tags and "tool_call>" in text:
            assert not told[1], text  # what a text does not show opens nothing, but may stand before a call without tags
            check(calls_of(tokenizer.decode(pieces[0], skip_special_tokens=True)) if told[0] else [])
            continue
        else:
            assert told == [may, may], text
        if may:
            check(calls_of(text, bare=answer is None))


@pytest.mark.parametrize("answer", [None, ANSWER])
def test_whatever_the_grammar_lets_through_is_read_as_valid_calls_or_as_text(answer: Any, guides: Guides) -> None:
    """Walks over what may follow: any token, or the beginning of something that looks like a call."""
    if answer is not None and guides.markers.hide_tags:
        return
    draw, tokenizer = random.Random(3), guides.plain
    snippets = [
        TAGGED,
        BARE,
        f"<tool_call>{BARE}</tool_call>",
        "<tool_call>",
        "</tool_call>",
        ARGUMENTS,
        "}",
        "; ",
        '"name": ',
        '{"',
        "\n",
        " ",
    ]
    snippets += [
        '{"name": "weather", "arguments": ',
        '{"name": "search", "parameters": ',
        '"parameters": {',
        "<|python_tag|>",
        '{"type": "function", ',
    ]
    snippets += ['"search"', "[x]", "<think>", '{"ok": ', "true", "{}"]
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in snippets]
    allowed = list(range(3, len(tokenizer)))
    num_calls = num_ends = 0
    for _ in range(150):
        made, ids = matcher(guides, answer), list[int]()
        for _ in range(30):
            for one in draw.choice(encoded) if draw.random() < 0.8 else [draw.choice(allowed)]:
                if made.try_consume_tokens([one]) != 1:
                    break
                ids.append(one)
            if made.is_accepting():
                num_ends += 1
                num_calls += check(calls_of(tokenizer.decode(ids, skip_special_tokens=True), bare=answer is None))
    assert num_ends > 40
    assert num_calls > 40


def odd_schema(kind: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": kind}}}


def test_a_schema_that_cannot_be_followed_names_its_tool(guides: Guides) -> None:
    tools = {"fine": WEATHER, "odd": odd_schema("nosuchtype")}
    with pytest.raises(RequestError, match="strict: false") as refused:
        guides.compile(Guide("tool_calls", json.dumps({"tools": tools, "strict": True, "answer": None}), "tools"))
    assert refused.value.param == "tools[1].function.parameters"


def test_a_document_that_cannot_be_followed_names_who_asks_for_it(guides: Guides) -> None:
    asked = {"tools": TOOLS, "strict": False, "answer": odd_schema("nosuchtype"), "answer_param": "response_format"}
    with pytest.raises(RequestError, match="json_schema cannot be followed") as refused:
        guides.compile(Guide("tool_calls", json.dumps(asked), "tools"))
    assert refused.value.param == "response_format"


def test_where_calls_cannot_be_told_from_a_document_tools_that_are_not_strict_leave_the_document(guides: Guides) -> None:
    asked = {"tools": {"search": {"type": "object"}}, "strict": False, "answer": ANSWER, "answer_param": "response_format"}
    made = guides.compile(Guide("tool_calls", json.dumps(asked), "tools")).matcher
    call = '<tool_call>{"name": "search", "arguments": {}}</tool_call>'
    for text, may in {'{"ok": true}': True, call: not guides.markers.hide_tags, "Well.": False}.items():
        ids = guides.plain(text, add_special_tokens=False).input_ids
        assert (made.try_consume_tokens(ids) == len(ids) and made.is_accepting()) == may, text
        made.reset()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("shown"), "shown")


@pytest.fixture(scope="module")
def client(shown: Path, served: Served) -> Iterator[openai.OpenAI]:
    with (
        served(Gateway(engine(shown), "tiny", Limits(), lambda *_, **__: None)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found,
    ):
        yield found


def pushed_to(folder: Path, text: str) -> dict[str, Any]:
    """A request whose answers are likely to begin with a text's first token, waste no room on spaces, and end with their first call."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spaces = [i for i in range(len(tokenizer)) if i > 2 and not tokenizer.decode([i]).strip()]
    bias = {str(i): -100 for i in spaces} | {str(tokenizer(text, add_special_tokens=False).input_ids[0]): 100}
    asked = {"tools": ASKED[:1], "logit_bias": bias, "stop": "</tool_call>", "n": 12, "seed": 5}
    return {"model": "tiny", "messages": [{"role": "user", "content": "a"}], **asked}


def calls_in(choice: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]


def test_a_model_that_opens_a_call_makes_a_valid_one(client: openai.OpenAI, shown: Path) -> None:
    """One of random weights, which would write anything."""
    asked = pushed_to(shown, "<tool_call>")
    called = [one for one in client.chat.completions.create(**asked).choices if one.finish_reason == "tool_calls"]
    assert len(called) > 2
    assert all(check(calls_in(one)) for one in called)
    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                streamed[choice.index] = streamed.get(choice.index, "") + (call.function.arguments or "")
    for one in called:
        assert streamed[one.index] == "".join(arguments for _, arguments in calls_in(one))


@pytest.mark.parametrize("strict", [True, False])
def test_with_a_response_format_there_is_a_valid_call_or_the_document(strict: bool, client: openai.OpenAI, shown: Path) -> None:
    tools = [{"type": "function", "function": {**ASKED[0]["function"], "strict": strict}}]
    formatted: Any = {"type": "json_schema", "json_schema": {"name": "ok", "schema": ANSWER}}
    calls = documents = 0
    for begin in ("<tool_call>", "{"):
        answer = client.chat.completions.create(**pushed_to(shown, begin) | {"tools": tools}, response_format=formatted)
        for one in answer.choices:
            if one.finish_reason == "tool_calls":
                made = calls_in(one)
                assert all(isinstance(json.loads(arguments), dict) for _, arguments in made)
                calls += check(made) if strict else len(made)
            elif one.finish_reason == "stop":
                Draft202012Validator(ANSWER).validate(json.loads(one.message.content or ""))
                documents += 1
    assert calls > 2
    assert documents > 2


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "a schema of no object": ({"parameters": {"type": "string"}}, "tools[0].function.parameters", '"type": "object"'),
    "a schema of anything": ({"parameters": {}}, "tools[0].function.parameters", '"type": "object"'),
    "a schema that is none": ({"parameters": {"type": "object", "required": 3}}, "tools[0].function.parameters", "strict: false"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_strict_tool_that_cannot_be_is_refused(name: str, client: openai.OpenAI) -> None:
    function, param, fix = BAD[name]
    tools: Any = [{"type": "function", "function": {"name": "f", "strict": True, **function}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], tools=tools)
    assert refused.value.param == param
    assert fix in str(refused.value).replace("\\", "")


def test_what_is_neither_a_call_nor_a_document_cannot_stand_beside_a_strict_tool(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools and guided_regex cannot both hold"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}], tools=ASKED, extra_body={"guided_regex": "a+"}
        )


def test_the_fake_engine_keeps_it_too(served: Served) -> None:
    with (
        served(Gateway(EchoTextEngine(EchoText()), "echo", Limits(), lambda *_, **__: None)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):

        def ask(text: str, **more: Any) -> Any:
            return client.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}], tools=ASKED, **more).choices[
                0
            ]

        assert ask("It is warm.").message.content == "It is warm."
        called = ask(f"Well. {TAGGED.replace('3', '0')}")
        assert (called.finish_reason, called.message.content) == ("tool_calls", "Well.")
        assert check([(call.function.name, call.function.arguments) for call in called.message.tool_calls]) == 1
        answer: Any = {"type": "json_schema", "json_schema": {"name": "ok", "schema": ANSWER}}
        assert json.loads(ask("a", response_format=answer).message.content) == {"ok": True}
        assert ask(TAGGED, response_format=answer).finish_reason == "tool_calls"
        messages: Any = [{"role": "user", "content": "a"}]
        tools = [openai.pydantic_function_tool(Forecast)]  # which makes them strict
        found = client.chat.completions.parse(model="echo", messages=messages, response_format=Ok, tools=tools).choices[0].message
        assert found.parsed == Ok(ok=True)
        messages[0]["content"] = '<tool_call>{"name": "Forecast", "arguments": {}}</tool_call>'
        (call,) = client.chat.completions.parse(model="echo", messages=messages, tools=tools).choices[0].message.tool_calls or ()
        assert call.function.parsed_arguments == Forecast(city="Rome", days=0)
