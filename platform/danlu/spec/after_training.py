"""What a job's `compress:` and `serve:` can do with what its training ends in. Each raises a ValueError for the job's validator."""

from __future__ import annotations

from danlu.spec.compress import Compress
from danlu.spec.serve import Torch
from danlu.spec.task import EncoderTask, Task, is_decoders
from danlu.spec.tuning import Adapter, Qlora, Tuning
from danlu.spec.vllm import Vllm


def check_compression(task: Task, compress: Compress) -> None:
    """The kinds of an encoder's weights are not those of a language model's."""
    if not isinstance(task, EncoderTask) and not is_decoders(task):
        raise ValueError(f"compress takes an encoder's or a decoder's task, such as classification or chat; leave it out for {task.kind}")
    kinds = ("int8", "bnb_int8", "bnb_nf4") if isinstance(task, EncoderTask) else ("int8", "int4", "bnb_int8", "bnb_nf4")
    if compress.quantization.kind not in kinds:
        raise ValueError(
            f"compress.quantization.kind={compress.quantization.kind} is not for task.kind={task.kind}, which takes: {', '.join(kinds)}"
        )


def check_engine(engine: Torch | Vllm, tuning: Tuning, compress: Compress | None) -> None:
    """It serves the trained weights, as they were evaluated."""
    if engine.model_name_or_path is not None:
        raise ValueError("serve.engine.model_name_or_path is in the way of what was trained, which is served; leave it out")
    if engine.quantization is not None:
        instead = f"; compress: {{quantization: {{kind: {engine.quantization}}}}} does" if isinstance(engine, Torch) else ""
        raise ValueError(f"serve.engine.quantization={engine.quantization} makes weights that nobody evaluates; leave it out{instead}")
    if isinstance(engine, Vllm) and isinstance(tuning, Qlora | Adapter):
        raise ValueError(
            f"serve.engine.kind=vllm cannot serve tuning.kind={tuning.kind} as it is evaluated; serve.engine.kind=torch can, or "
            "tuning.kind=lora"
        )
    if isinstance(engine, Vllm) and compress is not None:
        raise ValueError("serve.engine.kind=vllm cannot serve what compress makes; serve.engine.kind=torch can, or leave compress out")
