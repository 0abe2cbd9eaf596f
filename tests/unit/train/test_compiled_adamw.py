"""AdamW by the compiled kernels is torch.optim.AdamW."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from danlu.compiled import KernelsUnavailable
from danlu.tasks import kernels
from danlu.train.compiled_adamw import LARGE_TABLE, CompiledAdamW, can_be_compiled, use_row_gradients

SETTINGS = {"betas": (0.9, 0.98), "eps": 1e-7}


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    if isinstance(found := kernels._kernels(), KernelsUnavailable):
        pytest.skip(str(found))
    with kernels.compiled_kernels():
        yield


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(LARGE_TABLE, 20, padding_idx=3)
        self.small = nn.Embedding(7, 20)
        self.linear = nn.Linear(20, 3000)
        self.unused = nn.Linear(2, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(ids) + self.small(ids % 7)).square().sum()


def groups(model: Model) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "lr": 1e-2, "weight_decay": 0.1}, {"params": others, "lr": 3e-3, "weight_decay": 0.0}]


def batches(number: int, first: int = 0) -> list[torch.Tensor]:
    return [
        torch.randint(LARGE_TABLE, (40,), generator=torch.Generator().manual_seed(first + i)).index_fill_(0, torch.tensor([0]), 3)
        for i in range(number)
    ]


def trained(model: Model, optimizer: torch.optim.Optimizer, steps: list[list[torch.Tensor]], max_norm: float) -> list[float]:
    """Each step's gradient norm."""
    norms = []
    for i, passes in enumerate(steps):
        for ids in passes:
            (model(ids) * 1e-2).backward()
        norms.append(
            optimizer.clip(max_norm)
            if isinstance(optimizer, CompiledAdamW)
            else float(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        )
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if i == 0 else group["lr"] or 1e-2  # a warm-up begins with zero
        optimizer.step()
        optimizer.zero_grad()
    return norms


def same(mine: Model, theirs: Model) -> None:
    for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("max_norm", [1.0, float("inf")])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("passes", [1, 3])
def test_its_steps_and_norms_are_torchs(by_rows: bool, passes: int, max_norm: float) -> None:
    mine, theirs = Model(), Model()
    if by_rows:
        use_row_gradients(mine, list(mine.parameters()))
    assert (mine.table.sparse, mine.small.sparse) == (by_rows, False)
    steps = [batches(passes, 10 * step) for step in range(6)]
    plain = torch.optim.AdamW(groups(theirs), **SETTINGS)
    norms = trained(mine, own := CompiledAdamW(groups(mine), **SETTINGS), steps, max_norm)
    assert norms == pytest.approx(trained(theirs, plain, steps, max_norm), rel=1e-5)
    same(mine, theirs)
    mine_state, state = own.state_dict()["state"], plain.state_dict()["state"]
    assert mine_state.keys() == state.keys()
    for index, its in state.items():
        assert mine_state[index].keys() == its.keys()
        for name, value in its.items():
            torch.testing.assert_close(mine_state[index][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("first", ["compiled", "torch"])
def test_a_run_goes_on_with_either_from_the_others_state(first: str) -> None:
    whole, rest = [batches(1, step) for step in range(8)], Model()
    expected = Model()
    trained(expected, torch.optim.AdamW(groups(expected), **SETTINGS, fused=True), whole, 1.0)

    def made(name: str, model: Model) -> torch.optim.Optimizer:
        if name == "compiled":
            use_row_gradients(model, list(model.parameters()))
            return CompiledAdamW(groups(model), **SETTINGS)
        return torch.optim.AdamW(groups(model), **SETTINGS, fused=True)

    model = Model()
    before = made(first, model)
    trained(model, before, whole[:5], 1.0)
    rest.load_state_dict(model.state_dict())
    after = made("torch" if first == "compiled" else "compiled", rest)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for ids in whole[5:]:
        trained_step(rest, after, ids)
    same(rest, expected)
    assert [group["fused"] for group in after.param_groups] == [True, True]


def trained_step(model: Model, optimizer: torch.optim.Optimizer, passes: list[torch.Tensor]) -> None:
    for ids in passes:
        (model(ids) * 1e-2).backward()
    optimizer.clip(1.0) if isinstance(optimizer, CompiledAdamW) else nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def test_a_gradient_that_is_no_number_shows_in_the_norm() -> None:
    model = Model()
    optimizer = CompiledAdamW(groups(model), **SETTINGS)
    model(batches(1)[0]).backward()
    model.linear.weight.grad[5, 5] = float("nan")
    assert optimizer.clip(1.0) != optimizer.clip(1.0)
    model.linear.weight.grad[5, 5] = float("inf")
    assert optimizer.clip(1.0) == float("inf")


def test_moments_of_rows_that_are_not_met_again_become_zeros_not_denormal_numbers() -> None:
    model = Model()
    use_row_gradients(model, list(model.parameters()))
    optimizer = CompiledAdamW(groups(model), **SETTINGS)
    trained(model, optimizer, [batches(1)], 1.0)
    average = optimizer.state[model.table.weight]["exp_avg"]
    met = average.any(1)
    average[met] = 1.2e-38
    trained(model, optimizer, [[torch.tensor([5])]], 1.0)
    assert not average[met & (torch.arange(LARGE_TABLE) != 5)].any()
    assert average[5].any()


def test_a_table_that_is_used_twice_or_is_not_trained_keeps_whole_gradients() -> None:
    model = Model()
    use_row_gradients(model, [model.small.weight])
    assert not model.table.sparse
    model.head = nn.Linear(20, LARGE_TABLE)
    model.head.weight = model.table.weight
    use_row_gradients(model, list(model.parameters()))
    assert not model.table.sparse


def test_it_is_for_float32_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    assert can_be_compiled(list(model.parameters()))
    assert not can_be_compiled(list(model.bfloat16().parameters()))
    monkeypatch.setattr(kernels, "_used", False)
    assert not can_be_compiled(list(Model().parameters()))
