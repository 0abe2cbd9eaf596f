import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from danlu.compress import int8
from danlu.compress.int8 import Int8Linear, load_int8, onednn_is_exact, quantize_int8, quantize_rows
from danlu.errors import ModelError

SHAPES = [(48, 40), (384, 1536), (1536, 384), (101, 7)]


@pytest.fixture(params=[True, False], ids=["onednn", "fallback"])
def backend(request, monkeypatch):
    if request.param and not onednn_is_exact():
        pytest.skip("this CPU's oneDNN is not exact")
    monkeypatch.setattr(int8, "onednn_is_exact", lambda: request.param)
    monkeypatch.setattr(int8, "_has_row_quantizer", lambda: request.param)


def linear(in_features, out_features, bias=True):
    torch.manual_seed(in_features + out_features)
    return nn.Linear(in_features, out_features, bias=bias)


def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def ids(rows=2):
    return torch.randint(1, 100, (rows, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_a_row_alone_gives_the_bits_it_gives_in_any_batch(in_features, out_features):
    layer = Int8Linear.from_linear(linear(in_features, out_features))
    x = torch.randn(1100, in_features)
    x[3] *= 1e4  # a neighbour that would ruin a scale shared by the batch
    together = layer(x)
    for row in (0, 2, 3, 4, 511, 512, 1099):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    for start, stop in ((0, 2), (1, 8), (5, 38), (500, 1013)):
        assert torch.equal(layer(x[start:stop]), together[start:stop])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("extreme", [False, True])
def test_the_sums_are_those_of_integers(in_features, out_features, extreme):
    layer = Int8Linear(in_features, out_features)
    generator = torch.Generator().manual_seed(0)
    layer.weight = torch.randint(-63, 64, (out_features, in_features), generator=generator).to(torch.int8)
    x = torch.randint(0, 256, (70, in_features), generator=generator).float()
    if extreme:  # what saturates int16 where a CPU adds two products in it
        layer.weight[::2], layer.weight[1::2] = 63, -63
        x[:, 1:] = 255.0
    x[:, 0], x[:, 1] = 0.0, 255.0  # so that every row's steps are its values
    expected = x.long() @ layer.weight.long().t()
    assert torch.equal(layer(x), expected.float())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_the_error_is_within_what_rounding_allows(in_features, out_features):
    exact = linear(in_features, out_features)
    layer = Int8Linear.from_linear(exact)
    x = torch.randn(64, in_features).double()
    weight = exact.weight.detach().double()
    # |xw - x'w'| <= |x||w - w'| + |x - x'||w'|, where each rounds by at most half a step
    half_w, half_x = weight.abs().amax(1) / 63 / 2, (x.amax(1) - x.amin(1)) / 255 / 2
    bound = x.abs().sum(1)[:, None] * half_w + half_x[:, None] * (weight.abs() + half_w[:, None]).sum(1)
    expected = x @ weight.t() + exact.bias.detach().double()
    error = (layer(x.float()).double() - expected).abs()
    assert (error <= bound * (1 + 1e-5) + 1e-6).all()
    assert error.norm() / expected.norm() < 0.02


def test_zeros_give_the_bias_and_a_missing_bias_nothing():
    with_bias = linear(48, 40)
    assert torch.equal(Int8Linear.from_linear(with_bias)(torch.zeros(3, 48)), with_bias.bias.detach().expand(3, 40))
    assert torch.equal(Int8Linear.from_linear(linear(48, 40, bias=False))(torch.zeros(3, 48)), torch.zeros(3, 40))


@pytest.mark.usefixtures("backend")
def test_quantized_rows_are_within_half_a_step():
    x = torch.randn(1030, 33) * torch.logspace(-3, 6, 1030)[:, None] + 0.5
    steps, scale, low = quantize_rows(x)
    assert steps.dtype == torch.uint8
    assert ((steps.double() * scale.double() + low.double() - x.double()).abs() <= scale.double() * 0.501).all()


def test_any_leading_shape_and_dtype_comes_back():
    layer = Int8Linear.from_linear(linear(48, 40))
    x = torch.randn(2, 3, 48)
    assert torch.equal(layer(x).view(6, 40), layer(x.view(6, 48)))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:, :0]).shape == (2, 0, 40)


def test_layers_become_int8_and_pooler_and_head_stay():
    model = quantize_int8(tiny_bert())
    names = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len(names) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in names)
    assert type(model.bert.pooler.dense) is nn.Linear
    assert type(model.classifier) is nn.Linear
    assert not any(p.requires_grad for p in model.parameters())


def test_skipped_names_stay_float():
    model = quantize_int8(tiny_bert(), skip=("classifier", "dense"))
    swapped = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert swapped == {"query", "key", "value"}


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="no linear layer"):
        quantize_int8(nn.Linear(4, 4))


@torch.no_grad()
def test_the_logits_stay_close_to_the_float_model():
    model = tiny_bert()
    expected = model(ids(8)).logits
    assert torch.allclose(quantize_int8(model)(ids(8)).logits, expected, atol=0.02)


@torch.no_grad()
def test_a_state_dict_comes_back_to_the_bit_in_a_float_model(tmp_path):
    model = quantize_int8(tiny_bert())
    expected = model(ids()).logits  # packs: what is packed must not be saved
    state = model.state_dict()
    assert {t.dtype for name, t in state.items() if name.endswith("query.weight")} == {torch.int8}
    torch.save(state, tmp_path / "state.pt")

    torch.manual_seed(9)
    other = BertForSequenceClassification(model.config).eval()
    loaded = load_int8(other, torch.load(tmp_path / "state.pt"))
    assert torch.equal(loaded(ids()).logits, expected)
    assert loaded.state_dict().keys() == state.keys()


@torch.no_grad()
def test_weights_loaded_after_a_forward_are_the_ones_used():
    layer, other = (Int8Linear.from_linear(linear(48, out)) for out in (40, 40))
    other.weight = -other.weight
    x = torch.randn(5, 48)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@torch.no_grad()
def test_a_used_model_can_be_copied_and_pickled():
    model = quantize_int8(tiny_bert())
    expected = model(ids()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids()).logits, expected)
