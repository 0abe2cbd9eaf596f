"""What the README says works: its marked shell blocks and its Python blocks are run, in order, in a folder with a cheap job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
FENCE = re.compile(r"^(?P<mark><!-- run -->[ \t]*\n+)?^```(?P<language>bash|python)[ \t]*\n(?P<text>.*?)^```[ \t]*$", re.M | re.S)
"""A block of the languages that can be run, and whether `<!-- run -->` stands above it."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a README."""

    where: str
    language: str
    text: str


def blocks_of(name: str, document: str) -> list[Block]:
    """Every Python block, and the shell blocks that are marked."""
    return [
        Block(f"{name}:{document.count(chr(10), 0, found.start('text')) + 1}", found["language"], found["text"])
        for found in FENCE.finditer(document)
        if found["language"] == "python" or found["mark"]
    ]


def readme_blocks(name: str) -> list[Block]:
    """Blocks of a README; a translation's are only those that are not in the original word for word."""
    path = ROOT / name
    blocks = blocks_of(name, path.read_text(encoding="utf-8")) if path.is_file() else []
    known = set() if name == READMES[0] else {block.text for block in readme_blocks(READMES[0])}
    return [block for block in blocks if block.text not in known]


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as its reader would."""
    bin_folder = Path(sys.executable).parent
    command = ["bash", "-euo", "pipefail", "-c", block.text] if block.language == "bash" else [sys.executable, "-c", block.text]
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", [name for name in READMES if name == READMES[0] or readme_blocks(name)])
def test_the_readmes_blocks_run(name: str, write_spec: Callable[..., Path], topic_files: dict[str, str], tmp_path: Path) -> None:
    blocks = readme_blocks(name)
    assert blocks, f"{name} has no block to run"
    # The specs that the README names are here too, as cheap jobs of the same names; one worker, for what Ray adds is tested elsewhere.
    cheap = {"workers": {"num_workers": 1}, "max_steps": 20}
    write_spec(tmp_path / "job.yaml", **cheap)
    for spec in (ROOT / "k8s" / "examples").glob("*.yaml"):
        if "kind: train" in spec.read_text():
            write_spec(tmp_path / "k8s" / "examples" / spec.name, name=spec.stem, **cheap)
    for split, path in topic_files.items():
        shutil.copy(path, tmp_path / f"{split}.csv")
    for block in blocks:
        done = run(block, tmp_path)
        assert done.returncode == 0, f"{block.where}\n{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_blocks_are_found_where_they_stand(tmp_path: Path) -> None:
    document = "# A\n\n<!-- run -->\n```bash\necho one\n```\n\n```bash\nmake demo\n```\n\n```python\nprint(2)\n```\n```yaml\na: 1\n```\n"
    assert blocks_of("X.md", document) == [Block("X.md:5", "bash", "echo one\n"), Block("X.md:13", "python", "print(2)\n")]
    assert run(Block("", "bash", "danlu --version"), tmp_path).stdout.startswith("danlu ")
    assert run(Block("", "bash", "false\ntrue"), tmp_path).returncode == 1
    assert run(Block("", "python", "print(2)"), tmp_path).stdout == "2\n"
