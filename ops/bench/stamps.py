"""When a process of Danlu begins and ends its steps, without a change to Danlu: `install` wraps its functions as they are imported.

The benchmark puts a sitecustomize.py in front of the path, so this runs in the command and in every worker that it starts. Standard
library only: whatever is imported here would be missing from the measured imports.
"""

from __future__ import annotations

import functools
import importlib.abc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = {
    "danlu.sdk": ["prepare"],
    "danlu.tasks.classification": ["splits"],
    "danlu.plan": ["make_plan"],
    "danlu.local_ray": ["start_ray"],
    "danlu.train.driver": ["fit", "_worker"],
    "danlu.train.worker": ["work"],
    "danlu.train.loop": ["train"],
    "danlu.train.strategies.deepspeed": ["DeepSpeedStrategy.prepare", "DeepSpeedStrategy.step"],
}


def install(file: str) -> None:
    """Append {pid, event, time} to `file` at the beginning and the end of every call of a watched function."""
    sys.meta_path.insert(0, _Finder(file))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, file: str) -> None:
        self.file = file

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                assert spec.loader is not None
                run = spec.loader.exec_module

                def exec_module(module: ModuleType, run: Callable[[ModuleType], None] = run) -> None:
                    run(module)
                    for name in WATCHED[module.__name__]:
                        _wrap(module, name, self.file)

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
                return spec
        return None


def _wrap(module: ModuleType, name: str, file: str) -> None:
    *outer, last = name.split(".")
    owner = functools.reduce(getattr, outer, module)
    function = getattr(owner, last)

    @functools.wraps(function)
    def stamped(*args: Any, **kwargs: Any) -> Any:
        began = time.time()
        _write(file, {"pid": os.getpid(), "event": f"{name} begins", "time": began})
        result = function(*args, **kwargs)
        _write(file, {"pid": os.getpid(), "event": f"{name} ends", "time": time.time()})
        return result

    setattr(owner, last, stamped)


def _write(file: str, stamp: dict[str, object]) -> None:
    with open(file, "a") as out:
        out.write(json.dumps(stamp) + "\n")
