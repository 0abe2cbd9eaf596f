"""The torch engine: whatever is batched, chunked and cached together, each answer is the model's own; and nobody waits for ever."""

from __future__ import annotations

import asyncio
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm import FAMILIES, ask, engine, greedy, ids_of, prompts, reference, text_of, with_engine, write_adapter, write_family
from transformers import AutoTokenizer

from danlu.artifact.bundle import BundleMeta, Lineage, Probe, write_bundle
from danlu.errors import ModelError, QualityError, RequestError, ResourceError
from danlu.metrics import catalog
from danlu.serve.engine import make_engine
from danlu.serve.engines.torch import attention, forward, fused
from danlu.serve.engines.torch.attention import Batch
from danlu.serve.engines.torch.cache import Cache
from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.generation import Chat, Delta, Generation, Guide, Sampling, TextEngine
from danlu.spec.serve import Service, Torch
from danlu.spec.task import Pretrain

GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
CROWDED = {"max_num_seqs": 4, "max_num_batched_tokens": 12, "prefill_chunk_tokens": 5}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.mark.parametrize(("family", "kernels"), [*((family, "auto") for family in FAMILIES), ("qwen2", "off"), ("mistral", "off")])
def test_greedy_answers_in_a_crowd_are_those_of_generate(family: str, kernels: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path, family)
    asked = prompts(10, 60)

    async def body(made: TorchEngine) -> list[list[Delta]]:
        begun = []
        for i, prompt in enumerate(asked):
            begun.append(asyncio.create_task(ask(made, prompt, GREEDY)))
            if i % 3 == 2:  # staggered: the next ones arrive while these are on their way
                await begun[i - 2]
        return list(await asyncio.gather(*begun))

    answers = with_engine(engine(folder, kernels=kernels, **CROWDED), body)
    model = reference(folder)
    for prompt, deltas in zip(asked, answers, strict=True):
        assert ids_of(deltas) == greedy(model, prompt, 24)
        usage = deltas[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, deltas[-1].finish_reason) == (len(prompt), 24, "length")


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_in_bf16_too_the_answers_are_checked_against_the_models_own(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_family(tmp_path, family)

    async def body(made: TorchEngine) -> None:
        assert made.cache.layers[0][0].dtype == torch.bfloat16
        assert len(ids_of(await ask(made, (7, 8, 9), GREEDY))) == 24

    with_engine(engine(folder, dtype="bf16"), body)
    plain = attention.attend
    wrong = lambda layer, batch, query, *others, **more: plain(layer, batch, query.flip(0), *others, **more)  # noqa: E731
    monkeypatch.setattr(forward, "attend", wrong)
    monkeypatch.setattr(fused, "attend", wrong)
    with pytest.raises(ModelError, match="other logits than by itself"):
        asyncio.run(engine(folder, dtype="bf16", kernels="off").start())


def test_a_model_that_the_fused_forward_does_not_fit_is_answered_by_its_own_classes(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = attention.attend
    monkeypatch.setattr(fused, "attend", lambda layer, batch, query, *others, **more: plain(layer, batch, query.flip(0), *others, **more))

    async def body(made: TorchEngine) -> list[int]:
        return ids_of(await ask(made, (7, 8, 9), GREEDY))

    assert with_engine(engine(qwen3, kernels="off"), body) == greedy(reference(qwen3), (7, 8, 9), 24)
    assert "not by fused PyTorch, which gives other answers" in caplog.text


@pytest.mark.parametrize("change", [0.0, 0.1])
def test_a_bundle_is_served_only_if_its_probes_come_out_again(change: float, qwen3: Path, tmp_path: Path) -> None:
    model = reference(qwen3)
    text = "the market price 小麦"
    ids = torch.tensor([AutoTokenizer.from_pretrained(qwen3)(text)["input_ids"]])
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    probes = [Probe(text=text, loss=loss + change)]
    meta = BundleMeta(name="w", task=Pretrain(), labels=[], max_length=64, precision="fp32", probes=probes, lineage=lineage)
    shutil.copytree(qwen3, tmp_path / "model")
    service = Service(name="w", bundle="w@v1", engine=Torch(kv_cache_memory_gb=0.1))
    made = make_engine(service, write_bundle(tmp_path, meta))
    assert isinstance(made, TextEngine)

    async def life() -> list[int]:
        await made.start()
        found = ids_of([delta async for delta in made.generate(Generation("a", (7, 8, 9), GREEDY))])
        await made.stop()
        return found

    if change:
        with pytest.raises(QualityError, match="where the bundle's evaluation found"):
            asyncio.run(life())
    else:
        assert asyncio.run(life()) == greedy(model, (7, 8, 9), 24)


def test_a_text_a_chat_and_ids_are_read_alike(qwen3: Path) -> None:
    chat = Chat([{"role": "user", "content": "小麦 🌾 rose"}])

    async def body(made: TorchEngine) -> None:
        for prompt in ("the market 上涨", chat):
            ids = tuple(made.tokenize(prompt))
            assert ids_of(await ask(made, prompt, GREEDY)) == ids_of(await ask(made, ids, GREEDY))
        assert made.detokenize(made.tokenize("the market 上涨 🚢")) == "the market 上涨 🚢"
        assert made.detokenize(made.tokenize(chat)) == "<|user|>小麦 🌾 rose<eos><|assistant|>"

    with_engine(engine(qwen3), body)


def test_the_model_ends_its_text_unless_told_otherwise(qwen3: Path) -> None:
    model = reference(qwen3)

    async def body(made: TorchEngine) -> None:
        made.reader.end_ids = [greedy(model, (7, 8, 9), 6)[5]]
        deltas = await ask(made, (7, 8, 9), Sampling(max_tokens=24, temperature=0.0))
        assert deltas[-1].finish_reason == "stop"
        assert ids_of(deltas) == greedy(model, (7, 8, 9), 6)
        longer = await ask(made, (7, 8, 9), Sampling(max_tokens=24, temperature=0.0, min_tokens=10))
        assert len(ids_of(longer)) >= 10
        assert ids_of(await ask(made, (7, 8, 9), GREEDY)) == greedy(model, (7, 8, 9), 24)

    with_engine(engine(qwen3), body)


def test_what_can_never_be_answered_is_refused_at_once_and_the_rest_is_answered(qwen3: Path) -> None:
    async def body(made: TorchEngine) -> None:
        for prompt, sampling, told in (
            (tuple(range(5, 133)), GREEDY, "128 tokens of the model's context"),
            (tuple(range(5, 113)), GREEDY, "max_tokens of 20 at most"),
            ((), GREEDY, "no tokens"),
            ((5, 10**6), GREEDY, "no token 1000000"),
            ((5,), Sampling(top_p=0.0), "top_p=0.0"),
            ((5,), Sampling(logit_bias={10**6: 1.0}), "logit_bias"),
            ((5,), Sampling(stop=("",)), "stop"),
            (Chat([{"content": "no role"}], template_arguments={"messages": 3}), GREEDY, "chat template"),
        ):
            with pytest.raises(RequestError) as refused:
                await ask(made, prompt, sampling)
            assert told in str(refused.value)
        with pytest.raises(RequestError, match="no adapter 'nosuch'"):
            await ask(made, (5,), GREEDY, adapter="nosuch")
        assert len(ids_of(await ask(made, (5,), GREEDY))) == 24

    with_engine(engine(qwen3), body)


def test_a_token_that_the_tokenizer_has_and_the_model_has_not_is_refused_by_its_name(qwen3: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    added = reference(qwen3).config.vocab_size - len(tokenizer) + 1
    tokenizer.add_tokens([f"[extra_{i}]" for i in range(added)])
    tokenizer.save_pretrained(tmp_path / "model")

    async def body(made: TorchEngine) -> None:
        with pytest.raises(RequestError, match=rf"extra_{added - 1}.*the model has"):
            await ask(made, f"ab [extra_{added - 1}] c", GREEDY)
        assert len(ids_of(await ask(made, "ab", GREEDY))) == 24

    with_engine(engine(tmp_path / "model"), body)


def test_an_answer_that_nobody_reads_any_more_frees_its_slot(qwen3: Path) -> None:
    async def body(made: TorchEngine) -> None:
        hold = asyncio.Event()
        answers = [made.generate(Generation(str(i), (7, i + 5), Sampling(max_tokens=120, ignore_eos=True))) for i in range(3)]
        for answer in answers[:2]:
            await anext(answer)
        third = asyncio.create_task(anext(answers[2]))  # waits: there are two slots
        for answer in answers[:2]:
            await answer.aclose()
        await third
        await answers[2].aclose()
        hold.set()
        assert len(ids_of(await ask(made, (5,), GREEDY))) == 24
        assert made.stats()[catalog.SERVE_RUNNING] == made.stats()[catalog.SERVE_WAITING] == 0

    with_engine(engine(qwen3, max_num_seqs=2), body)


def test_a_step_that_fails_fails_every_request_and_health(qwen3: Path) -> None:
    async def life() -> None:
        made = engine(qwen3, max_num_seqs=2)
        await made.start()
        forward = made.runner.forward
        calls = 0

        def failing(batch: object, cache: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise RuntimeError("a broken kernel")
            return forward(batch, cache)  # type: ignore[arg-type]

        object.__setattr__(made.runner, "forward", failing)
        made_of = [asyncio.create_task(ask(made, (7, i + 5), GREEDY)) for i in range(5)]
        for error in await asyncio.gather(*made_of, return_exceptions=True):
            assert isinstance(error, ResourceError)
            assert "a broken kernel" in str(error)
        with pytest.raises(ResourceError, match="a broken kernel"):
            made.check_health()
        with pytest.raises(ResourceError, match="a broken kernel"):
            await ask(made, (5,), GREEDY)
        await made.stop()

    asyncio.run(life())


ASKED = {
    "greedy": GREEDY,
    "drawn": Sampling(max_tokens=24, temperature=1.0, seed=1),
    "within a nucleus": Sampling(max_tokens=24, temperature=1.0, top_p=0.5, seed=1),
    "penalized": Sampling(max_tokens=24, temperature=0.0, presence_penalty=1.0),
    "scored": Sampling(max_tokens=0, logprobs=1, prompt_logprobs=True),
}


@pytest.mark.parametrize("how", ASKED)
def test_logits_that_are_no_numbers_fail_every_request_and_health(how: str, qwen3: Path) -> None:
    """Else NaN would be a token: an answer that reads like one, and numbers that are no JSON."""

    async def life() -> None:
        made = engine(qwen3)
        await made.start()
        forward, calls = made.runner.forward, 0

        def sick(batch: object, cache: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            logits = forward(batch, cache)  # type: ignore[arg-type]
            return logits if calls < 3 and how != "scored" else logits.index_fill(1, torch.tensor([17]), torch.nan)

        object.__setattr__(made.runner, "forward", sick)
        for error in await asyncio.gather(*(ask(made, (7, i), ASKED[how]) for i in (5, 6)), return_exceptions=True):
            assert isinstance(error, ResourceError)
            assert "no numbers" in str(error)
        with pytest.raises(ResourceError, match="no numbers"):
            made.check_health()
        await made.stop()

    asyncio.run(life())


def test_a_step_that_never_ends_fails_every_request_and_health(qwen3: Path) -> None:
    release = threading.Event()

    async def life() -> None:
        made = engine(qwen3, step_timeout_s=0.3)
        await made.start()

        def stuck(batch: object, cache: object) -> torch.Tensor:
            release.wait()
            raise RuntimeError("too late")

        object.__setattr__(made.runner, "forward", stuck)
        for error in await asyncio.gather(*(ask(made, (7, i), GREEDY) for i in (5, 6)), return_exceptions=True):
            assert isinstance(error, ResourceError)
            assert "step_timeout_s=0.3" in str(error)
        with pytest.raises(ResourceError, match="step_timeout_s"):
            made.check_health()
        await made.stop()

    try:
        asyncio.run(life())
    finally:
        release.set()


def test_stopping_finishes_what_has_begun_and_takes_nothing_new(qwen3: Path) -> None:
    async def life() -> None:
        made = engine(qwen3, max_num_seqs=1)
        await made.start()
        begun = [asyncio.create_task(ask(made, (7, i + 5), GREEDY)) for i in range(3)]
        await asyncio.sleep(0)
        stopping = asyncio.create_task(made.stop())
        await asyncio.sleep(0)
        with pytest.raises(ResourceError):
            await ask(made, (5,), GREEDY)
        assert [len(ids_of(deltas)) for deltas in await asyncio.gather(*begun)] == [24] * 3
        await stopping
        with pytest.raises(ResourceError, match="not running"):
            made.check_health()

    asyncio.run(life())


def test_a_slow_reader_gets_larger_pieces_and_nothing_less(qwen3: Path) -> None:
    async def body(made: TorchEngine) -> None:
        answer = made.generate(Generation("a", (7, 8), GREEDY))
        deltas = [await anext(answer)]
        while made.stats()[catalog.SERVE_RUNNING]:
            await asyncio.sleep(0.001)
        deltas += [delta async for delta in answer]
        assert len(deltas) < 24
        assert ids_of(deltas) == greedy(reference(qwen3), (7, 8), 24)
        assert text_of(deltas) == made.detokenize([7, 8, *ids_of(deltas)])[len(made.detokenize([7, 8])) :]

    with_engine(engine(qwen3), body)


def test_a_cache_that_is_too_small_says_what_fits(qwen3: Path) -> None:
    async def life() -> None:
        with pytest.raises(ResourceError, match=r"kv_cache_memory_gb is 1e-06\n.* kv_cache_memory_gb: .* or max_model_len: "):
            await engine(qwen3, kv_cache_memory_gb=1e-6).start()
        with pytest.raises(ResourceError, match=r"kv_cache_memory_gb is 1e-09\n.* kv_cache_memory_gb: [^,]*$"):
            await engine(qwen3, kv_cache_memory_gb=1e-9).start()
        with pytest.raises(ModelError, match="128 positions"):
            await engine(qwen3, max_model_len=129).start()

    asyncio.run(life())


def test_a_common_prefix_is_read_once_and_changes_no_answer(qwen3: Path) -> None:
    shared = prompts(1, 60, seed=3)[0][:1] * 3 + tuple(range(20, 60))
    asked = [(*shared, *tail) for tail in prompts(8, 12, seed=4)]
    model = reference(qwen3)

    async def body(made: TorchEngine) -> None:
        for round_of in (asked[:1], asked[1:5], asked[5:]):
            answers = await asyncio.gather(*(ask(made, prompt, GREEDY) for prompt in round_of))
            for prompt, deltas in zip(round_of, answers, strict=True):
                assert ids_of(deltas) == greedy(model, prompt, 24)
                usage = deltas[-1].usage
                assert usage is not None
                assert (usage.cached_tokens >= len(shared)) == (round_of is not asked[:1] and prompt != asked[0])
        again = await ask(made, asked[0], GREEDY)
        assert ids_of(again) == greedy(model, asked[0], 24)
        stats = made.stats()
        assert 0 < stats[catalog.SERVE_PREFIX_HIT] < stats[catalog.SERVE_PREFIX_QUERIED]

    with_engine(engine(qwen3, max_num_seqs=4), body)


def test_several_answers_to_one_prompt_read_it_once(qwen3: Path) -> None:
    prompt = tuple(range(20, 80))

    async def body(made: TorchEngine) -> None:
        how = [replace(GREEDY, max_tokens=8, temperature=1.0, seed=seed) for seed in range(4)]
        together = await asyncio.gather(*(ask(made, prompt, one) for one in how))
        cached = [usage.cached_tokens for deltas in together if (usage := deltas[-1].usage)]
        assert cached == [0, 59, 59, 59], "all but the token whose logits are needed"
        alone = [ids_of(await ask(made, prompt, replace(one, prompt_logprobs=True))) for one in how]  # which never looks into the cache
        assert [ids_of(deltas) for deltas in together] == alone
        assert len({tuple(ids) for ids in alone}) == 4

    # In bites of ten: the others wait until the last is read.
    with_engine(engine(qwen3, prefill_chunk_tokens=10, max_num_batched_tokens=10, max_num_seqs=6), body)


def test_answers_are_the_same_with_and_without_the_prefix_cache(qwen3: Path) -> None:
    asked = [prompt * 3 for prompt in prompts(4, 8, seed=5)] * 3

    async def body(made: TorchEngine) -> list[list[int]]:
        return [ids_of(await ask(made, prompt[: 8 + i], GREEDY)) for i, prompt in enumerate(asked)]

    with_cache = with_engine(engine(qwen3, max_num_seqs=2), body)
    without = with_engine(engine(qwen3, max_num_seqs=2, enable_prefix_caching=False), body)
    assert with_cache == without


def count_steps(made: TorchEngine) -> list[None]:
    """As long as there have been steps since."""
    forward, steps = made.runner.forward, list[None]()

    def counted(batch: Batch, cache: Cache) -> torch.Tensor:
        steps.append(None)
        return forward(batch, cache)

    object.__setattr__(made.runner, "forward", counted)
    return steps


def test_guessing_ahead_saves_steps_and_changes_no_answer(qwen3: Path) -> None:
    repeating = tuple(range(20, 32)) * 3
    plain = {"max_tokens": 40, "ignore_eos": True}
    asked = [
        (repeating, Sampling(temperature=0.0, **plain)),
        (repeating, Sampling(temperature=1.0, seed=3, logprobs=2, **plain)),
        (repeating[:30], Sampling(temperature=0.7, seed=4, top_p=0.9, frequency_penalty=0.5, logit_bias={20: 4.0, 21: 4.0}, **plain)),
        ((7, 8, 9), Sampling(temperature=0.0, repetition_penalty=1.2, stop=("market", "a"), **plain)),
    ]
    # Forced to say again and again what it has said: nearly every guess is right.
    guide = Guide("regex", "(the market price ){9}")

    async def body(made: TorchEngine) -> tuple[list[list[Delta]], int, float]:
        steps = count_steps(made)
        answers = [await ask(made, *one) for one in asked * 2]  # the second time from the prefix cache
        answers += await asyncio.gather(*(ask(made, *one) for one in asked[:2]))
        answers.append(await ask(made, repeating, Sampling(max_tokens=80), guide=guide))
        stats = made.stats()
        assert stats[catalog.SERVE_DRAFTED_RIGHT] <= stats[catalog.SERVE_DRAFTED]
        return answers, len(steps), stats[catalog.SERVE_DRAFTED_RIGHT]

    plainly, steps, right = with_engine(engine(qwen3, num_speculative_tokens=0), body)
    guessing, fewer_steps, more_right = with_engine(engine(qwen3), body)
    assert ids_of(plainly[0]) == greedy(reference(qwen3), repeating, 40)
    for one, other in zip(plainly, guessing, strict=True):
        told = [[token for delta in deltas for token in delta.logprobs] for deltas in (one, other)]
        assert (ids_of(one), text_of(one), one[-1].finish_reason) == (ids_of(other), text_of(other), other[-1].finish_reason)
        assert [token.logprob for token in told[0]] == pytest.approx([token.logprob for token in told[1]], abs=1e-4)
    assert (right, more_right >= 20) == (0, True)
    assert steps - more_right <= fewer_steps <= steps - 20, "two answers at once share the steps that they save"


@pytest.fixture(scope="module")
def drafts(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By how often the model agrees with them."""
    near = write_family(tmp_path_factory.mktemp("near"), "qwen3")
    model = reference(qwen3)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(near)
    other = write_family(tmp_path_factory.mktemp("other"), "gpt2", n_layer=1, initializer_range=0.5)
    return {"always": qwen3, "often": near, "seldom": other}


@pytest.mark.parametrize(
    ("often", "least", "most", "steps_left"), [("always", 1.0, 1.0, 0.9), ("often", 0.4, 0.95, 0.95), ("seldom", 0.0, 0.3, 1.1)]
)
def test_a_draft_model_changes_no_answer_and_a_good_one_saves_steps(
    often: str, least: float, most: float, steps_left: float, qwen3: Path, drafts: dict[str, Path], tmp_path: Path
) -> None:
    lora = write_adapter(qwen3, tmp_path / "lora", seed=5, target_modules=["q_proj", "down_proj"])
    prefix = prompts(1, 80)[0]
    asked = [*prompts(5, 60), (*prefix, 9, 8), (*prefix, 7)]  # the last two begin alike

    async def body(made: TorchEngine) -> tuple[list[list[int]], list[list[int]], float, float, int]:
        steps = count_steps(made)
        gone = made.generate(Generation("gone", asked[0], GREEDY))  # someone who leaves: others get the slot
        await anext(gone)
        await gone.aclose()
        plain = await asyncio.gather(*(ask(made, prompt, GREEDY) for prompt in asked))
        right, guessed = made.stats()[catalog.SERVE_DRAFTED_RIGHT], made.stats()[catalog.SERVE_DRAFTED]
        sampled = Sampling(max_tokens=30, temperature=0.8, seed=3, ignore_eos=True)
        drawn = [await ask(made, prompt, sampled) for prompt in asked[:2]]
        drawn += await asyncio.gather(ask(made, asked[0], GREEDY), ask(made, asked[1], GREEDY, adapter="lora"))
        return [ids_of(one) for one in plain], [ids_of(one) for one in drawn], guessed, right, len(steps)

    crowded = {"max_num_seqs": 3, "max_num_batched_tokens": 24, "prefill_chunk_tokens": 16, "adapters": {"lora": str(lora)}}
    _, drawn, _, _, steps = with_engine(engine(qwen3, num_speculative_tokens=0, **crowded), body)
    made = engine(qwen3, draft_model=str(drafts[often]), **crowded)
    answers, drawn_with, guessed, right, fewer_steps = with_engine(made, body)
    model = reference(qwen3)
    assert answers == [greedy(model, prompt, 24) for prompt in asked]
    assert drawn_with == drawn
    assert least <= right / guessed <= most
    assert fewer_steps <= steps_left * steps


def test_a_draft_has_its_part_of_the_caches_memory_and_the_models_tokens(qwen3: Path, drafts: dict[str, Path], tmp_path: Path) -> None:
    async def sizes(made: TorchEngine) -> list[int]:
        caches = [made.cache, *([] if made.runner.draft is None else [made.runner.draft.cache])]
        assert len({cache.num_slots for cache in caches}) == 1
        bytes_ = sum(one.nbytes for cache in caches for layer in cache.layers.values() for one in layer)
        assert bytes_ <= 2e-3 * 2**30
        return [made.cache.num_slots, bytes_]

    (alone, _), (beside, _) = (
        with_engine(engine(qwen3, kv_cache_memory_gb=2e-3, **more), sizes) for more in ({}, {"draft_model": str(drafts["seldom"])})
    )
    assert 1 <= beside < alone
    other = write_family(tmp_path / "other", "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["wheat"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match=f"{other} has other tokens than {qwen3}, .* 'wheat' is 320 there and none here"):
        asyncio.run(engine(qwen3, draft_model=str(other)).start())
    short = write_family(tmp_path / "short", "qwen3", max_position_embeddings=64)
    with pytest.raises(ModelError, match="cannot guess: max_model_len=128 is more than the 64 positions"):
        asyncio.run(engine(qwen3, draft_model=str(short)).start())
