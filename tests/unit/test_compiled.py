"""Compiled libraries: built once for a machine, and kept."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from danlu import compiled


def test_who_comes_at_the_same_time_builds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, compiler = tmp_path / "some.cpp", tmp_path / "compiler"
    source.write_text("")
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\necho built >> {tmp_path}/log\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    together = threading.Barrier(4)

    def build() -> Path:
        together.wait()
        return compiled.build(source, tmp_path / "cache")

    with ThreadPoolExecutor(4) as pool:
        (path,) = {one.result() for one in [pool.submit(build) for _ in range(4)]}
    assert (tmp_path / "log").read_text().splitlines() == ["built"]
    assert [found.name for found in (tmp_path / "cache").iterdir() if found.suffix != ".lock"] == [path.name]
    source.write_text("// another")
    assert compiled.build(source, tmp_path / "cache") != path, "what was built is not that source's"
    source.write_text('#include "some.h"\n')
    (tmp_path / "some.h").write_text("")
    before = compiled.build(source, tmp_path / "cache")
    (tmp_path / "some.h").write_text("// another")
    assert compiled.build(source, tmp_path / "cache") != before, "what it includes is part of it"
    source.write_text("")
    monkeypatch.setattr(compiled, "_cpu_flags", lambda: "another CPU's")
    assert compiled.build(source, tmp_path / "cache") != path, "a cache may be shared by machines that differ"
