"""Which folder vLLM loads, and what the replica itself needs of it: the tokenizer, its chat template, the tokens that end a text."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from danlu.artifact.bundle import Bundle
from danlu.artifact.pretrained import model_folder
from danlu.errors import ModelError
from danlu.serve.engines.torch.requests import Reader
from danlu.spec.model import Model
from danlu.spec.task import is_decoders
from danlu.spec.tuning import Adapter, Qlora, VirtualTokens
from danlu.spec.vllm import Vllm
from danlu.tasks.config import read_config
from danlu.tasks.judge import end_ids
from danlu.tasks.tokenizer import load_tokenizer
from danlu.tasks.vocabulary import num_embeddings

MERGED = Path(".cache/danlu/merged")
"""Adapters merged into their bases, by the bundle's digest and the dtype."""


@dataclass(frozen=True)
class Files:
    """A model folder that vLLM can load, and the dtype to load it in."""

    folder: Path
    dtype: str


def find(spec: Vllm, bundle: Bundle | None) -> Files:
    """ModelError if there is no model that vLLM can serve."""
    if bundle is None:
        assert spec.model_name_or_path is not None, "the spec asks for a bundle or a model"
        return Files(model_folder(Model(model_name_or_path=spec.model_name_or_path, revision=spec.revision)), spec.dtype)
    _check_it_goes_on(bundle)
    dtype = bundle.meta.precision if spec.dtype == "auto" else spec.dtype
    return Files(_merged(bundle, dtype) if bundle.meta.weights == "adapter" else bundle.path / "model", dtype)


def make_reader(folder: Path, max_model_len: int) -> Reader:
    """Whoever reads requests: the very one of Danlu's own engine, so that a prompt is the same tokens in both."""

    tokenizer = load_tokenizer(folder)
    vocab_size = num_embeddings(read_config(folder))
    return Reader(tokenizer, vocab_size, max_model_len, sorted(end_ids([folder], tokenizer)))


def _check_it_goes_on(bundle: Bundle) -> None:
    meta = bundle.meta
    if not is_decoders(meta.task):
        problem = f"{meta.name} was trained for {meta.task.kind}: it goes on with no text"
        raise ModelError(problem, where="bundle", fix="a causal language model's bundle, or engine.kind: encoder for an encoder's task")
    if isinstance(meta.tuning, Qlora | Adapter | VirtualTokens) or meta.quantization is not None:
        how = meta.tuning.kind if meta.tuning is not None else f"quantized by {meta.quantization}"
        fix = "danlu predict answers with this one" if isinstance(meta.tuning, VirtualTokens) else "engine.kind: torch serves this one"
        raise ModelError(f"{meta.name} is {how}, which vLLM cannot serve as it was evaluated", where="bundle", fix=fix)


def _merged(bundle: Bundle, dtype: str) -> Path:
    """The adapter in its base's weights, written once; whole or not at all."""
    import torch

    from danlu.compress.load import load_model

    folder = MERGED / f"{bundle.meta.digest[:16]}-{dtype}"
    if folder.is_dir():
        return folder.resolve()
    model = load_model(bundle).to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    MERGED.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=MERGED))
    model.save_pretrained(partial)
    load_tokenizer(bundle.path / "model").save_pretrained(partial)
    defaults = bundle.path / "model" / "generation_config.json"
    if defaults.exists():
        (partial / defaults.name).write_bytes(defaults.read_bytes())
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    return folder.resolve()
