"""Whether a LoRA adapter fits the model it is put on: by the headers of both their files, before anybody loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.artifact.pretrained import header, weight_shapes
from danlu.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""

Shape = tuple[int, int]
"""Of a linear layer: numbers out, numbers in."""


def check_fits(adapter: Path, base: Path, skeleton: Callable[[], PreTrainedModel], *, source: str, where: str) -> None:
    """ModelError, naming the module and both shapes, if the LoRA weights in `adapter` are not those of the model in the folder `base`.

    `skeleton` makes that model's shapes. It is asked only where the headers do not say the same: a class may name its modules otherwise
    than the file does, and an adapter goes by the class. What an adapter holds besides LoRA is not looked at.
    """
    changed = changed_layers(adapter, source, where)
    stored = _stored(base)
    if all(_find(layer, stored) == shape for layer, shape in changed.items()):
        return
    own = _linears(skeleton())
    for layer, shape in changed.items():
        if own.get(layer) != shape:
            raise does_not_fit(source, layer, shape, own.get(layer), where)


def does_not_fit(source: str, layer: str, changed: Shape, own: Shape | None, where: str) -> ModelError:
    """What to say of an adapter of another model."""
    here = "has no such layer" if own is None else f"has {list(own)}"
    return ModelError(
        f"{source} changes {layer} {list(changed)} (out, in), and the model {here}",
        where=where,
        fix="an adapter that was trained on this model",
    )


def changed_layers(adapter: Path, source: str, where: str) -> dict[str, Shape]:
    """The linear layers that a folder's adapter changes, by their names in the model. ModelError if a layer's two matrices do not go
    together."""
    if not (adapter / FILE).exists():
        raise ModelError(f"{source} holds no adapter: there is no {FILE}", where=where, fix="PEFT's save_pretrained writes one")
    try:
        tensors = header(adapter / FILE)
    except ModelError as error:
        raise ModelError(f"{source} holds no adapter: {error.problem}", where=where, fix="copy it again") from error
    found: dict[str, Shape] = {}
    for key, down in tensors.items():
        before, named, end = key.rpartition(".lora_A")
        if not named or end not in (".weight", ""):  # AdaLoRA's are no modules
            continue
        layer, up = before.removeprefix(PREFIX), tensors.get(f"{before}.lora_B{end}")
        if up is None or len(up.shape) != 2 or len(down.shape) != 2 or up.shape[1] != down.shape[0]:
            beside = "there is no lora_B" if up is None else f"lora_B is {list(up.shape)}"
            raise ModelError(
                f"{source} is damaged: lora_A of {layer} is {list(down.shape)} and {beside}", where=where, fix="copy or train it again"
            )
        found[layer] = (up.shape[0], down.shape[1])
    return found


def _stored(base: Path) -> dict[str, Shape]:
    """Matrices in a model's files, by their modules' names there; none where the files do not say."""
    shapes = weight_shapes(base) or {}
    return {name.removesuffix(".weight"): (w.shape[0], w.shape[1]) for name, w in shapes.items() if len(w.shape) == 2}


def _find(layer: str, stored: Mapping[str, Shape]) -> Shape | None:
    """A file may hold only the model without its head, whose names are the ends of the whole model's."""
    while layer not in stored:
        _, dot, layer = layer.partition(".")
        if not dot:
            return None
    return stored[layer]


def _linears(model: PreTrainedModel) -> dict[str, Shape]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # a linear layer that holds its matrix the other way round

    found: dict[str, Shape] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[1], module.weight.shape[0])
    return found
