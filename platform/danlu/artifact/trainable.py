"""How many numbers a job trains: from the names and shapes in a weights file, without a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from danlu.artifact.pretrained import Weight, weight_shapes
from danlu.errors import SpecError
from danlu.spec.optim import Optim
from danlu.spec.tuning import Adalora, Adapter, Freeze, Full, Ia3, Lora, Prefix, Prompt, PTuning, Qlora, Tuning, VirtualTokens, is_merged

LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks)\.(\d+)\.")
IA3_MODULES = (("k_proj", "v_proj", "down_proj"), ("key", "value", "output.dense"), ("k_lin", "v_lin", "lin2"))
"""Keys, values and the feed-forward's second layer, as model families name them."""
ATTENTION_OUTPUTS = ("attention.output.dense", "self_attn.o_proj", "attention.out_lin")
FEEDFORWARD_OUTPUTS = ("output.dense", "mlp.down_proj", "ffn.lin2")
HEADS = ("classifier", "score", "qa_outputs")
"""What model families call the layer that a task puts on top; adapters train it whole."""
EMBEDDINGS = ("embeddings.", "embed_tokens.", "embed_positions.", "embed_in.", "wte.", "wpe.", "word_embedding", "shared.weight")


def is_embedding(name: str) -> bool:
    """True for the weights that turn token ids into vectors."""
    return any(part in name for part in EMBEDDINGS)


def new_parameters(folder: Path, head: Collection[str], prefix: str) -> set[str]:
    """Parameters of the head that the weights file does not have: frozen and not stored, they would be others at every start."""
    shapes = weight_shapes(folder)
    return set() if shapes is None else {name for name in head if name not in shapes and name.removeprefix(f"{prefix}.") not in shapes}


def num_layers(config: Mapping[str, Any]) -> int:
    """Layers of a model, as its config.json says; of an encoder-decoder those of both."""

    def first(*names: str) -> int:
        return next((int(config[name]) for name in names if config.get(name)), 0)

    if config.get("is_encoder_decoder"):
        encoder = first("encoder_layers", "num_layers")
        return encoder + (first("decoder_layers", "num_decoder_layers") or encoder)
    return first("num_hidden_layers", "n_layers", "n_layer")


def trained_names(names: Sequence[str], tuning: Freeze) -> list[str]:
    """The parameters, out of a model's or of a weights file's, that `freeze` trains: the last layers of each stack, an encoder's and a
    decoder's, and what is in none. SpecError if the model has not as many layers."""
    places = {name: (name[: found.start()], int(found.group(1))) for name in names if (found := LAYER.search(name))}
    if not places:
        fix = "tuning.kind=full or lora"
        raise SpecError("the model's layers are not numbered, so there are no last ones", where="tuning.num_trainable_layers", fix=fix)
    sizes: dict[str, int] = {}
    for stack, number in places.values():
        sizes[stack] = max(sizes.get(stack, 0), number + 1)
    if tuning.num_trainable_layers > (layers := min(sizes.values())):
        raise SpecError(
            f"{tuning.num_trainable_layers} layers are to be trained; the model has {layers}",
            where="tuning.num_trainable_layers",
            fix=f"at most {layers}, or tuning.kind=full",
        )
    first = {stack: size - tuning.num_trainable_layers for stack, size in sizes.items()}
    stays = {name for name, (stack, number) in places.items() if number < first[stack]}
    return [name for name in names if not is_embedding(name) and name not in stays]


def num_trainable(tuning: Tuning, shapes: Mapping[str, Weight], config: Mapping[str, Any], *, head: int) -> int:
    """Numbers trained in a model of these weights; `head` is the size of what the task puts on top."""
    match tuning:
        case Full():
            return head + sum(w.num_elements for name, w in shapes.items() if not (tuning.freeze_embeddings and is_embedding(name)))
        case Freeze():
            return head + sum(shapes[name].num_elements for name in trained_names(list(shapes), tuning))
        case Lora() | Qlora():
            chosen = targets(shapes, tuning.target_modules)
            return head + sum(tuning.r * (rows + columns) + (rows if tuning.use_dora else 0) for rows, columns in chosen.values())
        case Adalora():
            chosen = targets(shapes, tuning.target_modules)
            return head + sum(tuning.init_r * (rows + columns + 1) for rows, columns in chosen.values())
        case Ia3():
            names, feedforward = ia3_modules(list(shapes), tuning)
            chosen = targets(shapes, names)
            return head + sum(columns if _is_one_of(name, feedforward) else rows for name, (rows, columns) in chosen.items())
        case Adapter():
            sizes = [shapes[f"{name}.weight"].shape[0] for name in bottleneck_modules(list(shapes), tuning)]
            return head + sum(2 * size * tuning.bottleneck_size + size + tuning.bottleneck_size for size in sizes)
        case Prompt() | PTuning() | Prefix():
            return head + _num_in_prompt(tuning, config)


def check_adapter_can_be_stored(tuning: Tuning, shapes: Mapping[str, Weight], shared: Collection[str], missing: Collection[str]) -> None:
    """SpecError if what is trained could not be written down as it is: `shared` names modules that have their weights in common, `missing`
    parameters of a language model's output layer that its weights file has not."""
    if missing and isinstance(tuning, Lora | Qlora | Adalora | Ia3):
        raise SpecError(
            f"the model's weights have no {min(missing)}: its output layer starts from nothing, and tuning.kind={tuning.kind} stores none",
            where="tuning.kind",
            fix="full, freeze or adapter, which train it whole, or a model that was pretrained with its output layer",
        )
    named = getattr(tuning, "target_modules", None)
    if is_merged(tuning) and isinstance(named, list):
        for target in named:
            if found := [module for module in shared if _is_one_of(module, (target,))]:
                raise SpecError(
                    f"{target} shares its weights with {next(other for other in shared if other != found[0])}, and merging an adapter of "
                    "one into them would change both",
                    where="tuning.target_modules",
                    fix=f"leave {target} out, or tuning.kind=qlora, whose adapter stays beside the weights",
                )
    if isinstance(tuning, Lora) and tuning.moves_base:
        most = min((min(shape) for shape in targets(shapes, tuning.target_modules).values()), default=tuning.r)
        if tuning.r > most:
            raise SpecError(
                f"init_lora_weights={tuning.init_lora_weights} takes r={tuning.r} directions out of weights that have no more than {most}",
                where="tuning.r",
                fix=f"at most {most}, or init_lora_weights=default",
            )


def check_head_rate(tuning: Tuning, optim: Optim, head: Collection[str]) -> None:
    """SpecError if the rate of a head is that of none: `head` names the parameters that an `adapter` would train whole."""
    if isinstance(tuning, Adapter) and optim.head_learning_rate_multiplier != 1 and not head:
        raise SpecError(
            f"{optim.head_learning_rate_multiplier:g} has no effect: the output layer is pretrained, and tuning.kind=adapter leaves it",
            where="optim.head_learning_rate_multiplier",
            fix="leave it out, or tuning.kind=full",
        )


def check_prompt_fits(tuning: VirtualTokens, config: Mapping[str, Any], max_length: int) -> None:
    """SpecError if prompt and row together are longer than the model has positions."""
    table = int(config.get("max_position_embeddings") or 0)
    if table and tuning.num_virtual_tokens + max_length > table:
        raise SpecError(
            f"{tuning.num_virtual_tokens} virtual tokens and model.max_length={max_length} are more than the model's {table} positions",
            where="tuning.num_virtual_tokens",
            fix=f"model.max_length={table - tuning.num_virtual_tokens}" if table > tuning.num_virtual_tokens else "fewer virtual tokens",
        )


def _num_in_prompt(tuning: Prompt | PTuning | Prefix, config: Mapping[str, Any]) -> int:
    hidden = int(config.get("hidden_size") or config.get("dim") or 0)
    match tuning:
        case Prefix():
            heads = int(config.get("num_attention_heads") or config.get("n_heads") or 1)
            head_dim = int(config.get("head_dim") or hidden // heads)
            return tuning.num_virtual_tokens * num_layers(config) * 2 * int(config.get("num_key_value_heads") or heads) * head_dim
        case Prompt():
            return tuning.num_virtual_tokens * hidden
        case PTuning():
            inner = tuning.encoder_hidden_size
            return tuning.num_virtual_tokens * hidden + 2 * hidden * inner + inner * inner + 2 * inner + hidden


def ia3_modules(names: Sequence[str], tuning: Ia3) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`target_modules` and `feedforward_modules` for a model with parameters of these names. SpecError if none is known."""
    if tuning.target_modules is not None:
        return tuple(tuning.target_modules), tuple(tuning.feedforward_modules or ())
    modules = {name.removesuffix(".weight") for name in names}
    for family in IA3_MODULES:
        if all(any(_is_one_of(module, (target,)) for module in modules) for target in family):
            return family, family[-1:]
    fix = "target_modules and feedforward_modules, or tuning.kind=lora"
    raise SpecError("this model's keys, values and feed-forward are not known by name", where="tuning.target_modules", fix=fix)


def bottleneck_modules(names: Sequence[str], tuning: Adapter) -> list[str]:
    """The linear layers that get a bottleneck behind them, in a model with parameters of these names. SpecError if there are none."""
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and LAYER.search(name)]
    attention = [name for name in modules if _is_one_of(name, ATTENTION_OUTPUTS)]
    feedforward = [name for name in modules if _is_one_of(name, FEEDFORWARD_OUTPUTS) and name not in attention]
    if not feedforward or (tuning.placement == "houlsby" and not attention):
        fix = "tuning.kind=lora, which finds linear layers by their type"
        raise SpecError("this model's attention and feed-forward outputs are not known by name", where="tuning.placement", fix=fix)
    return feedforward + (attention if tuning.placement == "houlsby" else [])


def _is_one_of(module: str, targets: Sequence[str]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)


def targets(shapes: Mapping[str, Weight], names: Sequence[str] | str) -> dict[str, tuple[int, int]]:
    """Shape (rows, columns) of each linear layer that gets an adapter. The output layer gets one only if it is named."""
    found: dict[str, tuple[int, int]] = {}
    for name, weight in shapes.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or len(weight.shape) != 2 or is_embedding(name):
            continue
        everything = names == "all-linear" and module not in ("lm_head", *HEADS)
        if everything or (names != "all-linear" and _is_one_of(module, names)):
            found[module] = (weight.shape[0], weight.shape[1])
    return found
