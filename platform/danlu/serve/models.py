"""The model folders that a service names, looked at before anything starts."""

from __future__ import annotations

from pathlib import Path

from danlu.artifact.pretrained import model_folder
from danlu.errors import ModelError
from danlu.spec.model import Model
from danlu.spec.serve import Service, Torch
from danlu.spec.vllm import Vllm


def check_models(service: Service) -> None:
    """ModelError if a folder that is to be served, or to guess, holds no whole model. Reads only headers of files; what has to be
    downloaded is left to the replicas."""
    engine = service.engine
    if not isinstance(engine, Torch | Vllm):
        return
    named = {"model_name_or_path": engine.model_name_or_path, "draft_model": engine.draft_model if isinstance(engine, Torch) else None}
    for field, name in named.items():
        if name is None or not _is_here(name):
            continue
        try:
            model_folder(Model(model_name_or_path=name))
        except ModelError as error:
            raise ModelError(error.problem, where=f"engine.{field}", fix=error.fix) from error


def _is_here(name: str) -> bool:
    kind, scheme, _ = name.partition("://")
    if scheme:
        return kind in ("file", "pkg")
    return not Model(model_name_or_path=name).is_hub_id or Path(name).expanduser().exists()
