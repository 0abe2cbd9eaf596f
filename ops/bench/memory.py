"""Peak memory of cleaning a file, by its size: `python ops/bench/memory.py [--megabytes 1000] [--near] [--folder DIR]`.

Makes jsonl of that size (English and Chinese, one row in ten a repetition), cleans it in a process of its own, and prints rows, seconds and
the peak resident size of that process, beside its size after the imports. Needs about three times the size on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = "the price of wheat rose in the market today after a harvest report said that exports fell to a new low while ships left port"
WORDS = TEXT.split()
SIGNS = "央行今天宣布下调存款准备金率以支持实体经济的发展市场普遍认为这将释放长期流动性约一万亿元小麦价格上涨港口关闭"


def write(path: Path, megabytes: int) -> int:
    """Rows of 200 to 2,000 characters; their number."""
    draw, rows, last = random.Random(0), 0, ""
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            for _ in range(1000):
                if draw.random() >= 0.1 or not last:
                    words = (
                        draw.choices(WORDS, k=draw.randint(40, 350))
                        if draw.random() < 0.7
                        else draw.choices(SIGNS, k=draw.randint(100, 600))
                    )
                    last = (" " if words[0].isascii() else "").join(words)
                file.write(json.dumps({"text": last, "label": draw.choice("abc"), "id": rows}, ensure_ascii=False) + "\n")
                rows += 1
    return rows


def clean(source: str, cache_dir: str, near: bool) -> None:
    """The measured process: prints its result as JSON."""
    from danlu.data.prepare import prepare
    from danlu.spec.data import Data, DeduplicateExact, DeduplicateNear, DropBroken, FilterLength, Normalize

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = [DropBroken(), Normalize(), FilterLength(min_characters=20), DeduplicateNear() if near else DeduplicateExact()]
    began = time.perf_counter()
    _, cleaned = prepare(Data(train=source, clean=steps, cache_dir=cache_dir), 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {"rows_out": cleaned.rows_out["train"], "removed": cleaned.removed["train"], "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps({**told, "imports_mb": before // 1024, "peak_mb": peak // 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--near", action="store_true", help="near duplicates instead of exact ones")
    parser.add_argument("--folder", help="where the files are made; unset: the system's temporary folder")
    parser.add_argument("--clean", nargs=2, metavar=("FILE", "CACHE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.clean:
        clean(*given.clean, given.near)
        return
    for megabytes in given.megabytes:
        with tempfile.TemporaryDirectory(prefix="danlu-memory-", dir=given.folder) as folder:
            rows = write(Path(folder) / "rows.jsonl", megabytes)
            command = [sys.executable, __file__, "--clean", f"{folder}/rows.jsonl", f"{folder}/cache", *(["--near"] if given.near else [])]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
            print(json.dumps({"megabytes": megabytes, "rows": rows, "near": given.near, **json.loads(done.stdout)}), flush=True)


if __name__ == "__main__":
    main()
