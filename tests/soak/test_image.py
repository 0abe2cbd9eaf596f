"""The images that ops/docker/Dockerfile makes, built and run by Docker: as nobody of note, with a root that cannot be written.

Skipped where no Docker daemon answers or the base image is not there. Where there is no registry, any Debian 12 with Python 3.11 that
is tagged as the Dockerfile's base does, and $TORCH_INDEX names another index for the cpu image's torch. The gpu image takes some 20 GB
of disk while it is built; it needs no GPU here, and is asked what it can do without one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_tiny_model
from transformers import AutoConfig, BertModel

from danlu import __version__

ROOT = Path(__file__).parents[2]
BASE = "python:3.11-slim-bookworm"

pytestmark = pytest.mark.soak


def docker(*arguments: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}  # what an older builder has
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=ROOT)


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def target(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def image(target: str) -> str:
    if not shutil.which("docker") or docker("version").returncode:
        pytest.skip("no Docker daemon answers")
    if docker("image", "inspect", BASE).returncode and docker("pull", BASE).returncode:
        pytest.skip(f"there is no image {BASE}, and no registry that has it")
    index = [f"--build-arg=TORCH_INDEX={os.environ['TORCH_INDEX']}"] if "TORCH_INDEX" in os.environ and target == "cpu" else []
    tag = f"danlu:test-{target}"
    built = docker("build", "--network=host", *index, "-f", "ops/docker/Dockerfile", "--target", target, "-t", tag, ".", timeout_s=7200)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return tag


def in_a_pod(image: str, *command: str, mounts: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """As pods run it: no right, no root's disk; two folders that can be written."""
    scratch = ["--tmpfs", "/tmp:mode=1777", "--tmpfs", "/home/danlu:uid=1000,gid=1000"]
    restricted = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none", "--shm-size=1g"]
    return docker("run", "--rm", *restricted, *scratch, *(f"--volume={mount}" for mount in mounts), image, *command)


def test_it_runs_as_user_1000_and_cannot_write_its_root(image: str) -> None:
    assert in_a_pod(image, "id", "-u").stdout == "1000\n"
    assert in_a_pod(image, "touch", "/opt/danlu/x").returncode != 0


def test_the_doctor_finds_everything_that_is_the_images(image: str) -> None:
    found = in_a_pod(image, "danlu", "doctor", "--storage", "/tmp/runs")
    lines = [line for line in found.stdout.splitlines() if line.split()[:1] in (["ok"], ["warning"], ["missing"])]
    assert {"Python", "torch", "Ray", "storage"} <= {line.split()[1] for line in lines if line.split()[0] == "ok"}, (
        found.stdout + found.stderr
    )
    assert not [line for line in lines if line.split()[0] == "missing"], found.stdout


def test_it_has_no_compiler_but_what_triton_needs(image: str, target: str) -> None:
    found = in_a_pod(image, "sh", "-c", "command -v gcc g++ nvcc make git").stdout.split()
    assert [Path(path).name for path in found] == (["gcc"] if target == "gpu" else [])


def test_its_kernels_are_there_for_this_cpu(image: str) -> None:
    """Those of engine.kind=torch: nothing is compiled, and nothing is written."""
    code = "from danlu.serve.engines.torch.kernels import load_kernels; found = load_kernels(); print(found.library._name, found.vectors)"
    found = in_a_pod(image, "python", "-c", code)
    assert found.returncode == 0, found.stderr
    if "avx2" in Path("/proc/cpuinfo").read_text().split():
        assert re.search(r"/site-packages/danlu/\S+/kernels-(amx|avx512-bf16|avx512|avx2)-[0-9a-f]{16}\.so \w", found.stdout)


def test_the_op_that_swaps_to_nvme_is_compiled(image: str, target: str, tmp_path: Path) -> None:
    """For the accelerator of the image. DeepSpeed knows it without a GPU too, and what is written comes back."""
    tmp_path.chmod(0o777)
    code = """
import torch
from deepspeed.accelerator import get_accelerator
op = get_accelerator().create_op_builder("AsyncIOBuilder").load(verbose=False)
handle = op.aio_handle()
buffer, back = (handle.new_cpu_locked_tensor(4096, torch.empty(0)) for _ in range(2))
buffer.copy_(torch.arange(4096))
assert handle.sync_pwrite(buffer, "/drive/file", 0) == 1 == handle.sync_pread(back, "/drive/file", 0)
assert torch.equal(back, torch.arange(4096.0))
print(op.__file__)
"""
    accelerator = "cuda" if target == "gpu" else "cpu"
    found = in_a_pod(image, "env", f"DS_ACCELERATOR={accelerator}", "python", "-c", code, mounts=(f"{tmp_path}:/drive",))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "/site-packages/deepspeed/ops/aio/async_io_op" in found.stdout.splitlines()[-1]


def test_it_trains_and_stores_a_bundle(image: str, tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    done = train(image, tiny_model, topic_files, tmp_path)
    assert "stored as topics@v1" in done.stdout, done.stdout + done.stderr


def test_it_trains_with_what_lies_on_a_drive(
    image: str, target: str, topic_files: dict[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The optimizer's state, of a weight that is just large enough for DeepSpeed to swap it: a pod may lock 8 MiB of memory. The gpu
    image's op is for CUDA: a job without a GPU is told so there."""
    model = write_tiny_model(tmp_path_factory.mktemp("large"))
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = 8_300
    BertModel(config).save_pretrained(model)
    (tmp_path / "work" / "drive").mkdir(parents=True)
    parallel = {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/job/drive"}
    done = train(image, model, topic_files, tmp_path, parallel=parallel)
    said = " ".join((done.stdout + done.stderr).split())
    assert ("stored as topics@v1" if target == "cpu" else "it came compiled for cuda, not for cpu") in said, said


def train(image: str, model: Path, files: dict[str, str], folder: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """A tiny job in a pod that has one folder for everything."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    shutil.copytree(model, work / "model")
    for path in files.values():
        shutil.copy(path, work / Path(path).name)
    job = {
        "name": "topics",
        "model": {"model_name_or_path": "/job/model", "max_length": 32},
        "data": {**{name: f"/job/{Path(path).name}" for name, path in files.items()}, "cache_dir": "/tmp/cache"},
        "precision": "fp32",
        "max_steps": 8,
        "storage": "/job/runs",
        **changes,
    }
    (work / "job.yaml").write_text(yaml.safe_dump(job))
    for path in (folder, work, *work.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return in_a_pod(image, "danlu", "train", "/job/job.yaml", mounts=(f"{work}:/job",))


def test_its_list_of_parts_has_every_package_that_python_finds_in_it(image: str, target: str, tmp_path: Path) -> None:
    tag = f"danlu-test:{__version__}-{target}"
    assert docker("tag", image, tag).returncode == 0
    variables = [f"TARGET={target}", "IMAGE=danlu-test", "RUN_FLAGS=--network=host", f"OUT={tmp_path}"]
    made = subprocess.run(["make", "-f", "ops/docker/Makefile", "sbom", *variables], capture_output=True, text=True, cwd=ROOT)
    docker("rmi", tag)
    if "No matching distribution found for cyclonedx-bom" in made.stderr:
        pytest.skip("no package index has cyclonedx-bom")
    assert made.returncode == 0, made.stderr
    parts = json.loads((tmp_path / f"{target}.cdx.json").read_text())
    assert parts["bomFormat"] == "CycloneDX"
    listed = {one["name"].lower().replace("_", "-"): one["version"] for one in parts["components"]}
    found = json.loads(in_a_pod(image, "python", "-m", "pip", "list", "--format=json").stdout)
    there = {one["name"].lower().replace("_", "-"): one["version"] for one in found}
    assert {"torch", "ray", "danlu", "pyarrow", "gcsfs"} <= there.keys()
    assert {name: version for name, version in there.items() if listed.get(name) != version} == {}
    assert "\nopenssl\t" in (tmp_path / f"{target}.debian.txt").read_text()
