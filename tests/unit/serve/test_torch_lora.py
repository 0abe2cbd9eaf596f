"""Several adapters in one batch: each answer is PEFT's with that adapter, whoever stands beside it, and whatever is loaded meanwhile."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lm import ask, engine, greedy, ids_of, prompts, reference, with_engine, write_adapter, write_family
from safetensors.torch import load_file, save_file

from danlu.artifact.bundle import BundleMeta, Lineage, write_bundle
from danlu.artifact.store import Store
from danlu.errors import ModelError, RequestError, ResourceError
from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.engines.torch.lora import read_adapter
from danlu.serve.generation import Generation, Sampling
from danlu.spec.serve import Torch
from danlu.spec.task import Pretrain

GREEDY = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True)
ADAPTERS: dict[str, dict[str, Any]] = {
    "qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
    "patterned": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["gate_proj", "o_proj"],
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"o_proj": 3, r"layers\.1\..*gate_proj": 9},
    },
}


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each of the two forwards, and its adapters."""
    root = tmp_path_factory.mktemp(request.param)
    base = write_family(root / "base", request.param)
    return {"base": base} | {name: write_adapter(base, root / name, i, **config) for i, (name, config) in enumerate(ADAPTERS.items())}


def expected(folders: dict[str, Path], adapter: str | None, prompt: tuple[int, ...]) -> list[int]:
    model = reference(folders["base"])
    return greedy(model if adapter is None else peft.PeftModel.from_pretrained(model, folders[adapter]).eval(), prompt, 16)


def test_each_answer_of_a_mixed_batch_is_pefts(folders: dict[str, Path]) -> None:
    asked = [(name, prompt) for prompt in prompts(2, 30, seed=6) for name in (None, *ADAPTERS)]

    async def body(made: TorchEngine) -> None:
        for name in ADAPTERS:
            await made.load_adapter(name, str(folders[name]))
        assert made.adapters() == list(ADAPTERS)
        answers = await asyncio.gather(*(ask(made, prompt, GREEDY, adapter=name) for name, prompt in asked))
        found = [ids_of(deltas) for deltas in answers]
        assert found == [expected(folders, name, prompt) for name, prompt in asked]
        assert len({tuple(ids) for ids in found[:4]}) == 4, "the adapters do something"

    with_engine(engine(folders["base"], max_num_seqs=6, max_num_batched_tokens=20, prefill_chunk_tokens=7), body)


def test_more_adapters_than_a_words_bits_keep_apart(folders: dict[str, Path]) -> None:
    names = [f"a{i}" for i in range(67)]
    sources = {name: str(folders[list(ADAPTERS)[i // 64]]) for i, name in enumerate(names)}  # the 65th shares the first one's bit
    prompt = prompts(1, 30, seed=8)[0]

    async def body(made: TorchEngine) -> None:
        answers = await asyncio.gather(*(ask(made, prompt, GREEDY, adapter=name) for name in (names[0], names[64], names[66])))
        first, second = expected(folders, "qv", prompt), expected(folders, "all", prompt)
        assert [ids_of(deltas) for deltas in answers] == [first, second, second]

    with_engine(engine(folders["base"], max_loras=67, adapters=sources), body)


def test_adapters_come_and_go_while_others_are_answered(folders: dict[str, Path]) -> None:
    prompt = prompts(1, 30, seed=7)[0]

    async def body(made: TorchEngine) -> None:
        assert made.adapters() == ["qv"]
        long = asyncio.create_task(ask(made, prompt, Sampling(max_tokens=80, temperature=0.0, ignore_eos=True), adapter="qv"))
        await made.load_adapter("all", str(folders["all"]))
        going = asyncio.create_task(made.unload_adapter("qv"))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="no adapter 'qv'"):
            await ask(made, prompt, GREEDY, adapter="qv")
        assert ids_of(await ask(made, prompt, GREEDY, adapter="all")) == expected(folders, "all", prompt)
        await going
        assert long.done(), "sequences that use it finish first"
        assert ids_of(await long)[:16] == expected(folders, "qv", prompt)
        await made.load_adapter("qv", str(folders["patterned"]))
        assert ids_of(await ask(made, prompt, GREEDY, adapter="qv")) == expected(folders, "patterned", prompt), "not the old one's cache"

    with_engine(engine(folders["base"], adapters={"qv": str(folders["qv"])}), body)


def test_an_adapter_takes_anothers_place_while_that_one_is_used_and_only_if_it_can_be_served(folders: dict[str, Path]) -> None:
    prompt = prompts(1, 30, seed=7)[0]

    async def body(made: TorchEngine) -> None:
        with pytest.raises(ModelError, match="holds no adapter"):
            await made.load_adapter("one", "/nosuch", in_place=True)
        assert ids_of(await ask(made, prompt, GREEDY, adapter="one")) == expected(folders, "qv", prompt), "the old one is still there"
        long = asyncio.create_task(ask(made, prompt, Sampling(max_tokens=80, temperature=0.0, ignore_eos=True), adapter="one"))
        await asyncio.sleep(0.01)
        going = asyncio.create_task(made.load_adapter("one", str(folders["all"]), in_place=True))
        while not going.done():  # nobody is told that there is none meanwhile
            await ask(made, prompt, GREEDY, adapter="one")
        await going
        assert ids_of(await ask(made, prompt, GREEDY, adapter="one")) == expected(folders, "all", prompt)
        assert ids_of(await long)[:16] == expected(folders, "qv", prompt)
        await made.load_adapter("one", str(folders["qv"]), in_place=True)
        assert made.adapters() == ["one"]
        assert len(made.runner.adapters.loaded) == 1

    with_engine(engine(folders["base"], max_loras=2, adapters={"one": str(folders["qv"])}), body)


def test_the_longest_unused_adapter_makes_room_unless_all_are_in_use(folders: dict[str, Path]) -> None:
    async def body(made: TorchEngine) -> None:
        for name in ("qv", "all"):
            await made.load_adapter(name, str(folders[name]))
            await ask(made, (7, 8), GREEDY, adapter=name)
        await ask(made, (7, 8), GREEDY, adapter="qv")
        await made.load_adapter("patterned", str(folders["patterned"]))
        assert made.adapters() == ["qv", "patterned"]
        answers = [
            made.generate(Generation(name, (7, 8), Sampling(max_tokens=100, ignore_eos=True), adapter=name)) for name in made.adapters()
        ]
        for answer in answers:
            await anext(answer)
        with pytest.raises(ResourceError, match="max_loras=2 adapters are all in use"):
            await made.load_adapter("all", str(folders["all"]))
        for answer in answers:
            await answer.aclose()

    with_engine(engine(folders["base"], max_loras=2), body)


def test_an_adapter_of_the_store_is_loaded_by_its_alias(folders: dict[str, Path], tmp_path: Path) -> None:
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    meta = BundleMeta(name="qv", task=Pretrain(), labels=[], max_length=64, precision="fp32", probes=[], lineage=lineage)
    shutil.copytree(folders["qv"], tmp_path / "bundle/model")
    store = Store(str(tmp_path / "runs"))
    store.set_alias("qv", "best", store.put(write_bundle(tmp_path / "bundle", meta).path, "qv").version)
    spec = Torch(model_name_or_path=str(folders["base"]), dtype="fp32", kv_cache_memory_gb=0.1, adapters={"first": "qv@v1"})

    async def body(made: TorchEngine) -> None:
        await made.load_adapter("second", "qv@best")
        for name in ("first", "second"):
            assert ids_of(await ask(made, (7, 8, 9), GREEDY, adapter=name)) == expected(folders, "qv", (7, 8, 9))
        with pytest.raises(ModelError, match="has no 'worst'"):
            await made.load_adapter("third", "qv@worst")

    with_engine(TorchEngine(spec, storage=str(tmp_path / "runs")), body)


def test_an_adapter_is_not_put_on_top_of_what_is_merged_into_its_base(folders: dict[str, Path], tmp_path: Path) -> None:
    lineage = Lineage(spec={}, spec_digest="", data_digests={}, code_version="", library_versions={}, seed=0, created="")
    meta = BundleMeta(name="qv", task=Pretrain(), labels=[], max_length=64, precision="fp32", probes=[], lineage=lineage, weights="adapter")
    shutil.copytree(folders["qv"], tmp_path / "bundle/model")
    served = write_bundle(tmp_path / "bundle", meta.model_copy(update={"base_model": str(folders["base"])}))
    assert read_adapter(str(served.path), "qv", "runs").weights
    with pytest.raises(ModelError, match="has qv merged into that") as raised:
        read_adapter(str(served.path), "qv", "runs", served)
    assert f"engine.model_name_or_path: {folders['base']}" in raised.value.fix


def test_an_adapter_with_values_that_are_no_numbers_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """One request to it would end the engine for everybody."""
    sick = shutil.copytree(folders["qv"], tmp_path / "sick")
    weights = load_file(sick / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.inf
    save_file(weights, sick / "adapter_model.safetensors", {"format": "pt"})

    async def body(made: TorchEngine) -> None:
        with pytest.raises(ModelError, match="that are no numbers"):
            await made.load_adapter("sick", str(sick))

    with_engine(engine(folders["base"]), body)
    next(iter(weights.values()))[0, 0] = 1e6
    save_file(weights, sick / "adapter_model.safetensors", {"format": "pt"})
    assert read_adapter(str(sick), "sick", "runs", dtype=torch.bfloat16).weights
    with pytest.raises(ModelError, match=r"no numbers in torch\.float16"):
        read_adapter(str(sick), "sick", "runs", dtype=torch.float16)


def test_an_adapter_that_cannot_be_served_says_why_and_nobody_notices(folders: dict[str, Path], tmp_path: Path) -> None:
    def changed(name: str, **config: Any) -> Path:
        return write_adapter(folders["base"], tmp_path / name, 1, r=2, target_modules=["q_proj"], **config)

    other = write_family(tmp_path / "other", "llama")
    foreign = write_adapter(other, tmp_path / "foreign", 1, r=2, target_modules=["o_proj", "k_proj"])
    damaged = shutil.copytree(folders["qv"], tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"half of a fi")
    listed = shutil.copytree(folders["qv"], tmp_path / "listed")
    (listed / "adapter_config.json").write_text("[]")
    scaled = shutil.copytree(folders["qv"], tmp_path / "scaled")
    config = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": "much"}))
    refused = (
        (changed("dora", use_dora=True), "use_dora"),
        (changed("late", alora_invocation_tokens=[9]), "alora_invocation_tokens"),
        (changed("principal", init_lora_weights="pissa"), "a base whose weights that had changed"),
        (changed("orthonormal", init_lora_weights="olora"), "a base whose weights that had changed"),
        (foreign, "and the model has"),
        (tmp_path, "holds no adapter"),
        (damaged, "holds no adapter"),
        (listed, "is no object"),
        (scaled, "could not convert"),
        ("x" * 5000, "File name too long"),
        ("~nobody-of-that-name/adapter", "home directory"),
    )

    async def body(made: TorchEngine) -> None:
        for source, told in refused:
            with pytest.raises(ModelError, match=told):
                await made.load_adapter("a", str(source))
        with pytest.raises(ModelError, match="no adapter 'a'"):
            await made.unload_adapter("a")
        await made.load_adapter("a", str(folders["qv"]))
        with pytest.raises(ModelError, match="loaded already"):
            await made.load_adapter("a", str(folders["qv"]))
        assert ids_of(await ask(made, (7, 8), GREEDY)) == expected(folders, None, (7, 8))

    if "qwen3" in str(folders["base"]):
        with_engine(engine(folders["base"]), body)
