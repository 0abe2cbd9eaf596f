"""`danlu run` of a chat: one YAML becomes a trained, scored, stored model on a real Ray Serve, asked over HTTP for what was evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from language import choices_scores, talks, write_chat_model, write_choices, write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from danlu import sdk, walk
from danlu.spec.files import load
from danlu.spec.train import TrainJob

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("ray_local")]


def write_spec(tmp_path: Path) -> Path:
    spec = tmp_path / "talk.yaml"
    document = {
        "kind": "train",
        "name": "talk",
        "model": {"model_name_or_path": str(write_chat_model(tmp_path / "model")), "max_length": 64},
        "data": {"train": write_rows(tmp_path / "rows.jsonl", talks(24)), "dev_size": 0.25, "cache_dir": str(tmp_path / "cache")},
        "task": {"kind": "chat"},
        "tuning": {"kind": "lora", "r": 4},
        "precision": "fp32",
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "max_steps": 6,
        "storage": str(tmp_path / "storage"),
        "serve": {"engine": {"kind": "torch", "kv_cache_memory_gb": 0.1}, "http": {"port": 0}},
    }
    spec.write_text(yaml.safe_dump(document))
    return spec


def test_a_chat_walks_from_its_yaml_to_a_checked_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write_spec(tmp_path)
    walk.run(spec, [], fresh=False, keep=False)
    output = " ".join(capsys.readouterr().out.split())
    for said in ("Scores on the dev split", "stored as talk@v1", "Serving talk@v1", "asked What is the capital", "in the row"):
        assert said in output
    assert "checked: 6 greedy answers over HTTP are the evaluation's" in output
    assert "/v1/chat/completions -H 'content-type: application/json' -d" in output
    (page,) = (tmp_path / "storage").rglob("report.html")
    assert "Asked and answered" in page.read_text(encoding="utf-8")


def test_lm_evaluation_harness_scores_a_bundle_at_an_endpoint_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="an extra: pip install danlu[lm-eval]")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    job = load(TrainJob, write_spec(tmp_path))
    trained = sdk.train(job)
    folder = trained.bundle.path / "model"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job.model.model_name_or_path), folder).eval()
    task, rows = write_choices(tmp_path)
    (found,) = sdk.run_harness(job, [task]).tasks
    expected = choices_scores(rows, plain, AutoTokenizer.from_pretrained(folder))
    assert {name: one.value for name, one in found.metrics.items()} == pytest.approx(expected, abs=1e-4)
