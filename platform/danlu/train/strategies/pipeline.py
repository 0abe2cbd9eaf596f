"""Pipeline parallelism: stages of layers on workers one after the other, in the order of torch's schedules; also x tensor x data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import _RecvInfo

from danlu.data.pack import Packed
from danlu.errors import ModelError
from danlu.spec.parallel import GPipe, Interleaved1F1B, OneFOneB, Pipeline
from danlu.tasks.packed import check_packed
from danlu.train.strategies import sharded
from danlu.train.strategies.grid import Grid, GridStep
from danlu.train.strategies.stages import Anatomy, Handed, Reached, cut, forget_weights, watched
from danlu.train.strategies.tensor import answers, check_answers, split
from danlu.train.strategy import Loss, Setup, State


class PipelineStrategy:
    """A step's passes go through the stages in the order of the spec's schedule. bf16 and fp16 are autocast over float32 weights; hidden
    states travel in float32."""

    def __init__(self, spec: Pipeline) -> None:
        self.spec = spec

    def prepare(self, model: nn.Module, setup: Setup) -> nn.Module:
        self.setup = setup
        packed = check_packed(model, "a pipeline", where="parallel.kind", fix="parallel.kind=fsdp, which shards any model")
        self.grid = Grid(setup, pipe=self.spec.pipeline_parallel_size, tensor=self.spec.tensor_parallel_size)
        group_names = sharded.names_of(setup.param_groups, model)
        with watched(model) as found:
            expected = answers(model)
        (anatomy,) = found
        try:
            layers = self.spec.layers_of_stages(anatomy.num_layers)
        except ValueError as error:
            raise ModelError(f"{error}", where="parallel.pipeline_parallel_size", fix="fewer stages, or parallel.kind=fsdp") from error
        summed = split(model, self.grid) if self.spec.tensor_parallel_size > 1 else []
        self.where = Where(model, anatomy, layers, self.spec.pipeline_parallel_size)
        self.stages = [
            Stage(cut(model, anatomy, its, handed := Handed()), handed, index, setup).to(setup.device)
            for index, its in enumerate(layers)
            if index % self.spec.pipeline_parallel_size == self.grid.pipe_rank
        ]
        here = {name: p for name, p in model.named_parameters() if self.grid.pipe_rank in self.where.ranks[name]}
        trained = {name: p for name, p in here.items() if p.requires_grad}
        groups = [
            group | {"params": [trained[name] for name in names if name in trained]}
            for names, group in zip(group_names, setup.param_groups, strict=True)
        ]
        tied = {name: group for name, group in self._tied_groups().items() if name in trained}
        self.grid_step = GridStep(
            self.grid,
            trained,
            [group for group in groups if group["params"]],
            zero_stage=self.spec.zero_stage,
            summed=[p for p in summed if any(p is own for own in here.values())],
            tied=tied,
            counted_here=[name for name in trained if self.where.ranks[name][0] == self.grid.pipe_rank],
        )
        hidden_size = int(packed.model.config.hidden_size)
        first = first_trained(model, anatomy, layers)
        self.torch_stages = [PackedStage(stage, hidden_size, self.spec.num_stages, first, setup, self.grid.pipe) for stage in self.stages]
        self.schedule: Any = None
        self.here, self.buffers = here, dict(model.named_buffers())
        forget_weights(model)
        self.model = Pipelined(self.stages, hidden_size, self.spec, self.grid)
        check_answers(answers(self.model), expected, model, "cut into stages")
        return self.model

    def _tied_groups(self) -> dict[str, Any]:
        """A group for each parameter that several stages hold. Collective: all ranks make all groups."""
        mine = {}
        for name, ranks in self.where.ranks.items():
            if len(ranks) > 1:
                # [data, tensor, stages that hold it]
                table = self.grid.mesh.mesh[:, ranks, :].movedim(1, -1)
                for members in table.reshape(-1, len(ranks)).tolist():
                    group = dist.new_group(members)
                    if self.setup.rank in members:
                        mine[name] = group
        return mine

    def accumulate(self, micro_batches: Sequence[Packed], loss: Loss) -> torch.Tensor:
        scale = scale_of(self.setup)
        if self.schedule is None:
            self.schedule = self._make_schedule(len(micro_batches), lambda loss, _: loss * scale_of(self.setup))
        for stage, torchs in zip(self.stages, self.torch_stages, strict=True):
            stage.batches, stage.loss = micro_batches, loss
            torchs.tokens = [batch.num_tokens for batch in micro_batches]
        # All ranks draw alike; the layers of two stages should not.
        torch.manual_seed(torch.initial_seed() + self.grid.pipe_rank)
        turns = torch.arange(len(micro_batches))
        losses: list[torch.Tensor] = []
        with self.setup.exchange.waiting():
            self.schedule.step(turn=turns, target=turns, losses=losses, return_outputs=False)
        total = torch.stack([its.detach() for its in losses]).sum() / scale if losses else torch.zeros((), device=self.setup.device)
        with self.setup.exchange.waiting():
            dist.all_reduce(total, group=self.grid.pipe)  # the last stage's, and zeros
        return total

    def _make_schedule(self, passes: int, loss: Any) -> Any:
        match self.spec.schedule:
            case GPipe():
                return ScheduleGPipe(self.torch_stages[0], passes, loss, scale_grads=False)
            case OneFOneB():
                return Schedule1F1B(self.torch_stages[0], passes, loss, scale_grads=False)
            case Interleaved1F1B():
                return ScheduleInterleaved1F1B(list(self.torch_stages), passes, loss, scale_grads=False)

    def step(self, learning_rate: float) -> float:
        return self.grid_step.step(learning_rate)

    def state(self) -> State:
        return PipelineState(self)


def scale_of(setup: Setup) -> float:
    """What a pass's loss is multiplied by: the models average, and we want the sum."""
    return setup.num_models * (1.0 if setup.loss_scale is None else setup.loss_scale.scale)


def first_trained(model: nn.Module, anatomy: Anatomy, stages: Sequence[range]) -> int:
    """The first stage that holds weights which are trained."""
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad]
    return min(stage for name in names for stage in anatomy.stages_of(stages, name.rpartition(".")[0]))


class Where:
    """A whole model's parameters by name: their shapes, and the pipeline ranks that hold each. `names` has all names of tied ones."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, stages: Sequence[range], num_ranks: int) -> None:
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
        ranks: dict[str, set[int]] = {name: set() for name in self.shapes}
        for other, name in self.names.items():
            ranks[name] |= {stage % num_ranks for stage in anatomy.stages_of(stages, other.rpartition(".")[0])}
        self.ranks: Mapping[str, list[int]] = {name: sorted(its) for name, its in ranks.items()}


class Stage(nn.Module):
    """Layers of the model as torch's stage calls them: by the number of the pass, with what the stage before made of it."""

    batches: Sequence[Packed]
    loss: Loss

    def __init__(self, module: nn.Module, handed: Handed, index: int, setup: Setup) -> None:
        super().__init__()
        self.module, self.handed, self.index, self.setup = module, handed, index, setup

    def forward(self, *hidden: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, tokens, hidden], or the loss."""
        batch = self.batches[int(turn)]
        with self.setup.autocast():
            return self.run(hidden[0] if hidden else None, lambda: self.loss(self.module, batch))

    def run(self, hidden: torch.Tensor | None, call: Any) -> torch.Tensor:
        """What `call`, which calls the module, gives; hidden states where later stages have something to add."""
        self.handed.hidden = hidden
        try:
            found: torch.Tensor = call()
            return found
        except Reached as reached:
            # Receivers wait for float32, whatever autocast made of the last addition.
            return reached.hidden.float().contiguous()
        finally:
            self.handed.hidden = None


class PackedStage(PipelineStage):
    """A stage whose passes hold different numbers of tokens, which all its workers know: torch's own has one size for all of them."""

    tokens: Sequence[int] = ()

    def __init__(self, stage: Stage, hidden_size: int, num_stages: int, first_trained: int, setup: Setup, group: Any) -> None:
        self.hidden_size, self.exchange = hidden_size, setup.exchange
        self.learns = stage.index >= first_trained
        # No gradient travels back to stages where nothing is trained.
        given = torch.empty(1, 1, hidden_size, device=setup.device, requires_grad=stage.index > first_trained)
        made = torch.empty(1, 1, hidden_size, device=setup.device, requires_grad=self.learns)
        super().__init__(stage, stage.index, num_stages, setup.device, () if stage.index == 0 else (given,), (made,), group=group)

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.exchange.computing():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if not self.learns:  # torch's own would call autograd with nothing
            self.fwd_cache.pop(bwd_chunk_id)
            self.bwd_cache[bwd_chunk_id] = () if self.is_first else (None,)
            return
        with self.exchange.computing():
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self._fit()

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        self._fit()

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        self._fit()

    def _fit(self) -> None:
        """Buffers of this step's sizes."""
        for infos in (self.args_recv_info, self.grad_recv_info):
            for turn, received in infos.items():
                for info in received:
                    if isinstance(info, _RecvInfo) and info.buffer is not None:
                        info.buffer = torch.empty(1, self.tokens[turn], self.hidden_size, device=self.device)


class Pipelined(nn.Module):
    """The whole model, for scoring: called with the same rows on all its workers, it gives all of them its answers."""

    def __init__(self, stages: Sequence[Stage], hidden_size: int, spec: Pipeline, grid: Grid) -> None:
        super().__init__()
        self.stages, self.hidden_size, self.spec, self.grid = nn.ModuleList(stages), hidden_size, spec, grid

    def forward(self, input_ids: torch.Tensor, *others: Any) -> torch.Tensor:
        """What the last stage gives."""
        by_index = {stage.index: stage for stage in self.stages if isinstance(stage, Stage)}
        size, last = self.spec.pipeline_parallel_size, self.spec.num_stages - 1
        made: torch.Tensor | None = None
        for index in range(self.spec.num_stages):
            stage = by_index.get(index)
            if stage is None:
                continue
            hidden = None
            if index:
                hidden = torch.empty(1, len(input_ids), self.hidden_size, device=input_ids.device)
                dist.recv(hidden, group=self.grid.pipe, group_src=(index - 1) % size)
            made = stage.run(hidden, lambda stage=stage: stage.module(input_ids, *others))
            if index < last:
                dist.send(made, group=self.grid.pipe, group_dst=(index + 1) % size)
        answer = [made.float().cpu() if last in by_index and made is not None else None]
        dist.broadcast_object_list(answer, group=self.grid.pipe, group_src=last % size)
        assert answer[0] is not None
        return answer[0].to(input_ids.device)


class PipelineState:
    """Each worker writes its stages, by the names of the whole model; whole weights travel to the first rank."""

    def __init__(self, strategy: PipelineStrategy) -> None:
        self.strategy = strategy
        self.save, self.load = strategy.grid_step.save, strategy.grid_step.load

    def weights(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        where, grid, setup = self.strategy.where, self.strategy.grid, self.strategy.setup
        whole: dict[str, torch.Tensor] = {}
        for name in sorted({where.names[name] for name in names if name in where.names}):
            holder = where.ranks[name][0]
            value = torch.empty(0)
            if grid.data_rank == 0 and grid.pipe_rank == holder:
                value = sharded.whole_tensor(self.strategy.here[name].detach(), setup.device).contiguous()
                if grid.tensor_rank == 0 and setup.rank != 0:
                    dist.send(value, 0)
            if setup.rank == 0:
                if holder != 0:
                    value = torch.empty(where.shapes[name], device=setup.device)
                    dist.recv(value, int(grid.mesh.mesh[0, holder, 0]))
                whole[name] = value.float().cpu()
        if setup.rank != 0:
            return {}
        buffers = {name: its.detach().float().cpu().clone() for name, its in self.strategy.buffers.items() if name in names}
        return {name: whole[where.names[name]].clone() for name in names if name in where.names} | buffers
