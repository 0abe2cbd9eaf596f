"""Tiny language models for the tests: a byte-level tokenizer with chat tokens, models built from their configs, conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{%- if tools %}<|im_start|>system\n# Tools\n{%- for tool in tools %}\n{{ tool | tojson }}{%- endfor %}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{%- endfor %}<|im_end|>\n'
    "{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{%- else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like Qwen3's: only the last turn keeps its reasoning."""
GLUED = "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
"""No border between a question and its answer: tokens may reach over it."""

CAPITALS = {"France": "Paris", "Italy": "Rome", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Egypt": "Cairo"}


def write_chat_tokenizer(folder: Path, *, template: str | None = CHATML, corpus: Sequence[str] = ()) -> int:
    """Byte-level BPE with ChatML's tokens; its number of entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system user assistant What is the capital of", *CAPITALS, *CAPITALS.values(), *corpus] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=256)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return len(fast)


def write_chat_model(folder: Path, *, template: str | None = CHATML, hidden_size: int = 32) -> Path:
    """A Qwen3 with random weights that can hold a conversation."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vocabulary = write_chat_tokenizer(folder, template=template)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def talks(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one or two turns about capitals."""
    draw = random.Random(seed)
    rows = []
    for i in range(number):
        messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if i % 3 == 0 else []
        for country in draw.sample(list(CAPITALS), 1 + i % 2):
            question = draw.choice(("What is the capital of {}?", "Which city is the capital of {}?"))
            messages.append({"role": "user", "content": question.format(country)})
            messages.append({"role": "assistant", "content": f"{CAPITALS[country]}."})
        rows.append({"messages": messages})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def preferences(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs: the right capital is preferred to a wrong one."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        country, other = draw.sample(list(CAPITALS), 2)
        prompt = [{"role": "user", "content": f"What is the capital of {country}?"}]
        rows.append({"prompt": prompt, "chosen": f"{CAPITALS[country]}.", "rejected": f"{CAPITALS[other]}."})
    return rows


def write_t5(folder: Path, *, hidden_size: int = 32) -> Path:
    """A T5 with random weights and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = ["<pad>", "</s>", "<unk>", *NUMBERS, *NUMBERS.values(), "summarize", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(words), d_model=hidden_size, d_kv=hidden_size // 4, d_ff=2 * hidden_size, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


NUMBERS = {"one": "yi", "two": "er", "three": "san", "four": "si", "five": "wu", "six": "liu"}


def translations(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Numbers in English and in Pinyin."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        words = draw.choices(list(NUMBERS), k=draw.randint(1, 4))
        rows.append({"translation": {"en": " ".join(words), "zh": " ".join(NUMBERS[word] for word in words)}})
    return rows


CHOICES = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{cities}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: brier_score}]
"""


def write_choices(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """A task of lm-evaluation-harness as a YAML file, and its rows: which city is the capital of a country?"""
    cities = sorted(CAPITALS.values())
    rows = [{"country": name, "cities": cities, "answer": cities.index(city)} for name, city in CAPITALS.items()]
    path = folder / "choices.yaml"
    path.write_text(CHOICES.replace("ROWS", write_rows(folder / "choices.jsonl", rows)), encoding="utf-8")
    return str(path), rows


def choices_scores(rows: Sequence[Mapping[str, Any]], model: Any, tokenizer: Any) -> dict[str, float]:
    """What that task says of a model, by a forward of transformers' for each choice."""
    import torch

    right, brier = [], []
    for row in rows:
        asked = f"The capital of {row['country']} is"
        before = tokenizer(asked, add_special_tokens=False).input_ids
        said = [tokenizer(f"{asked} {city}", add_special_tokens=False).input_ids[len(before) :] for city in row["cities"]]
        found = torch.tensor([loglikelihood(model, before, one) for one in said])
        right.append(float(int(found.argmax()) == row["answer"]))
        brier.append(float((found.softmax(0) - torch.eye(len(said))[row["answer"]]).square().sum()))
    return {"acc": sum(right) / len(right), "brier_score": sum(brier) / len(brier)}


def loglikelihood(model: Any, before: Sequence[int], said: Sequence[int]) -> float:
    """Of the tokens `said` behind those `before`."""
    import torch

    with torch.no_grad():
        logprobs = model(torch.tensor([[*before, *said]])).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(before) + i - 1, token]) for i, token in enumerate(said))
