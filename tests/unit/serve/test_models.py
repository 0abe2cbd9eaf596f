"""A service whose model is not there, or not whole, is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm import reference, write_family

from danlu import sdk
from danlu.errors import ModelError
from danlu.serve.models import check_models
from danlu.spec.serve import Service


def service(**engine: str) -> Service:
    return Service.model_validate({"kind": "service", "name": "tiny", "engine": {"kind": "torch", **engine}})


@pytest.mark.parametrize("field", ["model_name_or_path", "draft_model"])
def test_a_service_without_its_model_is_refused_before_anything_starts(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.serve.app.run", lambda *_: pytest.fail("it started"))
    whole, sharded = write_family(tmp_path / "whole", "qwen3"), write_family(tmp_path / "sharded", "qwen3")
    reference(sharded).save_pretrained(sharded, max_shard_size="50KB")
    (sharded / "model.safetensors").unlink(missing_ok=True)
    next(iter(sharded.glob("model-*.safetensors"))).unlink()
    for folder, why in ((tmp_path / "nosuch", "does not exist"), (sharded, "is not a whole safetensors file")):
        asked = service(**{"model_name_or_path": str(whole)} | {field: str(folder)})
        with pytest.raises(ModelError, match=why) as raised, sdk.serving(asked):
            pass
        assert raised.value.where == f"engine.{field}"


def test_what_has_to_be_downloaded_is_left_to_the_replicas(tmp_path: Path) -> None:
    whole = write_family(tmp_path / "whole", "qwen3")
    check_models(service(model_name_or_path=str(whole), draft_model="some-org/some-model"))
    check_models(service(model_name_or_path="s3://bucket/model"))
