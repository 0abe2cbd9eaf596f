"""The compiled kernels: each is plain PyTorch's, a step is the fused forward's, and without a compiler everything goes on."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lm import SMALL, ask, engine, greedy, ids_of, prompts, reference, with_engine, write_family
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from danlu.compiled import FLAGS, KernelsUnavailable, build
from danlu.compress.weight_only import quantize_weights
from danlu.metrics import catalog
from danlu.serve.engines.torch import kernels
from danlu.serve.engines.torch.attention import make_batch
from danlu.serve.engines.torch.cache import Cache, LayerShape
from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.engines.torch.fused import FusedForward
from danlu.serve.engines.torch.kernels import SOURCE, Kernels, LinearStruct, load_kernels
from danlu.serve.engines.torch.linear import Linear
from danlu.serve.engines.torch.lora import Adapter, Adapters
from danlu.serve.engines.torch.scheduler import Piece
from danlu.serve.engines.torch.sequence import Sequence
from danlu.serve.generation import Generation, Sampling
from danlu.spec.compress import Int4, Int8

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
SHAPES: dict[str, PretrainedConfig] = {
    "qwen3, three heads a key": Qwen3Config(**SMALL | {"num_attention_heads": 6}, head_dim=64),
    "qwen2, biases, six heads a key": Qwen2Config(**SMALL | {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 60}),
    "llama, odd sizes": LlamaConfig(**SMALL | {"intermediate_size": 70}, head_dim=24),
    "mistral, a window, a head a key": MistralConfig(**SMALL | {"num_key_value_heads": 4}, head_dim=32, sliding_window=21),
}


LESS = {"AVX512 without tiles": "-mno-amx-tile", "AVX512 without bf16": "-mno-avx512bf16", "AVX2": "-mno-avx512f", "no AVX": "-mno-avx"}
"""What older CPUs lack."""


@pytest.fixture(scope="module")
def own() -> Kernels:
    try:
        return load_kernels()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["this CPU's", *(pytest.param(name, marks=pytest.mark.soak) for name in LESS)])
def native(request: pytest.FixtureRequest, own: Kernels, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if request.param not in LESS:
        return own
    return Kernels(ctypes.CDLL(str(build(SOURCE, tmp_path_factory.mktemp("kernels"), flags=(*FLAGS, LESS[request.param])))))


def test_tiles_are_used_where_the_cpu_has_them(own: Kernels) -> None:
    assert ("AMX" in own.vectors) == torch.cpu._is_amx_tile_supported()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_pytorchs(dtype: torch.dtype, native: Kernels) -> None:
    draw = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 3, 5, 12, 13, 16, 23, 37, 70):
        for ins, outs in ((2, 1), (64, 31), (130, 32), (96, 33), (258, 200)):
            x = torch.randn(tokens, ins, generator=draw).to(dtype)
            weight, bias = torch.randn(outs, ins, generator=draw).to(dtype), torch.randn(outs, generator=draw).to(dtype)
            packed = native.pack(weight)
            struct = LinearStruct(weight=packed.data_ptr(), bias=bias.data_ptr(), outs=outs, ins=ins)
            expected = nn.functional.linear(x.double(), weight.double(), bias.double())
            # A bf16 keeps eight bits of what was rounded once.
            within = 1e-5 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(native.linear(struct, x).double(), expected, rtol=within, atol=1e-5 * ins**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 64)])
def test_a_product_with_integers_is_that_of_what_they_stand_for(bits: int, group: int, dtype: torch.dtype, native: Kernels) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((64, 1), (128, 31), (192, 32), (128, 33), (256, 200), *([(130, 40)] if bits == 8 else []))
    for tokens in (1, 2, 3, 5, 12, 13, 23, 37, 70):
        for ins, outs in shapes:
            x, bias = torch.randn(tokens, ins, generator=draw).to(dtype), torch.randn(outs, generator=draw).to(dtype)
            values = torch.randint(-8 if bits == 4 else -127, 8 if bits == 4 else 128, (outs, ins), generator=draw).to(torch.int8)
            scale = torch.rand(outs, ins // (group or ins), generator=draw).bfloat16().float() / 2**bits
            packed, scales = native.pack_integers(values, scale, bits, dtype)
            struct = LinearStruct(packed.data_ptr(), scales.data_ptr(), bits, group, bias.data_ptr(), outs, ins)
            weight = values.double() * scale.double().repeat_interleave(group or ins, dim=1)
            expected = nn.functional.linear(x.double(), weight, bias.double())
            within = 1e-5 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(native.linear(struct, x).double(), expected, rtol=within, atol=1e-5 * ins**0.5)


def check_step(config: PretrainedConfig, dtype: torch.dtype, native: Kernels, quantization: Int8 | Int4 | None = None) -> None:
    """Prompts, then tokens and small pieces of several sequences in one batch, with a gap between their slots."""
    torch.manual_seed(2)
    rounded = 5e-2 if quantization is None else 6e-2  # PyTorch rounds a product with integers before its scale and after
    forwards = {}
    for which in (native, None):
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(config).eval()
        if quantization is not None:
            model = quantize_weights(model, quantization)
        forwards[which] = FusedForward(model.to(dtype), 128, which)
    heads = forwards[None].kv_heads
    shape = LayerShape(heads, forwards[None].head_dim, forwards[None].head_dim)
    caches = {which: Cache({0: shape, 1: shape}, 5, 128, dtype=dtype, device=torch.device("cpu")) for which in forwards}
    asked = [Sequence(Generation("a", prompt), list(prompt), 1) for prompt in (*prompts(3, 60, seed=3), tuple(range(5, 105)))]
    for slot, sequence in zip((0, 1, 3, 4), asked, strict=True):
        sequence.slot = slot
    steps = [[Piece(one, 0, len(one.tokens) - 5)] for one in asked if len(one.tokens) > 5]
    steps.append([Piece(one, max(0, len(one.tokens) - 5), len(one.tokens) - 4) for one in asked if len(one.tokens) > 5])
    steps.append([Piece(one, max(0, len(one.tokens) - 4), len(one.tokens)) for one in asked])
    for pieces in steps:
        batch = make_batch(pieces, device=torch.device("cpu"), all_wanted=True)
        found, expected = (forward(batch, caches[which]).to(dtype) for which, forward in forwards.items())
        check_close(found, expected, rounded)
    for mine, theirs in zip(caches[native].layers.values(), caches[None].layers.values(), strict=True):
        for found, expected in zip(mine, theirs, strict=True):
            check_close(found, expected, rounded)


def check_close(found: torch.Tensor, expected: torch.Tensor, rounded: float) -> None:
    """Within what rounding in another order comes to, of the largest; `rounded` to bf16."""
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference < (1e-5 if found.dtype == torch.float32 else rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_step_is_the_fused_forwards(shape: str, dtype: torch.dtype, native: Kernels) -> None:
    check_step(SHAPES[shape], dtype, native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_pieces_of_long_prompts_beside_tokens_are_read_as_in_plain_pytorch(shape: str, dtype: torch.dtype, native: Kernels) -> None:
    """Positions beyond one block of keys, pieces that begin in the middle, and logits that only a prompt's last token needs. In bf16 both
    round in their own order: the kernels must be no further from the same weights' fp32 answers than PyTorch is."""
    forwards, caches = {}, {}
    for which, kernel, precision in (("native", native, dtype), ("pytorch", None, dtype), ("exact", None, torch.float32)):
        torch.manual_seed(2)
        forward = FusedForward(AutoModelForCausalLM.from_config(SHAPES[shape]).eval().to(dtype).to(precision), 640, kernel)
        kept = LayerShape(forward.kv_heads, forward.head_dim, forward.head_dim)
        forwards[which] = forward
        caches[which] = Cache({0: kept, 1: kept}, 3, 640, dtype=precision, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(4)
    rows = (torch.randint(5, 100, (length,), generator=draw).tolist() for length in (571, 9, 600))
    long, short, other = (Sequence(Generation("a", tuple(row)), row, 1) for row in rows)
    for slot, sequence in enumerate((long, short, other)):
        sequence.slot = slot
    steps = [
        [Piece(long, 0, 301)],
        [Piece(short, 0, 7), Piece(long, 301, 309), Piece(other, 0, 40)],
        [Piece(short, 7, 8), Piece(long, 309, len(long.tokens)), Piece(other, 40, 333)],
        [Piece(short, 8, len(short.tokens)), Piece(long, len(long.tokens) - 1, len(long.tokens)), Piece(other, 333, len(other.tokens))],
    ]
    made = {
        which: [forward(make_batch(pieces, device=torch.device("cpu")), caches[which]) for pieces in steps]
        for which, forward in forwards.items()
    }
    assert [len(logits) for logits in made["native"]] == [0, 0, 1, 3]
    exact = torch.cat(made["exact"])
    errors = {which: float((torch.cat(logits) - exact).abs().mean() / exact.abs().max()) for which, logits in made.items()}
    assert errors["native"] <= (1e-6 if dtype == torch.float32 else 1.25 * errors["pytorch"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [Int8(), Int4()], ids=["int8", "int4"])
@torch.inference_mode()
def test_a_step_with_integer_weights_is_the_fused_forwards(quantization: Int8 | Int4, dtype: torch.dtype, native: Kernels) -> None:
    for shape in ("qwen3, three heads a key", "llama, odd sizes"):
        check_step(SHAPES[shape], dtype, native, quantization)


@pytest.mark.usefixtures("own")
def lora(linears: list[Linear], rank: int, names: tuple[str, ...], draw: torch.Generator, dtype: torch.dtype) -> Adapter:
    """Of the layers whose names end so; one of them has a rank of its own."""
    parts = [(part, linear.shape[1]) for linear in linears for part in linear.parts if part.name.endswith(names)]
    weights = {}
    for i, (part, ins) in enumerate(parts):
        own = rank + 3 * (i == 1)
        down, up = torch.randn(own, ins, generator=draw) / ins**0.5, torch.randn(part.stop - part.start, own, generator=draw) / 8
        weights[part.name] = down.to(dtype), up.to(dtype)
    return Adapter(weights)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"all": (4, ALL), "wide": (40, ALL), "none asks for it": (16, ALL), "some": (16, ("k_proj", "up_proj", "o_proj"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_step_with_adapters_is_the_fused_forwards(shape: str, dtype: torch.dtype, native: Kernels) -> None:
    """Prompts of which one token is wanted, single tokens, and few of them; an adapter that overflows is nobody else's affair."""
    forwards, adapters, caches = {}, {}, {}
    for which in (native, None):
        torch.manual_seed(2)
        forwards[which] = forward = FusedForward(AutoModelForCausalLM.from_config(SHAPES[shape]).eval().to(dtype), 128, which)
        adapters[which] = own = Adapters(forward.linears, max_loras=8, dtype=dtype, device=torch.device("cpu"))
        draw = torch.Generator().manual_seed(7)
        for name, (rank, layers) in ADAPTERS.items():
            own.add((name, 0), lora(forward.linears, rank, layers, draw, dtype), set())
        heads = LayerShape(forward.kv_heads, forward.head_dim, forward.head_dim)
        caches[which] = Cache({0: heads, 1: heads}, 7, 128, dtype=dtype, device=torch.device("cpu"))
    owners = [("all", 0), None, ("wide", 0), ("some", 0), None, ("wide", 0), ("all", 0)]
    lengths = (13, 100, 17, 60, 25, 90, 33)
    texts = [torch.randint(5, 300, (length,), generator=draw).tolist() for length in lengths]
    asked = [Sequence(Generation("a", tuple(text)), text, 1, key=key) for text, key in zip(texts, owners, strict=True)]
    for slot, one in enumerate(asked):
        one.slot = slot

    def step(pieces: list[Piece], *, all_wanted: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        batch = make_batch(pieces, device=torch.device("cpu"), all_wanted=all_wanted)
        logits = {}
        for which, forward in forwards.items():
            adapters[which].begin([(piece.sequence.key, piece.num_tokens) for piece in pieces])
            logits[which] = forward(batch, caches[which]).to(dtype)
        return logits[native], logits[None]

    last = [Piece(one, len(one.tokens) - 1, len(one.tokens)) for one in asked]
    prompts_of = [Piece(one, 0, len(one.tokens)) for one in asked]
    for pieces in ([prompts_of[0]], prompts_of[1:3], prompts_of[3:], last, last[:2], [last[2]]):
        check_close(*step(pieces), 8e-2)  # PyTorch rounds a product before the adapters add to it, and after
    before, _ = step([Piece(one, 9, 10) for one in asked], all_wanted=True)
    for own in adapters.values():
        down, up = own.loaded[("some", 0)].weights[own.linears[0].parts[1].name]
        down.fill_(3e38)
        up.fill_(3e38)
        own.remove(("none asks for it", 0))
    after = step([Piece(one, 9, 10) for one in asked], all_wanted=True)
    for found in after:
        assert found.isfinite().all(dim=1).tolist() == [key != ("some", 0) for key in owners]
    others = [i for i, key in enumerate(owners) if key != ("some", 0)]
    check_close(after[0][others], before[others], 1e-2)


def test_the_engine_says_who_runs_its_steps(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "llama")

    async def tier(made: TorchEngine) -> tuple[float, list[int]]:
        return made.stats()[catalog.SERVE_KERNELS], ids_of(await ask(made, (7, 8, 9), GREEDY))

    assert with_engine(engine(folder), tier) == (1, greedy(reference(folder), (7, 8, 9), 12))
    assert with_engine(engine(folder, kernels="off"), tier) == (0, greedy(reference(folder), (7, 8, 9), 12))


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A process that has not looked for kernels yet, and a cache with none."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    kernels._found.cache_clear()
    yield monkeypatch
    kernels._found.cache_clear()


@pytest.mark.parametrize(("compiler", "told"), [("nosuch-g++", "there is no C++ compiler"), ("false", "false cannot build them")])
def test_without_a_compiler_that_works_pytorch_answers_and_the_log_says_so(
    compiler: str, told: str, tmp_path: Path, afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_family(tmp_path, "llama")
    afresh.setenv("CXX", compiler)

    async def tier(made: TorchEngine) -> tuple[float, list[int]]:
        return made.stats()[catalog.SERVE_KERNELS], ids_of(await ask(made, (7, 8, 9), GREEDY))

    with caplog.at_level(logging.WARNING):
        assert with_engine(engine(folder), tier) == (0, greedy(reference(folder), (7, 8, 9), 12))
    assert told in caplog.text
    assert not list((tmp_path / "cache").rglob("*.so"))
