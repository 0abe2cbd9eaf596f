"""What JSON can say and a text cannot be: half a surrogate pair; and where in a document an item stands."""

from __future__ import annotations

import json
import re

HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def is_whole(text: str) -> bool:
    """False if the text holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def half_character(value: object) -> str | None:
    """A text with half of a surrogate pair, which JSON can write and no tokenizer takes."""
    if isinstance(value, str):
        return None if is_whole(value) else value[:60]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for part in inner if (found := half_character(part))), None)


def line_of_item(text: str, index: int) -> int:
    """The line that an item of a JSON list begins at."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    for number in range(index + 1):
        while text[at] in " \t\r\n,":
            at += 1
        if number < index:
            _, at = decoder.raw_decode(text, at)
    return text.count("\n", 0, at) + 1
