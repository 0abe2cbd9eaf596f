"""Texts in a terminal's cells: a Chinese character takes two of them (https://www.unicode.org/reports/tr11/)."""

from __future__ import annotations

from collections.abc import Iterable
from unicodedata import combining, east_asian_width


def num_cells(text: str) -> int:
    """How wide a terminal shows it."""
    return sum(0 if combining(sign) else 2 if east_asian_width(sign) in "WF" else 1 for sign in text)


def widest(texts: Iterable[str]) -> int:
    """Cells of the widest; 0 if there is none."""
    return max(map(num_cells, texts), default=0)


def left(text: str, width: int) -> str:
    """The text with blanks behind it."""
    return text + " " * (width - num_cells(text))


def right(text: str, width: int) -> str:
    """The text with blanks before it; what has no room is cut off."""
    while num_cells(text) > width:
        text = text[:-1]
    return " " * (width - num_cells(text)) + text
