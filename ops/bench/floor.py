"""The floor of a start: a bare ZeRO-2 script that imports what Danlu imports, loads the same model and makes one step.

One rank, started as torchrun would (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Prints a JSON line of stamps on rank 0.
"""

from __future__ import annotations

import json
import os
import sys
import time

STAMPS = {"started": time.time()}


def main(folder: str, threads: int, max_length: int) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    STAMPS["imported"] = time.time()
    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=8, dtype=torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bool(torch.cpu._is_avx512_bf16_supported())},
        "zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    STAMPS["prepared"] = time.time()
    batch = tokenizer(["grain and trade"] * 8, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    for last in (False, True):  # 32 rows over two ranks are two passes of 8, as in the example's spec
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(engine(**batch, labels=torch.zeros(8, dtype=torch.int64)).loss)
        engine.step()
    STAMPS["stepped"] = time.time()
    if dist.get_rank() == 0:
        print(json.dumps(STAMPS), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
