"""Texts in a terminal's cells: a Chinese character takes two of them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len, set_cell_size


def widest(texts: Iterable[str]) -> int:
    """Cells of the widest; 0 if there is none."""
    return max(map(cell_len, texts), default=0)


def left(text: str, width: int) -> str:
    """The text with blanks behind it; what has no room is cut off."""
    return set_cell_size(text, width)


def right(text: str, width: int) -> str:
    """The text with blanks before it; what has no room is cut off."""
    blanks = " " * (width - cell_len(text))
    return blanks + text if blanks else set_cell_size(text, width)
