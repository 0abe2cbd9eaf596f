"""What weights of fewer bits cost: perplexity of a small model that this trains on Reuters R8's news, on texts it has not seen.

There is no pretrained language model without a hub, and random weights have nothing to lose. A Qwen3-shaped one of 8M parameters learns for
a minute or two; then its test texts are read in fp32 and bf16, and with the weights rounded to 8 and to 4 bits, by Danlu and by
bitsandbytes, computed in bf16.
"""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

from harness import DATA, cores

LENGTH = 256


def perplexities(*, steps: int) -> dict[str, float]:
    """Of each kind of weights."""
    import torch

    from danlu.compress.weight_only import quantize_weights
    from danlu.spec.compress import BnbInt8, BnbNf4, Int4, Int8

    torch.set_num_threads(cores())
    train, test, vocabulary = _tokens()
    model = _train(_model(vocabulary), train, steps)
    kinds: dict[str, Any] = {"fp32": None, "bf16": None, "int8": Int8(), "int4": Int4()}
    found = {}
    for name, kind in kinds.items():
        own = copy.deepcopy(model)
        if kind is not None:
            quantize_weights(own, kind)
        found[name] = _perplexity(own if name == "fp32" else own.to(torch.bfloat16), test)
    for bnb in (BnbInt8(), BnbNf4()):
        found[bnb.kind] = _perplexity(_by_bitsandbytes(model, bnb), test)
    return found


def _by_bitsandbytes(model: Any, kind: Any) -> Any:
    """As a bundle's weights are written and loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    from danlu.compress.quantize import write_bitsandbytes
    from danlu.compress.quantized_base import keep_format

    with tempfile.TemporaryDirectory() as folder:
        write_bitsandbytes(model, AutoModelForCausalLM, kind, Path(folder), torch.bfloat16)
        quantized = AutoModelForCausalLM.from_pretrained(folder)
    keep_format(quantized)
    return quantized.eval()


def _tokens() -> tuple[Any, Any, int]:
    """Train and test texts end to end in rows of LENGTH."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = {name: (DATA / f"reuters-r8-{name}.tab").read_text(encoding="utf-8").splitlines()[3:] for name in ("train", "test")}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts["train"], trainers.BpeTrainer(vocab_size=4000, show_progress=False))

    def rows(name: str) -> Any:
        ids = [token for one in tokenizer.encode_batch(texts[name]) for token in one.ids]
        return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)

    return rows("train"), rows("test")[:128], tokenizer.get_vocab_size()


def _model(vocabulary: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6, "head_dim": 64}
    heads = {"num_attention_heads": 5, "num_key_value_heads": 5}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, tie_word_embeddings=True, **shape, **heads))


def _train(model: Any, rows: Any, steps: int) -> Any:
    import torch

    order = torch.randint(len(rows), (steps, 8), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps + 1, pct_start=0.1)
    for batch in order:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows[batch], labels=rows[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _perplexity(model: Any, rows: Any) -> float:
    import torch

    with torch.inference_mode():
        losses = [float(model(input_ids=some, labels=some).loss) * len(some) for some in rows.split(8)]
    return math.exp(sum(losses) / len(rows))
