"""The compiled kernels of training: their answers and gradients are plain PyTorch's in double precision, within what bf16 rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from danlu.compiled import KernelsUnavailable
from danlu.tasks import fused_layer, kernels
from danlu.tasks.fused_attention import can_be_fused
from danlu.tasks.packed import PackedClassifier
from danlu.tasks.packed_attention import packed_attention
from danlu.tasks.products import Products

LENGTHS = [5, 1, 32, 77, 200, 64]


class Causal(nn.Module):
    is_causal = True


@pytest.fixture
def compiled() -> Iterator[None]:
    if isinstance(found := kernels._kernels(), KernelsUnavailable):
        pytest.skip(str(found))
    with kernels.compiled_kernels():
        yield


def drawn(heads: int, dim: int, seed: int) -> torch.Tensor:
    """As a projection leaves it: [1, heads, tokens, dim], token by token in memory."""
    made = torch.randn(1, sum(LENGTHS), heads, dim, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return made.transpose(1, 2).requires_grad_()


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int | None) -> torch.Tensor:
    """Row by row in double precision: [1, tokens, heads, dim]."""
    groups, rows = q.shape[1] // k.shape[1], []
    for its_q, its_k, its_v in zip(*(tensor.split(LENGTHS, dim=2) for tensor in (q, k, v)), strict=True):
        its_k, its_v = its_k.repeat_interleave(groups, 1), its_v.repeat_interleave(groups, 1)
        scores = its_q @ its_k.transpose(2, 3) * q.shape[-1] ** -0.5
        behind = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
        if causal:
            scores = scores.masked_fill((behind < 0) | (behind >= (window or len(behind))), -torch.inf)
        rows.append((scores.softmax(-1) @ its_v).transpose(1, 2))
    return torch.cat(rows, dim=1)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within two roundings to bf16 of the largest, and of all of it within half a rounding."""
    off = found.detach().double() - expected
    assert float(off.abs().max() / expected.abs().max()) < 2**-7
    assert float(off.norm() / expected.norm()) < 2**-8


def answers_and_gradients_are_close(
    out: torch.Tensor, given: Sequence[torch.Tensor], expected: torch.Tensor, exact: Sequence[torch.Tensor]
) -> None:
    """`out` was made of what was given, `expected` of the same in double precision."""
    close(out, expected.detach())
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    out.backward(gradient)
    expected.backward(gradient.double())
    for mine, theirs in zip(given, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        close(mine.grad, theirs.grad)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(3, 3, 32), (4, 2, 64), (6, 1, 96)])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 21), (True, 70)])
def test_attention_and_its_gradients_are_those_of_each_row_alone(
    heads: int, key_heads: int, dim: int, causal: bool, window: int | None
) -> None:
    q, k, v = drawn(heads, dim, 0), drawn(key_heads, dim, 1), drawn(key_heads, dim, 2)
    assert can_be_fused(q, k, v)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    out, _ = packed_attention(Causal() if causal else nn.Module(), q, k, v, None, cu_seqlens=starts, sliding_window=window)
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    expected = reference(*exact, causal, window)
    answers_and_gradients_are_close(out, (q, k, v), expected, exact)


@pytest.mark.usefixtures("compiled")
def test_dropout_follows_the_generator_and_its_backward_drops_the_same() -> None:
    q, k, v = drawn(2, 32, 0), drawn(2, 32, 1), drawn(2, 32, 2)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)

    def run(seed: int, value: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(seed)
        return packed_attention(nn.Module(), q, k, value, None, cu_seqlens=starts, dropout=0.25)[0]

    once, again, other = run(0, v), run(0, v), run(1, v)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    # Values of one give each query the sum of its weights that stay, over what stays on average.
    ones = torch.ones_like(v).requires_grad_()
    sums = run(0, ones).float()
    assert abs(float(sums[0, 38:].detach().mean()) - 1) < 0.02
    # Attention is linear in its values: along a change of them, its backward gives what its forward does with the change.
    change = torch.randn(v.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    gradient = torch.randn(once.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    (of_v,) = torch.autograd.grad(once, v, gradient)
    moved = run(0, change)
    torch.testing.assert_close((of_v.float() * change.float()).sum(), (moved.float() * gradient.float()).sum(), rtol=2e-2, atol=0.5)


@pytest.mark.usefixtures("compiled")
def test_dropouts_gradients_of_queries_and_keys_are_those_of_the_mask_that_was_drawn() -> None:
    """The mask is read off by attention over unit vectors, then given to PyTorch."""
    length, heads, share = 32, 2, 0.25
    starts = torch.tensor([0, length], dtype=torch.int32)
    shape = (1, length, heads, 32)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).bfloat16().transpose(1, 2).requires_grad_() for i in range(3))

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return packed_attention(nn.Module(), *tensors, None, cu_seqlens=starts, dropout=share)[0]

    unit = torch.eye(32).bfloat16().expand(1, heads, 32, 32)
    kept = run(torch.zeros_like(q).requires_grad_(), k, unit).transpose(1, 2) > 0  # [1, heads, queries, keys]
    assert 0.6 < float(kept.float().mean()) < 0.9
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    weights = (exact[0] @ exact[1].transpose(2, 3) * 32**-0.5).softmax(-1) * kept / (1 - share)
    expected, out = (weights @ exact[2]).transpose(1, 2), run(q, k, v)
    answers_and_gradients_are_close(out, (q, k, v), expected, exact)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("tokens", [1, 32, 77, 7000])
def test_products_in_tiles_are_those_of_the_weights_below_each_other(tokens: int) -> None:
    found = kernels.kernels()
    if found is None or found.products is None:
        pytest.skip("this CPU has no AMX")
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(outs, 96, generator=draw) for outs in (64, 32, 160)]
    bias, x, gradient = (torch.randn(*shape, generator=draw) for shape in ((256,), (tokens, 96), (tokens, 256)))
    x, gradient = x.bfloat16(), gradient.bfloat16()
    made = Products(found.products, found.layers)
    forward, backward = made.lay_out(weights)
    whole = torch.cat(weights).bfloat16().double()
    close(made.product(x, forward, bias), x.double() @ whole.t() + bias)
    close(made.of_input(gradient, backward), gradient.double() @ whole)
    torch.testing.assert_close(made.of_weight(gradient, x).double(), gradient.double().t() @ x.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(made.of_weight(x, gradient).double(), x.double().t() @ gradient.double(), rtol=1e-5, atol=1e-4)
    added = made.added_of_input(gradient, backward, torch.ones(tokens, 96))
    torch.testing.assert_close(added.double(), 1 + gradient.double() @ whole, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("tokens", [1, 32, 300])
def test_products_are_given_their_gelu_and_its_gradient(tiled: bool, tokens: int) -> None:
    """Also far out, where the normal distribution ends."""
    found = kernels.kernels()
    if found is None or (tiled and found.products is None):
        pytest.skip("this CPU has no AMX")
    draw = torch.Generator().manual_seed(0)
    up, down, x = (torch.randn(*shape, generator=draw) for shape in ((160, 96), (64, 160), (tokens, 96)))
    bias, gradient = torch.randn(160, generator=draw) * 8, torch.randn(tokens, 64, generator=draw).bfloat16()
    made = Products(found.products if tiled else None, found.layers)
    out, active = made.product_and_gelu(x.bfloat16(), made.lay_out([up * 0.1])[0], bias)
    close(out, x.bfloat16().double() @ (up * 0.1).bfloat16().double().t() + bias)
    at = out.double().requires_grad_()
    expected = nn.functional.gelu(at)
    close(active, expected.detach())
    of_out, sums = made.of_gelus_input(gradient, made.lay_out([down])[1], out)
    expected.backward(gradient.double() @ down.bfloat16().double())
    assert at.grad is not None
    close(of_out, at.grad)
    torch.testing.assert_close(sums.double(), of_out.double().sum(0), rtol=1e-5, atol=1e-3)


SMALL = {
    "vocab_size": 100,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 4,
}
FAMILIES = {"bert": {}, "roberta": {}, "xlm-roberta": {}, "camembert": {}, "electra": {"embedding_size": 128}}


def classifier(family: str = "bert", **changes: object) -> PackedClassifier:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | {"max_position_embeddings": 210} | FAMILIES[family] | changes)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # not the zeros and ones that they begin with
            parameter.add_(0.05 * torch.randn(parameter.shape)) if parameter.ndim == 1 else parameter.mul_(2.0)
            assert name
    return PackedClassifier(model).train()


def learned(model: PackedClassifier, *, autocast: bool = True, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and each parameter's gradient."""
    model.zero_grad()
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 100, (sum(LENGTHS),), generator=draw)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids, positions, starts)
    loss = nn.functional.cross_entropy(logits.float(), torch.arange(len(LENGTHS)) % 4)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def off(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    whole = max(float(one.norm()) for one in expected.values())
    # A key's bias has no gradient but what rounding leaves.
    return {name: float((found[name] - one).norm() / max(float(one.norm()), 1e-3 * whole)) for name, one in expected.items()}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inner", [192, 200])
def test_a_fused_layers_gradients_are_as_near_the_exact_ones_as_pytorchs(family: str, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 is no multiple of 32: PyTorch's products."""
    model = classifier(family, intermediate_size=inner)
    applied = []
    monkeypatch.setattr(fused_layer._Layer, "apply", lambda *given, apply=fused_layer._Layer.apply: applied.append(1) or apply(*given))
    loss, mine = learned(model)
    assert len(applied) == 2, "both layers"
    monkeypatch.setattr(kernels, "_used", False)
    plain_loss, plain = learned(model)
    exact_loss, exact = learned(model, autocast=False)
    assert len(applied) == 2
    assert abs(loss - exact_loss) < 2 * abs(plain_loss - exact_loss) + 2e-3
    mine_off, plain_off = off(mine, exact), off(plain, exact)
    for name in exact:
        assert mine_off[name] < 1.5 * plain_off[name] + 4e-3, name


@pytest.mark.usefixtures("compiled")
def test_a_layer_that_is_not_as_it_was_made_goes_its_own_way() -> None:
    def fused(model: PackedClassifier) -> bool:
        layer = model.model.base_model.encoder.layer[0]
        with torch.autocast("cpu", torch.bfloat16):
            return fused_layer._can_be_fused(layer, torch.zeros(1, 3, 128))

    assert fused(classifier())
    assert not fused(classifier(hidden_act="relu"))
    assert not fused(classifier(num_attention_heads=8))
    assert not fused(classifier().bfloat16())
    adapted = classifier()
    adapted.model = get_peft_model(adapted.model, LoraConfig(target_modules=["query"]))
    assert not fused_layer._can_be_fused(adapted.model.base_model.model.base_model.encoder.layer[0], torch.zeros(1, 3, 128))
    hooked = classifier()
    hooked.model.base_model.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)
    assert not fused(hooked)
    with torch.no_grad():
        assert not fused(classifier())


@pytest.mark.usefixtures("compiled")
def test_frozen_parameters_get_no_gradient_and_the_others_theirs() -> None:
    model = classifier()
    _, whole = learned(model)
    layers = model.model.base_model.encoder.layer
    for parameter in (*layers[0].attention.parameters(), layers[1].output.dense.weight, layers[1].attention.self.key.weight):
        parameter.requires_grad_(False)
    _, some = learned(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(some)
    for name, gradient in some.items():
        assert torch.equal(gradient, whole[name]), name


@pytest.mark.usefixtures("compiled")
def test_dropout_of_a_layer_is_drawn_again_by_gradient_checkpointing_and_by_a_run_that_goes_on() -> None:
    model = classifier(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
    once, again, other = learned(model), learned(model), learned(model, seed=2)
    assert once[0] == again[0] != other[0]
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in once[1].items())
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = learned(model)
    assert checkpointed[0] == once[0]
    assert all(torch.equal(gradient, checkpointed[1][name]) for name, gradient in once[1].items())


@pytest.mark.usefixtures("compiled")
def test_dropout_of_hidden_states_keeps_its_share_and_its_backward_drops_the_same() -> None:
    tokens, width, share = 300, 384, 0.3
    update = torch.ones(tokens, width).bfloat16()
    settings = {"epsilon": (1e-12, 1e-12), "dropout": [0.0, share, 0.0], "seed": [0, 11, 0]}
    found = kernels.kernels()
    assert found is not None
    weight, bias = torch.ones(width), torch.zeros(width)
    out, _, normed, scales = fused_layer._norm(found, update, torch.zeros(tokens, width), weight, bias, settings, 0)
    kept = out > 0
    assert abs(float(kept.float().mean()) - (1 - share)) < 0.01
    _, of_update, _ = fused_layer._norm_backward(found, torch.randn(tokens, width), None, normed, scales, weight, settings, 0)
    assert torch.equal(of_update != 0, kept)
