"""`/v1/chat/completions`: messages and tools in, choices or chunks out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from danlu.errors import RequestError
from danlu.serve.generation import Chat, Delta, Guide, TokenLogprob, Usage
from danlu.serve.openai.common import TextEvents, Wire, event, parse, usage_response
from danlu.serve.openai.sampling import SamplingFields, check_stream_options
from danlu.serve.openai.tools import CallDelta, Content, Piece, ToolCallParser


class TextPart(Wire):
    """The only kind of content that is read here."""

    type: Literal["text"]
    text: str


TextContent = str | Annotated[list[TextPart], Field(min_length=1)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class CalledFunction(Wire):
    name: FunctionName
    arguments: str


class ToolCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class SystemMessage(Wire):
    role: Literal["system", "developer"]
    content: TextContent
    name: str | None = None


class UserMessage(Wire):
    role: Literal["user"]
    content: TextContent
    name: str | None = None


class AssistantMessage(Wire):
    role: Literal["assistant"]
    content: TextContent | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    """Given to the chat template, which may leave it out."""
    name: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Wire):
    role: Literal["tool"]
    content: TextContent
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Wire):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Whenever it is called, its arguments follow `parameters`, whose type is object. A forced call's do, said strict or not."""


class Tool(Wire):
    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    name: FunctionName


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


OF_THE_RENDERING = {
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "sanitize_control_tokens",
}  # fmt: skip
"""Arguments of transformers' `apply_chat_template` that are no variables of a template. A client's own template would be a program that
runs in the replica (CVE-2025-62426)."""


class ChatRequest(SamplingFields):
    """The body of a chat completion."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "NAME", "messages": [{"role": "user", "content": "Hello"}]}]})

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`; as many as the model has room for if both are left out."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    """false: the first call only."""
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's: variables for the chat template, such as `enable_thinking`."""

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse_chat(body: bytes) -> ChatRequest:
    """The request in a body; RequestError names the field, the rule and what would work."""
    request = parse(ChatRequest, body)
    check_stream_options(request)
    if request.max_tokens not in (None, request.limit):
        told = f"`max_tokens` is {request.max_tokens} and `max_completion_tokens`, its newer name, {request.max_completion_tokens}"
        raise RequestError(told, param="max_tokens", fix="one of them")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("`top_logprobs` needs `logprobs`", param="top_logprobs", fix="logprobs: true")
    if reserved := sorted(OF_THE_RENDERING & set(request.chat_template_kwargs or ())):
        raise RequestError(
            f"`chat_template_kwargs.{reserved[0]}` is not a variable of a template, and not a client's to set",
            param="chat_template_kwargs",
            fix="leave it out",
        )
    names = [tool.function.name for tool in request.tools or ()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"two tools are named {twice!r}", param="tools", fix="a name of its own for each")
    for i, tool in enumerate(request.tools or ()):
        if tool.function.strict and tool.function.parameters is not None and tool.function.parameters.get("type") != "object":
            param = f"tools[{i}].function.parameters"
            raise RequestError(f"`{param}` of a strict tool is no schema of an object", param=param, fix='"type": "object"')
    if request.tool_choice not in (None, "none") and not names:
        raise RequestError("`tool_choice` is given without `tools`", param="tool_choice", fix="tools, or leave it out")
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in names:
        raise RequestError(f"there is no tool {request.tool_choice.function.name!r}", param="tool_choice", fix=f"one of {', '.join(names)}")
    return request


def conversation(request: ChatRequest) -> Chat:
    """What the engine renders. `developer` is `system` to a chat template; a call's arguments are an object, as templates expect."""
    tools = () if request.tool_choice == "none" else tuple(tool.model_dump(exclude_none=True) for tool in request.tools or ())
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)]
    return Chat(messages, tools, request.chat_template_kwargs or {})


def tool_guide(request: ChatRequest) -> Guide | None:
    """The guide that makes the model call a tool, where `tool_choice` asks for that; or that makes its calls valid, where one is strict, or
    where what is no call is a document."""
    schemas = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in request.tools or ()}
    match request.tool_choice:
        case NamedTool(function=function):
            return Guide("json_schema", json.dumps(schemas[function.name]), "tool_choice")
        case "required":
            calls = [
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, "parameters": schema},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
                for name, schema in schemas.items()
            ]
            return Guide("json_schema", json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls}), "tool_choice")
        case None | "auto" if request.tools:
            strict = [tool.function.name for tool in request.tools if tool.function.strict]
            if strict or request.asks_for_json:
                found = {name: schema if name in strict else {"type": "object"} for name, schema in schemas.items()}
                return Guide("tool_calls", json.dumps({"tools": found, "answer": None, "strict": bool(strict)}), "tools")
    return None


def tool_parser(request: ChatRequest) -> ToolCallParser | None:
    """A parser for one choice's text; None where no tool may be called."""
    if not request.tools or request.tool_choice == "none":
        return None
    forced = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
    parallel = request.parallel_tool_calls is not False
    names = [tool.function.name for tool in request.tools]
    return ToolCallParser(names, parallel=parallel, forced=forced, bare=request.tool_choice == "required" or not request.asks_for_json)


def chat_response(request: ChatRequest, head: Mapping[str, Any], answers: Sequence[Delta], usage: Usage) -> dict[str, Any]:
    """The whole answer. `head` has its id, created and model."""
    choices = [_choice(request, i, answer) for i, answer in enumerate(answers)]
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage_response(usage)}


class ChatChunks:
    """The events of a stream: `add` what came for a choice, then `usage`."""

    def __init__(self, request: ChatRequest, head: Mapping[str, Any], num_choices: int) -> None:
        self.request = request
        self.head = {**head, "object": "chat.completion.chunk"}
        self.parsers = [tool_parser(request) for _ in range(num_choices)]
        self.begun = [False] * num_choices
        # Of text that a parser holds back: they go out with the next piece.
        self.logprobs: list[tuple[TokenLogprob, ...]] = [()] * num_choices
        self.plain = [TextEvents(self._chunk(i, {"content": TextEvents.HOLE})) for i in range(num_choices)]

    def add(self, index: int, delta: Delta) -> bytes:
        if self.begun[index] and delta.text and not (delta.finish_reason or delta.logprobs or self.parsers[index]):
            return self.plain[index].event(delta.text)
        return b"".join(event(chunk) for chunk in self._chunks(index, delta))

    def usage(self, usage: Usage) -> bytes:
        return event({**self.head, "choices": [], "usage": usage_response(usage)})

    def _chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        chunks = []
        if not self.begun[index]:
            self.begun[index] = True
            chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
        self.logprobs[index] += delta.logprobs
        pieces: list[Piece] = [Content(delta.text)] if delta.text else []
        if parser := self.parsers[index]:
            pieces = parser.feed(delta.text) + (parser.end() if delta.finish_reason else [])
        chunks += [self._chunk(index, _delta(piece)) for piece in pieces]
        if delta.finish_reason:
            chunks.append(self._chunk(index, {}, _finish_reason(delta, parser)))
        elif not pieces and self.logprobs[index] and parser is None:
            chunks.append(self._chunk(index, {"content": ""}))  # a token without a whole character
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        logprobs, asked = None, self.request.logprobs and "role" not in delta
        if asked and self.logprobs[index]:
            logprobs, self.logprobs[index] = _logprobs(self.logprobs[index]), ()
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.head, "choices": [choice], **({"usage": None} if self.request.includes_usage else {})}


def _choice(request: ChatRequest, index: int, answer: Delta) -> dict[str, Any]:
    parser = tool_parser(request)
    pieces: list[Piece] = parser.feed(answer.text) + parser.end() if parser else [Content(answer.text)]
    text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls := _calls(pieces):
        message |= {"content": text.strip() or None, "tool_calls": calls}
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(answer.logprobs) if request.logprobs else None,
        "finish_reason": _finish_reason(answer, parser),
    }


def _calls(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if isinstance(piece, CallDelta):
            if piece.name is not None:
                found[piece.index] = {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
            found[piece.index]["function"]["arguments"] += piece.arguments
    return list(found.values())


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Content):
        return {"content": piece.text}
    if piece.name is None:
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"tool_calls": [{"index": piece.index, "id": piece.id, "type": "function", "function": function}]}


def _finish_reason(answer: Delta, parser: ToolCallParser | None) -> str | None:
    return "tool_calls" if answer.finish_reason == "stop" and parser and parser.num_calls else answer.finish_reason


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    def one(text: str, logprob: float | None) -> dict[str, Any]:
        # Of a piece of a character there are no bytes here, and those of the sign in its place would be a lie.
        return {"token": text, "logprob": logprob, "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())}

    entries = [one(token.text, token.logprob) | {"top_logprobs": [one(text, value) for _, text, value in token.top]} for token in tokens]
    return {"content": entries, "refusal": None}


def _message(message: Message, where: str) -> dict[str, Any]:
    if isinstance(message, SystemMessage):
        return {"role": "system", "content": _text(message.content)}
    if isinstance(message, UserMessage):
        return {"role": "user", "content": _text(message.content)}
    if isinstance(message, ToolMessage):
        named = {} if message.name is None else {"name": message.name}
        return {"role": "tool", "content": _text(message.content), "tool_call_id": message.tool_call_id, **named}
    if message.content is None and not message.tool_calls:
        raise RequestError(f"`{where}` has neither `content` nor `tool_calls`", param=where, fix='{"role": "assistant", "content": "..."}')
    found: dict[str, Any] = {"role": "assistant", "content": "" if message.content is None else _text(message.content)}
    if message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        found["tool_calls"] = [_past_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    return found


def _past_call(call: ToolCall, where: str) -> dict[str, Any]:
    param = f"{where}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        raise RequestError(f"`{param}` is not JSON: {error}", param=param, fix="the arguments as the model gave them") from error
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _text(content: TextContent) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
