"""The `engine:` of a service that vLLM answers."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from danlu.spec.base import ModelName, Number, PositiveFloat, PositiveInt, Spec

Rank = Annotated[Literal[1, 8, 16, 32, 64, 128, 256, 320, 512], Number]
"""Those that vLLM takes."""

OURS = {
    "model": "engine.model_name_or_path or bundle",
    "tokenizer": "engine.model_name_or_path or bundle",
    "served-model-name": "name",
    "revision": "engine.revision",
    "dtype": "engine.dtype",
    "quantization": "engine.quantization",
    "max-model-len": "engine.max_model_len",
    "max-num-seqs": "engine.max_num_seqs",
    "gpu-memory-utilization": "engine.gpu_memory_utilization",
    "enable-prefix-caching": "engine.enable_prefix_caching",
    "tensor-parallel-size": "engine.tensor_parallel_size",
    "pipeline-parallel-size": "engine.tensor_parallel_size, which is the replica's GPUs",
    "data-parallel-size": "autoscaling.max_replicas",
    "enable-lora": "engine.adapters or engine.allow_runtime_lora_updating",
    "lora-modules": "engine.adapters",
    "max-loras": "engine.max_loras",
    "max-lora-rank": "engine.max_lora_rank",
    "generation-config": "nothing: a request's defaults are OpenAI's",
    "max-logprobs": "nothing: requests say how many",
    "logprobs-mode": "nothing: log probabilities are those of the model, before temperature and penalties",
    "skip-tokenizer-init": "nothing: texts are wanted",
    "enable-prompt-tokens-details": "nothing: it is on",
    "structured-outputs-config": "nothing: guides are llguidance's, as in engine.kind: torch",
    "chat-template": "the tokenizer's own, with which the model was trained",
    "api-key": "auth.keys_file",
    "host": "http.host",
    "port": "http.port",
    "uds": "http.port",
    "middleware": "nothing: Danlu's gateway stands before it",
    "config": "the fields of engine",
    "headless": "nothing: a replica is one process group",
    "tokens-only": "nothing: texts are wanted",
    "root-path": "nothing: Danlu's gateway stands before it",
    "ssl-keyfile": "nothing: nobody but the replica talks to it",
    "ssl-certfile": "nothing: nobody but the replica talks to it",
}
"""vLLM's flags that a spec says in another way, and where."""


class Vllm(Spec):
    """vLLM, for GPUs: it runs as a process of its own, in an environment of its own, behind the same gateway, keys and chat template as
    every other engine. Names are vLLM's."""

    kind: Literal["vllm"] = "vllm"

    model_name_or_path: Annotated[str, Field(min_length=1)] | None = None
    """A model as it is, in place of a bundle: a folder, a hub id, a storage URI or `pkg://package/folder`."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    python: Annotated[str, Field(min_length=1)] | None = None
    """The interpreter of the environment that has vLLM, such as /opt/vllm/bin/python. Unset: the replica's own."""

    device: Literal["gpu", "cpu"] = "gpu"
    """`cpu` is for vLLM's CPU build, to try things out."""

    tensor_parallel_size: PositiveInt = 1
    """GPUs that share the model; also the GPUs that a replica asks Ray for."""

    num_threads: PositiveInt = 1
    """Cores that a replica asks Ray for; on a CPU also its compute threads."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of weights and computation. `auto` is what a bundle was evaluated in, or what the model's configuration says."""

    quantization: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")] | None = None
    """vLLM's name of a method: fp8, awq, gptq, bitsandbytes. Unset: what the model's configuration says."""

    max_model_len: PositiveInt | None = None
    """Longest prompt and answer together, in tokens. Unset: the model's positions."""

    max_num_seqs: PositiveInt = 256
    """Sequences that run at once."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that weights and cache take together; on a CPU of its memory."""

    enable_prefix_caching: bool = True
    """Keep what a finished sequence has left, so that a prompt that begins alike is not read again."""

    adapters: dict[ModelName, str] = {}
    """LoRA adapters that are there from the start: the name they answer to -> a PEFT folder, or a bundle: `name@alias`, a folder, a URI."""

    max_loras: PositiveInt = 8
    """Adapters in one batch at most. More can be loaded: they take turns."""

    max_lora_rank: Rank = 16
    """Largest rank of an adapter."""

    allow_runtime_lora_updating: bool = False
    """Serve `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`."""

    start_timeout_s: PositiveFloat = 900.0
    """How long loading, compiling and warming up may take."""

    args: list[str] = []
    """Further flags of `vllm serve`, as on its command line: `["--kv-cache-dtype", "fp8", "--enforce-eager"]`."""

    @property
    def num_gpus(self) -> int:
        """Of a replica."""
        return self.tensor_parallel_size if self.device == "gpu" else 0

    @field_validator("args")
    @classmethod
    def _no_flag_is_said_twice(cls, value: list[str]) -> list[str]:
        for arg in value:
            name = re.split(r"[=.+]", arg.removeprefix("--"))[0].replace("_", "-").removeprefix("no-")
            if arg.startswith("-") and not arg.startswith("--") and not re.fullmatch(r"-[\d.]+", arg):
                raise ValueError(f"{arg!r} is short for a longer flag; the longer one")
            # argparse takes a flag's beginning for the flag.
            said = next((flag for flag in OURS if flag == name or (name and flag.startswith(name))), None)
            if arg.startswith("--") and said:
                raise ValueError(f"{arg!r} is vLLM's --{said}, which Danlu sets; instead: {OURS[said]}")
        if value and not value[0].startswith("--"):
            raise ValueError(f"{value[0]!r} is no flag; a flag first, then its value: [--swap-space, '4']")
        return value

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        if self.revision is not None and self.model_name_or_path is None:
            raise ValueError("revision has no effect without model_name_or_path; leave it out")
        if self.device == "cpu" and self.tensor_parallel_size > 1:
            raise ValueError(f"tensor_parallel_size={self.tensor_parallel_size} has no effect with device=cpu; raise num_threads")
        return self
