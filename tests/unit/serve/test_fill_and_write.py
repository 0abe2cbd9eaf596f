"""Masked language models and encoder-decoders behind HTTP: answers are transformers' own, and what cannot be answered is said."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from conftest import CHINESE, write_tiny_model
from jsonschema import Draft202012Validator
from language import translations, write_rows, write_t5
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    MarianConfig,
    MarianMTModel,
    RobertaConfig,
    RobertaForMaskedLM,
    pipeline,
)

from danlu import sdk
from danlu.artifact.bundle import Bundle, BundleMeta, Lineage, Probe
from danlu.errors import QualityError, ResourceError, SpecError
from danlu.serve.engine import make_engine
from danlu.serve.engines.encoder import BatchRecord, EncoderEngine
from danlu.serve.gateway import Gateway
from danlu.spec.serve import Encoder, EncoderDecoder, Limits
from danlu.spec.task import MaskedLm, Pretrain, Seq2Seq
from danlu.spec.train import TrainJob
from danlu.tasks.answers import Seq2SeqJudge
from danlu.tasks.exchange import BadExample, MaskedText, SourceText
from danlu.tasks.from_scratch import train_tokenizer

Served = Callable[..., AbstractContextManager[str]]
SOURCES = ["one", "six five four three two one", "two two", "three one four one five"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bundle(folder: Path, task: Pretrain | Seq2Seq, probes: list[Probe] | None = None) -> Bundle:
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    meta = BundleMeta(name="tiny", task=task, labels=[], max_length=16, precision="fp32", probes=probes or [], lineage=lineage)
    return Bundle(folder, meta)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles' folders of models with random weights, by their kind."""
    root = tmp_path_factory.mktemp("folders")
    words = AutoTokenizer.from_pretrained(write_t5(root / "t5" / "model"))
    shape: dict[str, Any] = {
        "vocab_size": len(words), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "init_std": 0.5,
        "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(1)
    t5 = AutoModelForSeq2SeqLM.from_pretrained(root / "t5" / "model")
    for weight in t5.parameters():
        torch.nn.init.normal_(weight, std=0.4)  # or it writes one word for ever
    bart = BartForConditionalGeneration(BartConfig(**shape, bos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None))
    bart.generation_config.forced_bos_token_id = 5  # as a model of many languages says which one
    marian = MarianMTModel(MarianConfig(**shape, decoder_start_token_id=0, forced_eos_token_id=None))
    marian.generation_config.bad_words_ids = [[0]]  # Marian starts with a token that it must not write
    byte_level = train_tokenizer(["wheat and corn rose", "the ship came to port"] * 9, 300, masked=True, max_length=32)
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    roberta = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(byte_level), **small, max_position_embeddings=40, pad_token_id=byte_level.pad_token_id, initializer_range=0.5
        )
    )
    write_tiny_model(root / "bert" / "model", more=CHINESE)
    config = BertConfig.from_pretrained(root / "bert" / "model", initializer_range=0.5)
    BertForMaskedLM(config).save_pretrained(root / "bert" / "model")
    for name, model, tokenizer in (("t5", t5, words), ("bart", bart, words), ("marian", marian, words), ("roberta", roberta, byte_level)):
        model.save_pretrained(root / name / "model")
        tokenizer.save_pretrained(root / name / "model")
    return {name: root / name for name in ("t5", "bart", "marian", "bert", "roberta")}


def masked(folder: Path, **settings: Any) -> EncoderEngine:
    return EncoderEngine(Encoder(**settings), bundle(folder, Pretrain(objective=MaskedLm())))


def writer(folder: Path, task: Seq2Seq | None = None, **settings: Any) -> EncoderEngine:
    return EncoderEngine(EncoderDecoder(**settings), bundle(folder, task or Seq2Seq(max_target_length=8)))


@pytest.mark.parametrize(("name", "beams"), [("t5", 1), ("bart", 3), ("marian", 2)])
def test_what_openais_client_is_written_is_what_generate_writes(
    name: str, beams: int, folders: dict[str, Path], served: Served, meter: Any
) -> None:
    task = Seq2Seq(max_target_length=8, num_beams=beams, source_prefix="summarize: ")
    plain = AutoModelForSeq2SeqLM.from_pretrained(folders[name] / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[name] / "model")
    expected, read, made = [], 0, []
    for text in [*SOURCES, "one " * 50]:  # the last is cut
        ids = tokenizer(f"summarize: {text}", truncation=True, max_length=16, return_tensors="pt")
        whole = plain.generate(**ids, num_beams=beams, max_new_tokens=8, do_sample=False)[0, 1:].tolist()
        made.append(whole[: whole.index(1) + 1] if 1 in whole else whole)
        read += ids.input_ids.shape[1]
        expected.append(tokenizer.decode(whole, skip_special_tokens=True))
    assert len(set(expected)) > 1
    gateway = Gateway(writer(folders[name], task), "tiny", Limits(), meter)
    with served(gateway) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="tiny", prompt=[*SOURCES, "one " * 50])
        cut = client.completions.create(model="tiny", prompt=SOURCES[1], max_tokens=2)
        assert [model.id for model in client.models.list()] == ["tiny"]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(5))
    assert [choice.finish_reason for choice in answer.choices] == ["stop" if ids[-1] == 1 else "length" for ids in made]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, sum(map(len, made)))
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (tokenizer.decode(made[1][:2], skip_special_tokens=True), "length")
    assert meter.sums["danlu_serve_completion_tokens"] == sum(map(len, made)) + 2
    assert meter.sums["danlu_serve_inputs"] == sum(meter.by_label["danlu_serve_sequences", how] for how in ("stop", "length")) == 6
    assert meter.sums["danlu_serve_tokens"] == read + len(tokenizer(f"summarize: {SOURCES[1]}").input_ids)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_what_fills_a_mask_is_what_transformers_pipeline_fills_in(name: str, folders: dict[str, Path], served: Served) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[name] / "model")
    fill = pipeline("fill-mask", model=AutoModelForMaskedLM.from_pretrained(folders[name] / "model").eval(), tokenizer=tokenizer)
    mask = tokenizer.mask_token
    texts = [f"wheat {mask} rose", f"the {mask} and {mask} of corn", f"小明在{mask}京", mask]
    with served(Gateway(masked(folders[name]), "tiny", Limits(), lambda *_, **__: None)) as url:
        found = httpx.post(f"{url}/v1/fill_mask", json={"model": "tiny", "input": texts, "top_k": 7}).json()
        alone = httpx.post(f"{url}/v1/fill_mask", json={"input": texts[0]}).json()
        documents = httpx.get(f"{url}/openapi.json").json()["paths"]["/v1/fill_mask"]["post"]
    body = documents["responses"]["200"]["content"]["application/json"]["schema"]
    Draft202012Validator(body).validate(found)
    for text, answer in zip(texts, found["data"], strict=True):
        theirs = fill(text, top_k=7)
        theirs = theirs if text.count(mask) > 1 else [theirs]
        for ours, expected in zip(answer["masks"], theirs, strict=True):
            assert [one["token"] for one in ours] == [one["token"] for one in expected]
            assert [one["token_str"] for one in ours] == [one["token_str"] for one in expected]
            assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in expected], abs=1e-5)
            assert [one.get("sequence") for one in ours] == [one["sequence"] if len(theirs) == 1 else None for one in expected]
    assert [one["token"] for one in alone["data"][0]["masks"][0]] == [one["token"] for one in fill(texts[0])], "five, where it is not said"
    assert found["usage"]["prompt_tokens"] == sum(len(tokenizer(text).input_ids) for text in texts)


BAD_TO_FILL: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no mask": ({"input": ["the [MASK]", "wheat"]}, 400, "input[1]", "put [MASK] where a word is to be filled in"),
    "another's mask": ({"input": "the <mask>"}, 400, "input[0]", "put [MASK]"),
    "a mask that is cut off": ({"input": "wheat " * 40 + "[MASK]"}, 400, "input[0]", "behind its first 16 tokens"),
    "too many masks": ({"input": "[MASK] " * 33}, 400, "input[0]", "the limit is 32"),
    "an empty text": ({"input": ["the [MASK]", " "]}, 400, "input[1]", "is empty"),
    "no text": ({"input": 3}, 400, "input", "not a text"),
    "another field": ({"texts": "the [MASK]"}, 400, "input", "there is no `input`"),
    "more tokens than are told": ({"input": "the [MASK]", "top_k": 21}, 400, "top_k", "1 to 20"),
    "10,000 texts": ({"input": ["the [MASK]"] * 10_000}, 413, "input", "256 at a time"),
    "another model": ({"model": "other", "input": "the [MASK]"}, 404, "model", "no model 'other'"),
}
BAD_TO_WRITE: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "an empty text": ({"prompt": ["one", ""]}, 400, "prompt[1]", "is empty"),
    "no text": ({"prompt": 3}, 400, "prompt", "valid string"),
    "no texts": ({"prompt": []}, 400, "prompt", "at least 1 item"),
    "another field": ({"input": "one"}, 400, "prompt", "you must provide `prompt`"),
    "a mistyped field": ({"prompt": "one", "max_token": 3}, 400, "max_token", "did you mean `max_tokens`?"),
    "a stream": ({"prompt": "one", "stream": True}, 400, "stream", "comes whole"),
    "drawing": ({"prompt": "one", "temperature": 0.7}, 400, "temperature", "less than or equal to 0"),
    "two answers": ({"prompt": "one", "n": 2}, 400, "n", "less than or equal to 1"),
    "more than was learned": ({"prompt": "one", "max_tokens": 9}, 400, "max_tokens", "learned to write 8 at most"),
    "10,000 texts": ({"prompt": ["one"] * 10_000}, 413, "prompt", "256 at a time"),
    "another model": ({"model": "other", "prompt": "one"}, 404, "model", "no model 'other'"),
}


@pytest.mark.parametrize("path", ["/v1/fill_mask", "/v1/completions"])
def test_what_cannot_be_answered_is_said_by_its_field_and_disturbs_no_one(path: str, folders: dict[str, Path], served: Served) -> None:
    fills = path == "/v1/fill_mask"
    engine = masked(folders["bert"]) if fills else writer(folders["t5"])
    good = {"input": "wheat [MASK] rose"} if fills else {"prompt": "one two"}
    with served(Gateway(engine, "tiny", Limits(), lambda *_, **__: None)) as url, httpx.Client(base_url=url, timeout=30) as client:
        for name, (body, status, param, told) in (BAD_TO_FILL if fills else BAD_TO_WRITE).items():
            response = client.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (status, param), (name, error)
            assert told in error["message"], name
        assert client.post(path, json=good).status_code == 200
        asked = client.get("/openapi.json").json()["paths"][path]["post"]
        (content,) = asked["requestBody"]["content"].values()
        Draft202012Validator(content["schema"]).validate(content["example"])
        assert path.removeprefix("/") in client.get("/docs").text


def test_a_request_that_cannot_be_answered_fails_no_other_of_its_batch(folders: dict[str, Path]) -> None:
    async def life() -> list[Any]:
        engine = masked(folders["bert"], batch_wait_ms=20)
        await engine.start()
        texts = ["wheat [MASK]", "no mask", "the [MASK] rose"]
        found = await asyncio.gather(*(engine.predict([MaskedText(text)]) for text in texts), return_exceptions=True)
        await engine.stop()
        return found

    first, second, third = asyncio.run(life())
    assert isinstance(second, BadExample)
    assert first[0].label
    assert third[0].label


def test_texts_that_come_together_are_written_together_and_as_they_are_alone(folders: dict[str, Path]) -> None:
    batches: list[BatchRecord] = []
    sources = [f"{one} {other}" for one in SOURCES for other in SOURCES]

    async def life() -> tuple[list[Any], list[Any]]:
        engine = writer(folders["t5"], Seq2Seq(max_target_length=6, num_beams=2), max_num_seqs=5)
        engine.on_batch = batches.append
        await engine.start()
        alone = [await engine.predict([SourceText(text)]) for text in sources[:4]]
        del batches[:]
        together = await asyncio.gather(*(engine.predict([SourceText(text)]) for text in sources))
        await engine.stop()
        return alone, together

    alone, together = asyncio.run(life())
    assert [one[0].label for one in alone] == [one[0].label for one in together[:4]]
    assert sum(batch.rows for batch in batches) == len(sources)
    assert max(batch.rows for batch in batches) == 5
    assert len(batches) <= 5


@pytest.mark.parametrize(("kind", "beams"), [("masked", 0), ("seq2seq", 1), ("seq2seq", 3)])
def test_a_model_whose_numbers_are_none_fails_every_request_and_health(kind: str, beams: int, folders: dict[str, Path]) -> None:
    """Else the search would write a token all the same."""

    async def life() -> None:
        if kind == "masked":
            engine, asked = masked(folders["bert"]), [[MaskedText("wheat [MASK]")], [MaskedText("the [MASK] rose")]]
        else:
            engine = writer(folders["t5"], Seq2Seq(max_target_length=8, num_beams=max(beams, 1)))
            asked = [[SourceText(text)] for text in SOURCES]
        await engine.start()
        assert engine.predictor is not None
        for parameter in engine.predictor.model.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        for error in await asyncio.gather(*map(engine.predict, asked), return_exceptions=True):
            assert isinstance(error, ResourceError)
            assert "no numbers" in str(error)
        with pytest.raises(ResourceError, match="no numbers"):
            engine.check_health()
        await engine.stop()

    asyncio.run(life())


def test_a_token_that_is_never_written_is_a_stuck_step_and_many_tokens_are_not(folders: dict[str, Path]) -> None:
    release, moved = threading.Event(), list[None]()

    async def life() -> None:
        engine = writer(folders["t5"], step_timeout_s=0.3)
        await engine.start()
        assert isinstance(engine.predictor, Seq2SeqJudge)
        begin = engine.predictor.on_token
        assert begin is not None

        def write(stuck_at: int) -> None:
            moved.append(None)
            begin()
            if len(moved) == stuck_at:
                release.wait(60)

        engine.predictor.on_token = lambda: write(stuck_at=0)
        (answer,) = await engine.predict([SourceText(SOURCES[1])])
        assert len(moved) == answer.prediction.num_tokens > 2, "the watch begins anew with every token"  # type: ignore[attr-defined]
        moved.clear()
        engine.predictor.on_token = lambda: write(stuck_at=3)
        for error in await asyncio.gather(*(engine.predict([SourceText(text)]) for text in SOURCES), return_exceptions=True):
            assert isinstance(error, ResourceError)
            assert "step_timeout_s=0.3" in str(error)
        with pytest.raises(ResourceError, match="step_timeout_s"):
            engine.check_health()
        await engine.stop()

    try:
        asyncio.run(life())
    finally:
        release.set()


@pytest.mark.parametrize(("kind", "precision"), [("masked", "bf16"), ("seq2seq", "fp32"), ("seq2seq", "bf16")])
def test_a_bundle_is_served_as_it_was_evaluated_from_its_file_to_its_endpoint(
    kind: str, precision: str, folders: dict[str, Path], served: Served, tmp_path: Path
) -> None:
    rows = [{"text": f"{text} rose"} for text in ("wheat", "the ship", "corn and maize") * 8] if kind == "masked" else translations(24)
    task = {"kind": "pretrain", "objective": {"kind": "masked"}} if kind == "masked" else {"kind": "seq2seq", "max_target_length": 8}
    job = TrainJob.model_validate(
        {
            "name": "walk",
            "model": {"model_name_or_path": str(folders["bert" if kind == "masked" else "t5"] / "model"), "max_length": 16},
            "data": {"train": write_rows(tmp_path / "rows.jsonl", rows), "dev_size": 0.25, "cache_dir": str(tmp_path / "cache")},
            "task": task,
            "precision": precision,
            "optim": {"learning_rate": 1e-2},
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "max_steps": 8,
            "storage": str(tmp_path / "storage"),
            "serve": {},
        }
    )
    prepared = sdk.prepare(job, calibrate=False)
    trained = sdk.train(job, prepared=prepared)
    bundle, dev = trained.bundle, prepared.splits.dev
    service = job.service(trained.reference)
    assert service.engine.kind == ("encoder" if kind == "masked" else "encoder_decoder")
    with served(Gateway(make_engine(service, bundle), "walk", service.limits, lambda *_, **__: None)) as url:
        assert "over HTTP: every" in sdk.check_served(url, bundle, dev)
        shown = sdk.exchanges(url, bundle, dev)
        assert len(shown) == 3
        assert all(one.question and one.truth for one in shown)
        if kind == "masked":
            assert all("[MASK]" in one.question for one in shown)
            with pytest.raises(SpecError, match="scores words that were not masked"):
                sdk.examine(trained.reference, storage=job.storage, url=url)
        elif precision == "fp32":  # in bf16 a near tie may fall otherwise in another batch
            found = sdk.examine(trained.reference, storage=job.storage, url=url)
            evaluated = trained.evaluations["dev"].scores.metrics()
            assert found.evaluation.scores.metrics() == {name: evaluated[name] for name in ("bleu", "chrf", "rouge1", "rouge2", "rougeL")}
            assert found.analysis.metrics["chrf"].low <= evaluated["chrf"] <= found.analysis.metrics["chrf"].high
    probe = bundle.meta.probes[0]
    moved = probe.model_copy(update={"logprobs": [one - 1.0 for one in probe.logprobs]})
    wrong = Bundle(bundle.path, bundle.meta.model_copy(update={"probes": [moved]}))
    with pytest.raises(QualityError, match="where its evaluation gave it"):
        asyncio.run(make_engine(service, wrong).start())
