"""Every language task by its commands: a file of rows becomes a data report, a trained model, scores, a bundle and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from language import preferences, talks, translations, write_chat_model, write_rows, write_t5

from danlu import sdk, walk
from danlu.artifact.bundle import read_bundle

QUESTION = "What is the capital of Peru?"
TASKS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "chat": ({"kind": "chat"}, QUESTION, ["loss", "perplexity", "token accuracy"]),
    "preference": ({"kind": "preference", "loss": {"kind": "orpo"}}, QUESTION, ["reward accuracy", "reward margin"]),
    "causal": ({"kind": "pretrain"}, "the capital of", ["loss", "perplexity"]),
    "masked": ({"kind": "pretrain", "objective": {"kind": "masked"}}, "the [MASK] rose", ["loss", "token accuracy"]),
    "seq2seq": ({"kind": "seq2seq", "max_target_length": 6}, "one two", ["bleu", "chrf", "rougeL"]),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_file_becomes_predictions(
    name: str, tiny_model: Path, topic_files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, text, said = TASKS[name]
    rows = {
        "chat": talks(24),
        "preference": preferences(24),
        "causal": [{"text": f"{QUESTION} {i}"} for i in range(24)],
        "seq2seq": translations(24),
    }
    model = tiny_model if name == "masked" else (write_t5 if name == "seq2seq" else write_chat_model)(tmp_path / "model")
    file = topic_files["train"] if name == "masked" else write_rows(tmp_path / "rows.jsonl", rows[name])
    spec = tmp_path / "job.yaml"
    document = {
        "name": "path",
        "model": {"model_name_or_path": str(model), "max_length": 48},
        "data": {"train": file, "dev_size": 0.2, "cache_dir": str(tmp_path / "cache")},
        "task": task,
        "precision": "fp32",
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "max_steps": 2,
        "storage": str(tmp_path / "storage"),
    }
    spec.write_text(yaml.safe_dump(document))
    walk.train(spec, [], fresh=False)
    output = capsys.readouterr().out
    assert "rows" in output
    assert "stored as path@v1" in output
    for word in said:
        assert word in output
    if name in ("chat", "preference"):
        assert "<|im_start|>assistant" in output
        assert "⟦" in output
    walk.evaluate(spec, [], bundle=None, data=[file])
    assert said[0] in capsys.readouterr().out
    walk.predict(spec, [], [text], bundle=None)
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == text
    assert answer["tokens"] >= 1
    bundle = sdk.open_bundle("path@production", document["storage"])  # type: ignore[arg-type]
    assert read_bundle(bundle.path, verify=True).meta.probes
    assert all(probe.completion_token_ids and probe.logprobs for probe in bundle.meta.probes)
    if name in ("chat", "preference", "causal"):
        assert (bundle.path / "model" / "generation_config.json").exists()
        assert (bundle.path / "model" / "chat_template.jinja").exists()
