"""What the README says works: its marked shell blocks and its Python blocks are run, in order, in a folder with a cheap job."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from danlu.cli import app
from danlu.errors import SpecError

pytestmark = pytest.mark.usefixtures("ray_local")

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


def run(block: Block) -> None:
    """Run a block as its reader would. Where it asks for nothing but this program, that is this process: it has a Ray, and it has loaded
    what takes every new process longer than the block."""
    if block.language == "python":
        exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
        return
    lines = [words for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]
    if all(words[0] == "danlu" and not set(" ".join(words)) & set("|<>&;$`\\*") for words in lines):
        for _, *arguments in lines:
            done = CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)
            assert not done.return_value, f"{block.where}: {arguments}\n{done.output}"
        return
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], env=environment, stdin=subprocess.DEVNULL, timeout=600, check=True)


@pytest.mark.parametrize("name", [name for name in READMES if name == READMES[0] or readme_blocks(name)])
def test_the_readmes_blocks_run(
    name: str, write_spec: Callable[..., Path], topic_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        run(block)


def test_blocks_are_found_where_they_stand_and_one_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = "# A\n\n<!-- run -->\n```bash\necho one\n```\n\n```bash\nmake demo\n```\n\n```python\nprint(2)\n```\n```yaml\na: 1\n```\n"
    assert blocks_of("X.md", document) == [Block("X.md:5", "bash", "echo one\n"), Block("X.md:13", "python", "print(2)\n")]
    monkeypatch.chdir(tmp_path)
    run(Block("", "bash", "danlu schema train > a.json\n"))
    assert json.loads((tmp_path / "a.json").read_text())["title"] == "TrainJob"
    run(Block("", "python", "from pathlib import Path\nPath('b').touch()\n"))
    assert (tmp_path / "b").exists()
    for block in (
        Block("", "bash", "false\ntrue\n"),
        Block("", "bash", "danlu schema train\ndanlu schema x\n"),
        Block("", "python", "1 / 0\n"),
    ):
        with pytest.raises((subprocess.CalledProcessError, SpecError, ZeroDivisionError)):
            run(block)
