"""Danlu (丹炉): fine-tune open language models and serve what was evaluated."""

__version__ = "0.1.0"
