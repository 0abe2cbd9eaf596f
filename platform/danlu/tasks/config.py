"""A model folder's config.json as transformers reads it. What it makes of a broken one is told as the folder's own fault."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from danlu.errors import ModelError
from danlu.spec.tuning import Qlora, Tuning

FIELD = "model.model_name_or_path"


def read_config(folder: str | Path) -> Any:
    """The configuration of a model folder; ModelError if there is none that transformers knows."""
    try:
        return AutoConfig.from_pretrained(folder)
    except MemoryError:
        raise
    except Exception as error:  # whatever a family's class makes of the values that it is given
        raise _refusal(Path(folder) / "config.json", error) from error


def check_trainable(folder: str | Path, tuning: Tuning) -> None:
    """ModelError if the weights are of fewer bits, which only QLoRA goes on from, and only from bitsandbytes'."""
    settings = getattr(read_config(folder), "quantization_config", None)
    if settings is None:
        return
    given = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method")))
    told = f"the weights in {folder} are quantized ({method})"
    if method != "bitsandbytes":
        raise ModelError(f"{told}, and cannot be trained further", where=FIELD, fix="the model that they were made from")
    bits = 4 if given.get("load_in_4bit") else 8
    if not isinstance(tuning, Qlora):
        fix = f"the model that they were made from, or tuning: {{kind: qlora, bits: {bits}}}"
        raise ModelError(f"{told}, and tuning.kind={tuning.kind} cannot train them", where=FIELD, fix=fix)
    if tuning.bits != bits:
        raise ModelError(f"{told} in {bits} bits, and tuning.bits={tuning.bits}", where=FIELD, fix=f"tuning.bits={bits}")


def why(error: Exception) -> str:
    """A library's message in a line: its first, or two where the first only announces the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return told if isinstance(error, OSError | ValueError) and told else f"{type(error).__name__}: {told}"


def _refusal(file: Path, error: Exception) -> ModelError:
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as unread:
        return ModelError(f"{file} cannot be read: {unread}", where=FIELD, fix="copy or download the model again")
    if not isinstance(written, dict):
        return ModelError(f"{file} holds no object", where=FIELD, fix="copy or download the model again")
    kind = written.get("model_type")
    if kind is None:
        return ModelError(f"{file} has no model_type", where=FIELD, fix='"model_type": "bert" there, or what its weights are')
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
        told = f"{file}: transformers {transformers.__version__} knows no model_type {kind!r}"
        if "auto_map" in written:
            return ModelError(f"{told}, and the code that comes with a model is not run", where=FIELD, fix="a model of transformers' own")
        return ModelError(told, where=FIELD, fix=f"did you mean {near[0]!r}?" if near else "another model, or a newer transformers")
    return ModelError(f"{file} is no {kind} model's: {why(error)}", where=FIELD, fix="correct it, or copy the model again")
