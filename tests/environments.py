"""Environments of their own for programs that tests talk to: what they need is not what Danlu needs."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".cache"


def python_of(packages: Path) -> str:
    """The interpreter of an environment with the packages of a requirements file, made once; skips where it cannot be."""
    folder = CACHE / f"{packages.stem}-{sha256(packages.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{packages.stem}-"))
        try:
            subprocess.run([sys.executable, "-m", "venv", partial], check=True, capture_output=True)
            done = subprocess.run(
                [partial / "bin" / "python", "-m", "pip", "install", "-q", "-r", packages], capture_output=True, text=True
            )
            if done.returncode:
                pytest.skip(f"what {packages.name} names could not be fetched: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
            with contextlib.suppress(OSError):  # another process was faster
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return str(folder / "bin" / "python")
