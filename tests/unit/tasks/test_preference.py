"""Preference optimisation: each loss is its paper's formula on transformers' own logits, and the start model is what it is relative to."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import CAPITALS, preferences, talks, write_chat_model, write_rows
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from danlu import sdk
from danlu.compress.load import load_model
from danlu.data.pack import pack_rows
from danlu.errors import DataError, ModelError
from danlu.spec.data import Data
from danlu.spec.task import Dpo, Ipo, Kto, Orpo, Preference
from danlu.spec.train import TrainJob
from danlu.tasks import preference
from danlu.tasks.rows import Splits
from danlu.tasks.tokenizer import load_tokenizer

DPO = Preference()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


def read(rows: list[dict[str, Any]], model: Path, folder: Path, task: Preference = DPO, dev: int = 1) -> Splits:
    folder.mkdir(exist_ok=True)
    data = Data(
        train=write_rows(folder / "train.jsonl", rows), dev=write_rows(folder / "dev.jsonl", rows[:dev]), cache_dir=str(folder / "cache")
    )
    return preference.splits(data, task, load_tokenizer(model), max_length=128, seed=1)


def plain_logps(model: Path, row: dict[str, Any]) -> list[tuple[float, int]]:
    """Sum of the answers' log probabilities and their numbers of tokens, by apply_chat_template and a forward each."""
    tokenizer, plain = load_tokenizer(model), AutoModelForCausalLM.from_pretrained(model).eval()
    found = []
    for answer in (row["chosen"], row["rejected"]):
        whole = [*row["prompt"], {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        end = len(ids) - 1 - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>")) + 1
        with torch.no_grad():
            logps = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append((sum(float(logps[i - 1, ids[i]]) for i in range(len(prompt), end)), end - len(prompt)))
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("kind", [Dpo(beta=0.3), Dpo(beta=0.3, label_smoothing=0.2), Ipo(beta=0.2), Orpo(beta=0.5)])
def test_a_batchs_loss_is_the_papers_formula_on_transformers_logits(kind: Dpo | Ipo | Orpo, model: Path, tmp_path: Path) -> None:
    rows = preferences(5)
    split = read(rows, model, tmp_path).train
    reference = np.random.default_rng(0).normal(-9, 2, (5, 2)).astype(np.float32)
    module = preference.wrap(preference.build_model(model), Preference())
    assert module.packed
    found = preference.loss(module, pack_rows(split.encoded, range(5), None, reference), Preference(loss=kind))
    expected = 0.0
    for row, (ref_chosen, ref_rejected) in zip(rows, reference.tolist(), strict=True):
        (chosen, n_chosen), (rejected, n_rejected) = plain_logps(model, row)
        match kind:
            case Dpo():
                margin = kind.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
                smooth = kind.label_smoothing
                expected += -(1 - smooth) * math.log(sigmoid(margin)) - smooth * math.log(sigmoid(-margin))
            case Ipo():
                margin = (chosen - ref_chosen) / n_chosen - (rejected - ref_rejected) / n_rejected
                expected += (margin - 1 / (2 * kind.beta)) ** 2
            case Orpo():
                one, other = chosen / n_chosen, rejected / n_rejected
                odds = [math.exp(p) / (1 - math.exp(p)) for p in (one, other)]
                expected += -one - kind.beta * math.log(sigmoid(math.log(odds[0] / odds[1])))
    assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "form",
    [
        lambda row: {"prompt": row["prompt"][0]["content"], "chosen": row["chosen"], "rejected": row["rejected"]},
        lambda row: {name: [*row["prompt"], {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")},
        lambda row: {
            "input": {"messages": row["prompt"]},
            "preferred_output": [{"role": "assistant", "content": row["chosen"]}],
            "non_preferred_output": [{"role": "assistant", "content": row["rejected"]}],
        },
        lambda row: {
            "conversations": [{"from": "human", "value": row["prompt"][0]["content"]}],
            "chosen": {"from": "gpt", "value": row["chosen"]},
            "rejected": {"from": "gpt", "value": row["rejected"]},
        },
        lambda row: {"instruction": row["prompt"][0]["content"], "chosen": row["chosen"], "rejected": row["rejected"]},
    ],
    ids=["texts", "implicit prompt", "openai", "sharegpt", "alpaca"],
)
def test_every_form_of_pairs_says_the_same(form: Any, model: Path, tmp_path: Path) -> None:
    rows = preferences(3)
    plain = read(rows, model, tmp_path / "a").train
    other = read([form(row) for row in rows], model, tmp_path / "b").train
    assert other.encoded.input_ids.tolist() == plain.encoded.input_ids.tolist()
    assert other.encoded.row_labels(0).tolist() == plain.encoded.row_labels(0).tolist()
    assert other.encoded.token_types(0).tolist() == plain.encoded.token_types(0).tolist()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same"),
        ({"prompt": "x", "chosen": "y"}, "chosen or rejected is missing"),
        ({"prompt": "x", "chosen": " ", "rejected": "y"}, "an assistant turn is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "y"}, "a text or a list of messages is needed"),
    ],
)
def test_a_broken_pair_is_dropped_with_its_reason(row: dict[str, Any], reason: str, model: Path, tmp_path: Path) -> None:
    good = {"prompt": "x", "chosen": "y", "rejected": "z"}
    found = read([good, good, row], model, tmp_path)
    assert found.train.texts.row_numbers == [1, 2]
    assert any(reason in note and "the first row 3" in note for note in found.report.notes)
    with pytest.raises(DataError, match=reason):
        read([good, row, row], model, tmp_path / "b")


def job_of(model: Path, folder: Path, **overrides: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "name": "taste",
        "model": {"model_name_or_path": str(model), "max_length": 64},
        "data": {
            "train": write_rows(folder / "train.jsonl", preferences(32)),
            "test": write_rows(folder / "test.jsonl", preferences(8, 1)),
            "cache_dir": str(folder / "cache"),
        },
        "task": {"kind": "preference"},
        "optim": {"learning_rate": 5e-3},
        "precision": "fp32",
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": 12,
        "storage": str(folder / "storage"),
    }
    return TrainJob.model_validate(fields | overrides)


@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "lora", "r": 4, "init_lora_weights": "pissa"}])
def test_it_learns_to_prefer_and_its_rewards_are_relative_to_the_start_model(tuning: dict[str, Any], model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path, tuning=tuning)
    trained = sdk.train(job)
    records = trained.run.records()
    first = next(record for record in records if record["kind"] == "step")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4), "before the first step nothing is preferred beyond the start model"
    found = trained.evaluations["test"].scores.metrics()
    assert found["loss"] < first["loss"]
    assert found["reward_margin"] == pytest.approx(found["reward_chosen"] - found["reward_rejected"], abs=1e-6)
    dev = [record["metrics"] for record in records if record["kind"] == "eval" and record["is_best"]][-1]
    assert trained.evaluations["dev"].scores.metrics()["reward_margin"] == pytest.approx(dev["reward_margin"], abs=1e-3)
    if tuning["kind"] == "full":
        margins = []
        for row in preferences(8, 1):
            now, before = plain_logps(trained.bundle.path / "model", row), plain_logps(model, row)
            margins.append(0.1 * ((now[0][0] - before[0][0]) - (now[1][0] - before[1][0])))
        assert found["reward_margin"] == pytest.approx(np.mean(margins), abs=1e-3)
        assert found["reward_accuracy"] == pytest.approx(np.mean(np.asarray(margins) > 0))
    answer = sdk.predict(trained.reference, [f"What is the capital of {next(iter(CAPITALS))}?"], storage=job.storage)[0]
    assert answer.to_dict()["tokens"] >= 1


def answers(model: Path, folder: Path, **overrides: Any) -> TrainJob:
    """The job of a chat model, in the storage of `job_of`."""
    data = {"train": write_rows(folder / "talks.jsonl", talks(16)), "cache_dir": str(folder / "cache")}
    return job_of(model, folder, **{"name": "answers", "task": {"kind": "chat"}, "data": data, "max_steps": 3} | overrides)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(4, 30)[None]).logits
    return found


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_preferences_go_on_from_a_bundle_as_it_answers_and_say_whose_it_was(tuning: str, model: Path, tmp_path: Path) -> None:
    tuned = {"kind": tuning} | ({} if tuning == "full" else {"r": 4})
    before = sdk.train(answers(model, tmp_path, tuning=tuned))
    job = job_of(Path("answers@latest"), tmp_path, tuning={"kind": "lora", "r": 4}, max_steps=2)
    trained = sdk.train(job)
    lineage = trained.bundle.meta.lineage
    assert lineage.parent == before.bundle.meta.digest
    start = Path(lineage.spec["model"]["model_name_or_path"])
    assert trained.bundle.meta.base_model == str(start)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)), logits(load_model(before.bundle)), rtol=0, atol=1e-4
    )
    assert load_tokenizer(start).chat_template == load_tokenizer(model).chat_template
    first = next(record for record in trained.run.records() if record["kind"] == "step")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    if tuning == "lora":
        assert sdk.train(answers(model, tmp_path, tuning=tuned, seed=3)).reference == "answers@v2"
        again, _ = sdk.evaluate(trained.reference, storage=job.storage)
        assert again.scores.metrics() == trained.evaluations["test"].scores.metrics(), "what the alias means now is something else"


def test_what_cannot_be_trained_on_is_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    prompted = sdk.train(answers(model, tmp_path, tuning={"kind": "prompt", "num_virtual_tokens": 2}, max_steps=1))

    def refusal(name: str, **more: Any) -> ModelError:
        job = job_of(Path(name), tmp_path)
        with pytest.raises(ModelError) as raised:
            sdk.prepare(job.model_copy(update={"model": job.model.model_copy(update=more)}))
        return raised.value

    assert "stands beside the weights" in refusal(prompted.reference).problem
    assert refusal("answer@latest").fix == "did you mean answers?"
    assert "answers@ one of: v1, latest, production" in refusal("answers@v7").fix
    assert refusal(prompted.reference, revision="main").where == "model.revision"
    smaller = sdk.quantize(
        answers(model, tmp_path, compress={"quantization": {"kind": "int8"}, "max_quality_drop": 1, "min_speedup": 0.001}),
        sdk.train(answers(model, tmp_path, max_steps=1)).bundle,
    )
    assert smaller.reference is not None
    assert "cannot be trained further" in refusal(smaller.reference).problem


def test_a_resumed_run_is_still_relative_to_the_start(model: Path, tmp_path: Path) -> None:
    from danlu.tasks.task import task_file
    from danlu.train.loop import train
    from danlu.train.run import LocalRun

    class Stop(Exception):
        pass

    job = job_of(model, tmp_path, max_steps=6, checkpoint={"save_steps": 3})
    tokenizer = load_tokenizer(model)
    data = task_file(job.task).splits(job.data, job.task, tokenizer, max_length=64, seed=job.seed)

    def losses(folder: str, stop_at: int | None = None) -> list[float]:
        seen: list[float] = []

        def listen(record: Any) -> None:
            if record.kind == "step":
                seen.append(record.loss)
                if len(seen) == stop_at:
                    raise Stop

        with contextlib.suppress(Stop):
            train(job, data, model, tokenizer, LocalRun(torch.device("cpu"), listen), str(tmp_path / folder))
        return seen

    whole = losses("whole")
    losses("broken", stop_at=4)
    assert losses("broken") == pytest.approx(whole[3:], abs=1e-6)


def test_a_prompt_that_does_not_start_as_the_pretrained_model_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"compares with the pretrained model.*tuning.kind=lora, or task.loss.kind=orpo"):
        job_of(model, tmp_path, tuning={"kind": "prompt"})


# KTO: answers that are desirable or not, each by itself.


def judged(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Every second answer is a wrong capital."""
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, row in enumerate(preferences(number, seed))
    ]


@pytest.mark.parametrize("away", [-9, -60])
def test_the_kto_loss_is_the_papers_formula_on_transformers_logits(away: float, model: Path, tmp_path: Path) -> None:
    kto = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    task = Preference(loss=kto)
    rows = judged(6)
    split = read(rows, model, tmp_path, task, dev=2).train
    assert split.texts.labels == ["desirable", "undesirable"] * 3
    reference = np.random.default_rng(0).normal(away, 2, (6, 2)).astype(np.float32)
    module = preference.wrap(preference.build_model(model), task)
    found = preference.loss(module, pack_rows(split.encoded, range(6), None, reference), task)
    # Answers are paired with the prompts of rows half the file away, the first there that ask something else.
    others = []
    for i, row in enumerate(rows):
        j = next(k % 6 for k in range(i + 3, i + 9) if rows[k % 6]["prompt"] != row["prompt"])
        others.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rows[j]["completion"]})
    logps = [[total for total, _ in plain_logps(model, row)] for row in others]
    kl = max(0.0, sum(mine[1] - start[1] for mine, start in zip(logps, reference.tolist(), strict=True)) / 6)
    expected = 0.0
    for row, mine, start in zip(rows, logps, reference.tolist(), strict=True):
        ratio = mine[0] - start[0]
        if row["label"]:
            expected += 1.5 * (1 - sigmoid(0.3 * (ratio - kl)))
        else:
            expected += 0.5 * (1 - sigmoid(0.3 * (kl - ratio)))
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert (kl > 0) == (away == -60), "it is never below 0"
    outputs = np.concatenate([np.asarray(logps), np.ones((6, 2)), reference], axis=1)
    scores = preference.scores(outputs, split, (), task)
    assert scores.loss == pytest.approx(expected / 6, rel=1e-4)
    right = [(mine[0] - start[0] > kl) == row["label"] for row, mine, start in zip(rows, logps, reference.tolist(), strict=True)]
    assert scores.reward_accuracy == pytest.approx(np.mean(right))


def test_nothing_is_learned_from_the_divergence_of_kto(model: Path, tmp_path: Path) -> None:
    """Its gradient is that of the answers alone, with the divergence a number."""
    task = Preference(loss=Kto())
    split = read(judged(6), model, tmp_path, task, dev=2).train
    module = preference.wrap(preference.build_model(model), task)
    batch = pack_rows(split.encoded, range(6), None, np.full((6, 2), -30.0, dtype=np.float32))
    preference.loss(module, batch, task).backward()
    found = torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])
    module.zero_grad()
    logps, _ = preference.answers_logps(module, batch)
    with torch.no_grad():
        kl = (logps[:, 1] + 30).mean().clamp(min=0)
    signs = torch.tensor([1.0, -1.0] * 3)
    (1 - torch.sigmoid(0.1 * signs * (logps[:, 0] + 30 - kl))).sum().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize(
    "form",
    [
        lambda row: {"prompt": row["prompt"][0]["content"], "completion": row["completion"], "label": str(row["label"])},
        lambda row: {"messages": [*row["prompt"], {"role": "assistant", "content": row["completion"]}], "kto_tag": row["label"]},
        lambda row: {
            "conversations": [{"from": "human", "value": row["prompt"][0]["content"]}, {"from": "gpt", "value": row["completion"]}],
            "kto_tag": row["label"],
        },
        lambda row: {"instruction": row["prompt"][0]["content"], "output": row["completion"], "kto_tag": row["label"]},
    ],
    ids=["texts", "messages", "sharegpt", "alpaca"],
)
def test_every_form_of_judged_answers_says_the_same(form: Any, model: Path, tmp_path: Path) -> None:
    task = Preference(loss=Kto())
    plain = read(judged(4), model, tmp_path / "a", task, dev=2).train.encoded
    other = read([form(row) for row in judged(4)], model, tmp_path / "b", task, dev=2).train.encoded
    assert other.input_ids.tolist() == plain.input_ids.tolist()
    assert other.token_labels.tolist() == plain.token_labels.tolist()  # type: ignore[union-attr]
    assert other.token_type_ids.tolist() == plain.token_type_ids.tolist()  # type: ignore[union-attr]


def test_a_pair_is_two_judged_answers_and_what_is_no_judgement_is_dropped_or_refused(model: Path, tmp_path: Path) -> None:
    task = Preference(loss=Kto())
    found = read(preferences(4), model, tmp_path / "a", task, dev=2)
    assert found.train.texts.row_numbers == [1, 1, 2, 2, 3, 3, 4, 4]
    assert found.train.texts.labels == ["desirable", "undesirable"] * 4
    assert "each a desirable and an undesirable answer" in found.report.text()
    rows = [*judged(6), {"prompt": "x", "completion": "y", "label": "maybe"}]
    told = read(rows, model, tmp_path / "b", task, dev=2)
    assert any("the first row 7: the label is neither true nor false" in note for note in told.report.notes)
    with pytest.raises(DataError, match="every answer is desirable"):
        read([row | {"label": True} for row in judged(4)], model, tmp_path / "c", task)
    with pytest.raises(DataError, match="every row has the same prompt"):
        read([row | {"prompt": "x"} for row in judged(4)], model, tmp_path / "d", task)
    with pytest.raises(DataError, match="do not say which answers are desirable"):
        read([{"prompt": "x", "completion": "y"}] * 4, model, tmp_path / "e", task)


def test_kto_learns_what_is_desirable(model: Path, tmp_path: Path) -> None:
    data = {
        "train": write_rows(tmp_path / "train.jsonl", judged(48)),
        "test": write_rows(tmp_path / "test.jsonl", judged(12, 1)),
        "dev_size": 0.25,
        "cache_dir": str(tmp_path / "cache"),
    }
    trained = sdk.train(job_of(model, tmp_path, data=data, task={"kind": "preference", "loss": {"kind": "kto", "beta": 0.5}}))
    first = next(record for record in trained.run.records() if record["kind"] == "step")
    assert first["loss"] == pytest.approx(0.5, abs=1e-4), "at the start every answer is as likely as it was"
    found = trained.evaluations["test"].scores.metrics()
    assert found["loss"] < 0.5
    assert found["reward_margin"] > 0
    assert found["reward_margin"] == pytest.approx(found["reward_chosen"] - found["reward_rejected"], abs=1e-6)
    with pytest.raises(ValidationError, match=r"micro_batch_size=1 leaves task\.loss\.kind=kto one row"):
        job_of(model, tmp_path, micro_batch_size=1, task={"kind": "preference", "loss": {"kind": "kto"}})


@pytest.mark.parametrize("kind", [True, False])
def test_ktos_scores_of_rows_of_one_kind_are_numbers(kind: bool) -> None:
    """A dev split may have no undesirable row, and a bundle's scores are JSON."""
    logps = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    found = preference._kto_scores(logps, torch.zeros_like(logps), torch.full((4,), kind), Kto(beta=0.5))
    assert all(math.isfinite(number) for number in found.metrics().values())
    own, other = (found.reward_chosen, found.reward_rejected) if kind else (found.reward_rejected, found.reward_chosen)
    assert own == pytest.approx(0.5 * float(logps[:, 0].mean()))
    assert (other, found.reward_margin) == (0.0, 0.0)
