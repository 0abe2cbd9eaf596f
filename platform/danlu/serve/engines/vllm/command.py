"""How vLLM is started: a spec as the command line of `vllm serve`, and its environment. Pure, but for looking for the interpreter."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from danlu.errors import ResourceError
from danlu.spec.vllm import Vllm

BASE = "danlu:base"
"""What vLLM calls the model; its adapters have their own names."""

DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def interpreter(spec: Vllm) -> str:
    """The Python that has vLLM; ResourceError says where to name one."""
    if spec.python is None:
        if importlib.util.find_spec("vllm") is not None:
            return sys.executable
        raise ResourceError(
            "vLLM is not installed in this environment",
            where="engine.python",
            fix="an environment of its own (python -m venv /opt/vllm && /opt/vllm/bin/pip install vllm), and python: /opt/vllm/bin/python",
        )
    found = shutil.which(os.path.expanduser(spec.python))
    if found is None:
        raise ResourceError(f"{spec.python} is no program", where="engine.python", fix="the python of an environment that has vLLM")
    return os.path.abspath(found)  # not resolved: a venv's python is a link


def command(spec: Vllm, python: str, model: Path, socket: Path, *, dtype: str) -> list[str]:
    """`vllm serve` for a model folder, listening on a Unix socket. The spec's own flags come last, where they win."""
    flags: dict[str, object] = {
        "uds": socket,
        "served-model-name": BASE,
        "dtype": DTYPES[dtype],
        "max-num-seqs": spec.max_num_seqs,
        "gpu-memory-utilization": spec.gpu_memory_utilization,
        "tensor-parallel-size": spec.tensor_parallel_size,
        "generation-config": "vllm",
        "max-logprobs": -1,
        "logprobs-mode": "raw_logprobs",
        # llguidance, as in Danlu's own engine: xgrammar 0.2.8 lets control characters into a string with a maxLength, which is no JSON.
        "structured-outputs-config": '{"backend": "guidance", "disable_any_whitespace": true}',
        "uvicorn-log-level": "warning",
    }
    if spec.max_model_len is not None:
        flags["max-model-len"] = spec.max_model_len
    if spec.quantization is not None:
        flags["quantization"] = spec.quantization
    if has_lora(spec):
        flags |= {"max-loras": spec.max_loras, "max-lora-rank": spec.max_lora_rank}
    switches = [
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        "--enable-prefix-caching" if spec.enable_prefix_caching else "--no-enable-prefix-caching",
        *(["--enable-lora"] if has_lora(spec) else []),
    ]
    said = [f"--{name}={value}" for name, value in flags.items()]
    return [python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *spec.args, *said, *switches]


def environment(spec: Vllm, python: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """What the child finds: the replica's environment, without what would lead another interpreter to this one's packages."""
    found = dict(inherited)
    if python != sys.executable:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            found.pop(name, None)
    found |= {"PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_COLOR": "0"}
    if has_lora(spec):
        found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"  # on a socket that only the replica can reach
    if spec.device == "cpu":
        found |= {"OMP_NUM_THREADS": str(spec.num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return found


def has_lora(spec: Vllm) -> bool:
    """Whether adapters may be loaded."""
    return bool(spec.adapters) or spec.allow_runtime_lora_updating
