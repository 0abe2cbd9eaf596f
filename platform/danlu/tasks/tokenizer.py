"""The tokenizer of a model folder."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from danlu.errors import ModelError
from danlu.tasks.config import why

# Its progress bars and its table of new weights say what the plan has said already.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# Of what PEFT does with them, of a kernel that only the hub has, and (for each product of each step) that 8-bit products are in float16:
# nothing that who runs a job could act on.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(name).setLevel(logging.ERROR)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model folder; ModelError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a class of tokenizers makes of files that are not its own
        told = f"no tokenizer could be loaded from {folder}: {why(error)}"
        raise ModelError(told, where="model.model_name_or_path", fix="copy its tokenizer files again") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty one where there are no files: every word would be unknown.
        raise ModelError(
            f"{folder} has no tokenizer",
            where="model.model_name_or_path",
            fix="put its tokenizer.json (or vocab.txt ...) and tokenizer_config.json there",
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder} has only a slow tokenizer ({type(tokenizer).__name__})",
            where="model.model_name_or_path",
            fix="save a fast one beside it: AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)",
        )
    return tokenizer
