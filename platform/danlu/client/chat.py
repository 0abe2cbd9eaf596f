"""`danlu chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import httpx

from danlu.client.endpoint import base_url, headers, only_model, stream_chat
from danlu.errors import RequestError, ResourceError, SpecError
from danlu.terminal import console, show

COMMANDS = "/system TEXT sets the system message, /clear begins anew, /exit ends; so does Ctrl-D"
SEEN = {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | dict.fromkeys(range(127, 160), 0xFFFD)
"""A model's control characters, as pictures of them: a terminal would obey them."""


def chat(target: str | None, url: str | None, system: str | None) -> None:
    """Ask and answer until the end. `target` is a model's name, or a URL; without a terminal, one question a line."""
    if system is not None and not _is_text(system):
        raise SpecError("these bytes are no text in this terminal's encoding", where="--system", fix="UTF-8")
    is_url = target is not None and "://" in target
    with httpx.Client(base_url=base_url(target if is_url else url), headers=headers(), timeout=httpx.Timeout(10, read=None)) as client:
        try:
            model = target if target is not None and not is_url else only_model(client)
            if console.is_terminal:
                show(f"{model} at {client.base_url}. {COMMANDS}")
            _converse(client, model, system)
        except httpx.ConnectError as error:
            raise ResourceError(
                f"nobody answers at {client.base_url}", where="url", fix="danlu serve SPEC, or the URL of a service"
            ) from error
        except httpx.TransportError as error:
            broke = f"the connection to {client.base_url} broke: {type(error).__name__}"
            raise ResourceError(broke, where="url", fix="is the service still there?") from error


def _converse(client: httpx.Client, model: str, system: str | None) -> None:
    messages: list[dict[str, str]] = []
    for line in _questions():
        if not _is_text(line):
            show("error: these bytes are no text in this terminal's encoding")
            continue
        match line.split(maxsplit=1):
            case []:
                continue
            case ["/exit" | "/quit"]:
                return
            case ["/clear"]:
                messages = []
            case ["/system"]:
                system = None
            case ["/system", text]:
                system = text
            case [word, *_] if word.startswith("/"):
                show(f"there is no {word}. {COMMANDS}")
            case _:
                first = [] if system is None else [{"role": "system", "content": system}]
                asked = [*messages, {"role": "user", "content": line}]
                answer = _answer(client, model, [*first, *asked])
                if answer is not None:
                    messages = [*asked, {"role": "assistant", "content": answer}]


def _answer(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> str | None:
    """The answer, shown as it comes; None, with the reason shown, if there is none. Ctrl-C ends it early."""
    answer = ""
    try:
        for text in stream_chat(client, model, messages):
            answer += text
            console.print(text.translate(SEEN) if console.is_terminal else text, end="", markup=False)
    except RequestError as error:
        if error.status in (401, 403, 404):
            raise
        if answer:
            show("")
        show(f"error: {error}")
        return None
    except KeyboardInterrupt:
        if not console.is_terminal:
            raise
    show("")
    return answer


def _is_text(line: str) -> bool:
    """Python keeps bytes that it cannot read as halves of surrogates, which cannot be sent."""
    return not any("\ud800" <= character <= "\udfff" for character in line)


def _questions() -> Iterator[str]:
    while True:
        try:
            line = input("> ") if console.is_terminal and sys.stdin.isatty() else input()
        except EOFError:
            return
        yield line.strip()
