"""A language model from its job to its endpoint: what is served over HTTP is what was evaluated, and what is not is found out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from language import choices_scores, loglikelihood, preferences, talks, write_chat_model, write_choices, write_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from danlu import sdk
from danlu.artifact.bundle import Bundle
from danlu.cli import app
from danlu.errors import DataError, ModelError, QualityError, RequestError, SpecError
from danlu.evaluate.score import Delta
from danlu.serve.engine import make_engine
from danlu.serve.gateway import Gateway
from danlu.spec.files import dump
from danlu.spec.serve import Torch
from danlu.spec.train import TrainJob

Served = Callable[..., AbstractContextManager[str]]
MakeJob = Callable[..., TrainJob]
VLLM = Path(__file__).parents[3] / ".cache/bench/vllm/bin/python"
"""An environment of vLLM's CPU build, where somebody has made one."""
QUESTION: Any = [{"role": "user", "content": "What is the capital of Peru?"}]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make_job(tmp_path_factory: pytest.TempPathFactory) -> MakeJob:
    """A job of a few steps in one storage; keywords replace its fields."""
    folder = tmp_path_factory.mktemp("path")
    model = write_chat_model(folder / "model")
    rows = {
        "chat": talks(24),
        "preference": preferences(24),
        "pretrain": [{"text": f"The capital of Peru is Lima, said {i} of us. " * (1 + i % 3)} for i in range(24)],
    }
    files = {name: write_rows(folder / f"{name}.jsonl", found) for name, found in rows.items()}

    def make(name: str, kind: str = "chat", **overrides: Any) -> TrainJob:
        fields: dict[str, Any] = {
            "name": name,
            "model": {"model_name_or_path": str(model), "max_length": 64},
            "data": {"train": files[kind], "dev_size": 0.25, "cache_dir": str(folder / "cache")},
            "task": {"kind": kind},
            "precision": "fp32",
            "optim": {"learning_rate": 1e-2, "schedule": {"kind": "constant", "warmup_ratio": 0.0}},
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "max_steps": 8,
            "storage": str(folder / "storage"),
            "serve": {},
        }
        return TrainJob.model_validate(fields | overrides)

    return make


@pytest.fixture(scope="module")
def chat(make_job: MakeJob) -> tuple[sdk.Prepared, sdk.Trained]:
    """A chat model tuned by LoRA until it ends its turns."""
    job = make_job("talk", tuning={"kind": "lora", "r": 8, "lora_alpha": 32}, max_steps=40)
    prepared = sdk.prepare(job, calibrate=False)
    return prepared, sdk.train(job, prepared=prepared)


@contextmanager
def endpoint(served: Served, job: TrainJob, bundle: Bundle, **engine: Any) -> Iterator[str]:
    """The service of a job, in this process."""
    service = job.service(str(bundle.path))
    assert isinstance(service.engine, Torch)
    service = service.model_copy(update={"engine": service.engine.model_copy(update={"kv_cache_memory_gb": 0.1, **engine})})
    with served(Gateway(make_engine(service, bundle), service.name, service.limits, lambda *_, **__: None)) as url:
        yield url


def test_an_adapters_endpoint_answers_as_peft_does_and_ends_its_turns(served: Served, chat: tuple[sdk.Prepared, sdk.Trained]) -> None:
    prepared, trained = chat
    folder = trained.bundle.path / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(prepared.folder), folder).eval()
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    made = plain.generate(**prompt, do_sample=False, max_new_tokens=24, eos_token_id=end, pad_token_id=0)[0]
    made = made[prompt["input_ids"].shape[1] :].tolist()
    assert made[-1] == end, "the model has not learned to end a turn, so the test could not fail"
    with endpoint(served, prepared.job, trained.bundle) as url:
        checked = sdk.check_served(url, trained.bundle, prepared.splits.dev)
        assert "greedy answers over HTTP are the evaluation's" in checked
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(model="talk", messages=QUESTION, temperature=0).choices[0]
        assert (answer.message.content, answer.finish_reason) == (tokenizer.decode(made, skip_special_tokens=True), "stop")
        talk = CliRunner().invoke(app, ["chat", url], input="/system Be brief.\nWhat is the capital of Cuba?\n")
        assert talk.exit_code == 0, talk.output
        assert talk.stdout.strip()
        shown = sdk.exchanges(url, trained.bundle, prepared.splits.dev)
        assert len(shown) == 3
        assert all("capital" in one.question and one.truth.endswith(".") for one in shown)
        where = {"endpoint": f"{url}/v1/chat/completions", "try": f"curl {url}/v1/chat/completions -d '{{}}'"}
        sdk.report(prepared, trained, None, checked, exchanges=shown, endpoint=where)
    page = Path(trained.run.uri, "report.html").read_text(encoding="utf-8")
    for said in (
        "perplexity, dev",
        "token accuracy, dev",
        "Asked and answered",
        "curl http://",
        "&lt;|im_start|&gt;assistant",
        "⟦",
        "6 greedy answers over HTTP",
    ):
        assert said in page, said


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("chat", {"tuning": {"kind": "adapter", "bottleneck_size": 8}}),
        ("chat", {"precision": "bf16"}),
        ("preference", {}),
        ("pretrain", {"model_length": 24}),
    ],
    ids=["bottleneck", "bf16", "preference", "causal"],
)
def test_what_is_served_is_what_was_evaluated(kind: str, overrides: dict[str, Any], served: Served, make_job: MakeJob) -> None:
    length = overrides.pop("model_length", None)
    job = make_job(f"{kind}-{'-'.join(overrides) or 'full'}", kind, **overrides)
    if length is not None:  # texts that are cut into pieces
        job = job.model_copy(update={"model": job.model.model_copy(update={"max_length": length})})
    prepared = sdk.prepare(job, calibrate=False)
    trained = sdk.train(job, prepared=prepared)
    with endpoint(served, job, trained.bundle) as url:
        assert "log probabilities within" in sdk.check_served(url, trained.bundle, prepared.splits.dev)
        assert len(sdk.exchanges(url, trained.bundle, prepared.splits.dev)) == 3
        if kind == "preference":
            with pytest.raises(SpecError, match="compares with the start model"):
                sdk.examine(trained.reference, storage=job.storage, url=url)
            return
        here, there = (sdk.examine(trained.reference, storage=job.storage, url=one) for one in (None, url))
        tolerance = 3e-2 if job.precision == "bf16" else 1e-4
        for name, value in here.evaluation.scores.metrics().items():
            assert there.evaluation.scores.metrics()[name] == pytest.approx(value, rel=tolerance), name
        beside = sdk.compare(trained.reference, url, storage=job.storage)
        assert abs(beside.differences["loss"].change) < tolerance


READ = """
task: sentences
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


def test_lm_evaluation_harness_scores_an_endpoint_as_transformers_would(
    served: Served, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="an extra: pip install danlu[lm-eval]")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    job = make_job("harnessed", "pretrain", max_steps=4)
    trained = sdk.train(job, prepared=sdk.prepare(job, calibrate=False))
    folder = trained.bundle.path / "model"
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def likelihood(before: list[int], said: list[int]) -> float:
        return loglikelihood(plain, before, said)

    choose, choices = write_choices(tmp_path)
    texts = [f"The capital of Peru is Lima, said {i} of us. " * i for i in (1, 2, 9)]
    context = 48
    assert len(encoded(texts[-1])) > 2 * context, "the last is read in windows"
    (tmp_path / "read.yaml").write_text(READ.replace("ROWS", write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])))
    (tmp_path / "job.yaml").write_text(dump(job))
    with endpoint(served, job, trained.bundle, max_model_len=context) as url:
        command = ["evaluate", str(tmp_path / "job.yaml"), "--lm-eval", choose]
        command += ["--lm-eval", str(tmp_path / "read.yaml"), "--url", url, "--out", str(tmp_path / "out")]
        told = CliRunner().invoke(app, command)
        assert told.exit_code == 0, told.output
        with pytest.raises(DataError, match="has no task 'hellaswg'") as refused:
            sdk.run_harness(job, ["hellaswg"], url=url)
        assert "hellaswag" in refused.value.fix
        elsewhere = Bundle(trained.bundle.path, trained.bundle.meta.model_copy(update={"name": "another"}))
        with pytest.raises(RequestError, match="does not serve the language model 'another', but harnessed"):
            sdk.run_harness(job, ["hellaswag"], url=url, reference=elsewhere)
    found = {one["task"]: one for one in json.loads((tmp_path / "out" / "lm-eval.json").read_text())["tasks"]}
    assert (found["capitals"]["num_rows"], found["sentences"]["num_rows"], found["capitals"]["num_fewshot"]) == (len(choices), 3, 0)

    expected_of_choices = choices_scores(choices, plain, tokenizer)
    metrics = {name: one["value"] for name, one in found["capitals"]["metrics"].items()}
    assert metrics == pytest.approx(expected_of_choices, abs=1e-4)
    assert f"acc {metrics['acc']:.4f}" in told.output

    total, step = 0.0, context - 2  # a token of context stands before each window, and one more is made behind it
    for text in texts:
        ids = encoded(text)
        total += likelihood([tokenizer.eos_token_id], ids[:step])
        for begin in range(step, len(ids), step):
            piece = ids[begin : begin + step]
            total += likelihood(ids[begin + len(piece) - step - 1 : begin], piece)
    expected = -total / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["sentences"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-4)


def test_another_model_than_the_evaluated_one_is_found_out(
    served: Served, make_job: MakeJob, chat: tuple[sdk.Prepared, sdk.Trained]
) -> None:
    prepared, trained = chat
    job = make_job("other", max_steps=12)
    other = sdk.train(job, prepared=sdk.prepare(job, calibrate=False)).bundle
    named = Bundle(other.path, other.meta.model_copy(update={"name": "talk"}))
    with endpoint(served, prepared.job, trained.bundle) as url, pytest.raises(QualityError, match="the endpoint"):
        sdk.check_served(url, named, prepared.splits.dev)


def rounded(kind: str, prepared: sdk.Prepared, trained: sdk.Trained) -> tuple[TrainJob, Bundle, Delta]:
    """The job that asks for weights of a kind, the bundle that has them, and how they compare."""
    compress = {"quantization": {"kind": kind}, "max_quality_drop": 1, "min_speedup": 1e-9}
    job = TrainJob.model_validate(prepared.job.model_dump() | {"compress": compress})
    found = sdk.quantize(job, trained.bundle)
    assert found.bundle is not None
    assert "tokens a second" in found.delta.text()
    assert found.delta.compressed["loss"] != found.delta.original["loss"]
    return job, found.bundle, found.delta


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounded_weights_are_measured_stored_and_served_as_they_were_evaluated(
    kind: str, served: Served, make_job: MakeJob, chat: tuple[sdk.Prepared, sdk.Trained], tmp_path: Path
) -> None:
    prepared, trained = chat
    job, bundle, delta = rounded(kind, prepared, trained)
    assert 3 < delta.bytes_original / delta.bytes < 8
    state = load_file(bundle.path / "model" / f"model.{kind}.safetensors")
    weight, scale = (state[f"model.layers.0.mlp.up_proj.{name}"] for name in ("weight", "scale"))
    if kind == "int4":
        weight = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).to(torch.int8)
        weight = torch.where(weight > 7, weight - 16, weight)
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(prepared.folder), trained.bundle.path / "model"
    ).merge_and_unload()
    step = scale.abs().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    lost = (weight * step * scale.sign().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)) - merged.model.layers[
        0
    ].mlp.up_proj.weight
    assert float((lost.abs() / step).quantile(0.9)) <= 0.5, "most weights are the nearest step's"
    with endpoint(served, job, bundle) as url:
        assert "greedy answers over HTTP are the evaluation's" in sdk.check_served(url, bundle, prepared.splits.dev)
    shutil.copytree(bundle.path, tmp_path / "other")
    state["lm_head.scale"] *= torch.linspace(0.5, 2, len(state["lm_head.scale"]))[:, None].bfloat16().float()
    save_file(state, tmp_path / "other/model" / f"model.{kind}.safetensors")
    with pytest.raises(QualityError, match="the engine"), endpoint(served, job, Bundle(tmp_path / "other", bundle.meta)):
        pass


@pytest.mark.parametrize("kind", ["bnb_int8", "bnb_nf4"])
def test_bitsandbytes_weights_are_measured_stored_and_served_as_transformers_loads_them(
    kind: str, served: Served, chat: tuple[sdk.Prepared, sdk.Trained]
) -> None:
    pytest.importorskip("bitsandbytes")
    prepared, trained = chat
    job, bundle, delta = rounded(kind, prepared, trained)
    assert delta.bytes < delta.bytes_original
    plain = AutoModelForCausalLM.from_pretrained(bundle.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(bundle.path / "model")
    for module in plain.modules():
        if type(module).__name__ == "Linear4bit":  # their own weights, not those that a CPU's kernel packs anew
            module.support_avx512bf16_for_cpu = False
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = plain.eval().generate(**prompt, do_sample=False, max_new_tokens=24, pad_token_id=0)[0, prompt["input_ids"].shape[1] :]
    with endpoint(served, job, bundle) as url:
        assert "greedy answers over HTTP are the evaluation's" in sdk.check_served(url, bundle, prepared.splits.dev)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(model="talk", messages=QUESTION, temperature=0, max_tokens=24).choices[0]
    assert answer.message.content == tokenizer.decode(made, skip_special_tokens=True)
    first = bundle.meta.probes[0]
    changed = replace(
        bundle, meta=bundle.meta.model_copy(update={"probes": [first.model_copy(update={"logprobs": [-9.0] * len(first.logprobs)})]})
    )
    with pytest.raises(QualityError, match="a log probability of"), endpoint(served, job, changed):
        pass


PROBES: dict[str, tuple[dict[str, Any], str]] = {
    "log probabilities": ({"logprobs": [-3.0] * 16}, "a log probability of"),
    "tokens": ({"completion_token_ids": [7] * 4, "logprobs": [-0.1] * 4}, "a log probability of|would not say"),
    "conversation": ({"messages": [{"role": "user", "content": "?"}]}, "makes other tokens of the conversation"),
}


@pytest.mark.parametrize("name", PROBES)
def test_a_chat_model_whose_probes_come_out_otherwise_does_not_start(
    name: str, served: Served, chat: tuple[sdk.Prepared, sdk.Trained]
) -> None:
    prepared, trained = chat
    update, said = PROBES[name]
    first = trained.bundle.meta.probes[0]
    if name == "log probabilities":
        update = {"logprobs": update["logprobs"][: len(first.logprobs)]}
    probes = [first.model_copy(update=update)]
    changed = replace(trained.bundle, meta=trained.bundle.meta.model_copy(update={"probes": probes}))
    with pytest.raises(QualityError, match=said), endpoint(served, prepared.job, changed):
        pass


def test_probes_that_do_not_fit_are_no_check(served: Served, chat: tuple[sdk.Prepared, sdk.Trained]) -> None:
    prepared, trained = chat
    small = endpoint(served, prepared.job, trained.bundle, max_model_len=8)
    with pytest.raises(QualityError, match="none of the bundle's 6 probes fits into max_model_len=8"), small:
        pass


def test_a_chat_on_plain_texts_is_stored_and_served_too(served: Served, make_job: MakeJob) -> None:
    job = make_job("plain", max_steps=2)
    texts = make_job("texts", "pretrain").data.train
    job = job.model_copy(update={"data": job.data.model_copy(update={"train": texts})})
    prepared = sdk.prepare(job, calibrate=False)
    trained = sdk.train(job, prepared=prepared)
    assert not trained.bundle.meta.probes[0].messages
    with endpoint(served, job, trained.bundle) as url:
        sdk.check_served(url, trained.bundle, prepared.splits.dev)


def test_virtual_tokens_are_refused_with_what_answers_instead(make_job: MakeJob) -> None:
    job = make_job("virtual", tuning={"kind": "prompt", "num_virtual_tokens": 4}, max_steps=1, serve=None)
    bundle = sdk.train(job, prepared=sdk.prepare(job, calibrate=False)).bundle
    from danlu.serve.engines.torch.load import load

    with pytest.raises(ModelError, match="tuned by prompt: its virtual tokens") as refused:
        load(Torch(), bundle)
    assert "danlu predict" in refused.value.fix


@pytest.mark.soak
@pytest.mark.skipif(not VLLM.exists(), reason=f"there is no vLLM for a CPU: {VLLM} is not there")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_job_may_be_served_by_vllm(
    tuning: str, served: Served, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where merged adapters are kept
    small = {"gpu_memory_utilization": 0.05, "max_num_seqs": 16, "args": ["--enforce-eager"]}
    engine = {"kind": "vllm", "python": str(VLLM), "device": "cpu", **small}
    model = write_chat_model(tmp_path / "wide", hidden_size=256)  # vLLM's kernels have no heads of less than 64
    job = make_job(
        f"vllm-{tuning}",
        model={"model_name_or_path": str(model), "max_length": 64},
        tuning={"kind": tuning},
        optim={"learning_rate": 1e-3},
        serve={"engine": engine},
    )
    prepared = sdk.prepare(job, calibrate=False)
    bundle = sdk.train(job, prepared=prepared).bundle
    service = job.service(str(bundle.path))
    with served(Gateway(make_engine(service, bundle), service.name, service.limits, lambda *_, **__: None)) as url:
        assert "greedy answers over HTTP are the evaluation's" in sdk.check_served(url, bundle, prepared.splits.dev)


def test_the_service_of_a_chat_says_how_it_is_asked() -> None:
    from danlu.serve.app import Endpoint, _first_request

    route, body = _first_request("talk", None)
    where = Endpoint("http://a:1", "talk", route, json.dumps(body), None, None).where_to_look()
    locked = Endpoint("http://a:1", "talk", route, json.dumps(body), None, None, needs_key=True).where_to_look()
    assert '-H "authorization: Bearer $DANLU_API_KEY"' in locked["try"]
    assert where["try"].startswith('curl http://a:1/v1/chat/completions -H \'content-type: application/json\' -d \'{"model": "talk"')
