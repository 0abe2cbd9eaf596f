"""Peak memory of cleaning and packing a file, by its size: `python ops/bench/memory.py [--megabytes 1000] [--pack] [--near] [--folder D]`.

Makes jsonl of that size (English and Chinese, one row in ten a repetition), cleans it in a process of its own, and prints rows, seconds and
the peak resident size of that process, beside its size after the imports. `--pack` also tokenises the rows into files, as a job with
`data.streaming` does before it trains (byte-level BPE of 8,000 entries), and then reads batches out of them as training does. Needs about
five times the size on disk.
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

    before = peak_mb()
    steps = [DropBroken(), Normalize(), FilterLength(min_characters=20), DeduplicateNear() if near else DeduplicateExact()]
    began = time.perf_counter()
    _, cleaned = prepare(Data(train=source, clean=steps, cache_dir=cache_dir), 0)
    told = {"rows_out": cleaned.rows_out["train"], "removed": cleaned.removed["train"], "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps({**told, "imports_mb": before, "peak_mb": peak_mb()}))


def pack(source: str, cache_dir: str, near: bool) -> None:
    """The measured process with `--pack`: what a job with `data.streaming` does before its first step, and the batches of 500 steps."""
    from itertools import islice

    from danlu.data.pack import Batches
    from danlu.data.prepare import prepare
    from danlu.spec.train import TrainJob
    from danlu.tasks.from_scratch import train_tokenizer
    from danlu.tasks.task import read_splits

    with open(source, encoding="utf-8") as file:
        tokenizer = train_tokenizer([json.loads(line)["text"] for line in islice(file, 2000)], 8000, masked=False, max_length=512)
    before = peak_mb()
    steps = ["drop_broken", "normalize", "deduplicate_near" if near else "deduplicate_exact"]
    data = {"train": source, "cache_dir": cache_dir, "streaming": True, "clean": [{"kind": kind} for kind in steps]}
    document = {"name": "memory", "model": {"model_name_or_path": "-"}, "task": {"kind": "pretrain"}}
    job = TrainJob.model_validate(document | {"data": data | {"split": {"kind": "ratio", "dev_size": 0.002}}})
    began = time.perf_counter()
    prepare(job.data, job.seed)
    cleaned, cleaned_mb = time.perf_counter(), peak_mb()
    train = read_splits(job, tokenizer, max_length=512).train
    packed, packed_mb = time.perf_counter(), peak_mb()
    told = {"rows": len(train), "tokens": len(train.encoded.input_ids), "imports_mb": before}
    told |= {"clean_seconds": round(cleaned - began, 1), "clean_peak_mb": cleaned_mb}
    told |= {"pack_seconds": round(packed - cleaned, 1), "pack_peak_mb": packed_mb}
    batches = Batches(train.encoded, None, global_batch_size=32, micro_batch_size=8, rank=0, world_size=1, seed=0)
    for step in range(500):
        batches.at(step)
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
    resident = {name: int(value.split()[0]) // 1024 for name, value in status.items()}
    told |= {
        "ms_a_step": round((time.perf_counter() - packed) * 2, 2),
        "anonymous_mb": resident["RssAnon"],
        "mapped_mb": resident["RssFile"],
    }
    print(json.dumps(told))


def peak_mb() -> int:
    """The largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--near", action="store_true", help="near duplicates instead of exact ones")
    parser.add_argument("--pack", action="store_true", help="tokenise the rows into files as well")
    parser.add_argument("--folder", help="where the files are made; unset: the system's temporary folder")
    parser.add_argument("--clean", nargs=2, metavar=("FILE", "CACHE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.clean:
        (pack if given.pack else clean)(*given.clean, given.near)
        return
    for megabytes in given.megabytes:
        with tempfile.TemporaryDirectory(prefix="danlu-memory-", dir=given.folder) as folder:
            rows = write(Path(folder) / "rows.jsonl", megabytes)
            asked = [flag for flag, on in (("--near", given.near), ("--pack", given.pack)) if on]
            command = [sys.executable, __file__, "--clean", f"{folder}/rows.jsonl", f"{folder}/cache", *asked]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
            print(
                json.dumps({"megabytes": megabytes, "rows": rows, "near": given.near, **json.loads(done.stdout.splitlines()[-1])}),
                flush=True,
            )


if __name__ == "__main__":
    main()
