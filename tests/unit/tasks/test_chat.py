"""Conversations: every format says the same to the model; masks are exact or the row is refused; scores are transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import CHATML, FORGETFUL, GLUED, MARKED, talks, write_chat_model, write_chat_tokenizer, write_rows
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from danlu import sdk
from danlu.data.encode import NO_TARGET
from danlu.errors import DataError
from danlu.spec.data import Data
from danlu.spec.task import Chat
from danlu.spec.train import TrainJob
from danlu.tasks import chat
from danlu.tasks.rows import Split, Splits
from danlu.tasks.tokenizer import load_tokenizer

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)


def tokenizer_with(template: str | None, folder: Path) -> PreTrainedTokenizerBase:
    write_chat_tokenizer(folder, template=template)
    return load_tokenizer(folder)


def read(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, folder: Path, task: Chat | None = None, max_length: int = 256
) -> Splits:
    """The rows as a training split; one good row is the dev split."""
    folder.mkdir(exist_ok=True)
    dev = [rows[0]]
    data = Data(train=write_rows(folder / "train.jsonl", rows), dev=write_rows(folder / "dev.jsonl", dev), cache_dir=str(folder / "cache"))
    return chat.splits(data, task or Chat(), tokenizer, max_length=max_length, seed=1)


def learned(split: Split, index: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that a row teaches."""
    targets = split.encoded.row_labels(index)
    runs = np.split(targets, np.flatnonzero(np.diff((targets != NO_TARGET).astype(int))) + 1)
    return [tokenizer.decode(run) for run in runs if run[0] != NO_TARGET]


def test_a_row_is_what_apply_chat_template_makes_and_teaches_only_what_the_assistant_says(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    split = read([{"messages": TALK}] * 3, tokenizer, tmp_path).train
    expected = tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert split.encoded.row(0).tolist() == expected
    # The end of a turn is learned, the line break behind it, which nobody generates, is not.
    assert learned(split, 0, tokenizer) == ["Hello!<|im_end|>", "See you.<|im_end|>"]
    targets = split.encoded.row_labels(0)
    at = np.flatnonzero(targets != NO_TARGET)
    assert targets[at].tolist() == [expected[i + 1] for i in at]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK]},
        {"conversations": TALK},
        {"instruction": "Bye", "input": "", "output": "See you.", "history": [["Hi", "Hello!"]]},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in TALK]},
    ],
    ids=["messages", "sharegpt", "roles in conversations", "alpaca", "prompt and completion", "text parts"],
)
def test_every_format_says_the_same_to_the_model(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    split = read([row] * 3, tokenizer, tmp_path).train
    assert split.texts.texts[0] == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(split, 0, tokenizer) == ["Hello!<|im_end|>", "See you.<|im_end|>"]


def test_a_given_prompts_own_assistant_turns_are_not_learned(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    split = read([{"prompt": TALK[:3], "completion": TALK[3:]}] * 2, tokenizer, tmp_path).train
    assert learned(split, 0, tokenizer) == ["See you.<|im_end|>"]


def test_tools_and_calls_reach_the_template_as_vllm_gives_them(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        {"role": "assistant", "content": "No."},
    ]
    openai = read([{"messages": messages, "tools": [tool]}] * 2, tokenizer, tmp_path / "a").train
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": json.dumps([tool["function"]]),
    }
    other = read([sharegpt] * 2, tokenizer, tmp_path / "b").train
    assert openai.texts.texts == other.texts.texts
    assert openai.texts.texts[0].startswith('<|im_start|>system\n# Tools{"type": "function"')
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert learned(openai, 0, tokenizer) == [called, "No.<|im_end|>"]


def test_marks_in_the_template_say_the_same_as_rendering_turn_by_turn(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    marked = tokenizer_with(MARKED, tmp_path / "marked")
    split = read([{"messages": TALK}] * 2, marked, tmp_path / "a").train
    plain = read([{"messages": TALK}] * 2, tokenizer, tmp_path / "b").train
    assert split.encoded.row_labels(0).tolist() == plain.encoded.row_labels(0).tolist()
    theirs = marked.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [i + 1 for i in np.flatnonzero(split.encoded.row_labels(0) != NO_TARGET)] == np.flatnonzero(theirs).tolist()


def test_a_template_that_renders_a_turn_otherwise_later_is_refused_and_each_turn_alone_is_exact(tmp_path: Path) -> None:
    forgetful = tokenizer_with(FORGETFUL, tmp_path / "forgetful")
    with pytest.raises(DataError, match=r"row 1: the template renders a turn otherwise .*assistant_turns=each"):
        read([{"messages": TALK}] * 2, forgetful, tmp_path)
    last = read([{"messages": TALK}] * 2, forgetful, tmp_path, Chat(assistant_turns="last")).train
    assert learned(last, 0, forgetful) == ["<think>\n\n</think>\n\nSee you.<|im_end|>"]
    each = read([{"messages": TALK}] * 2, forgetful, tmp_path, Chat(assistant_turns="each")).train
    assert len(each) == 4
    assert [learned(each, i, forgetful)[0] for i in (0, 1)] == [
        "<think>\n\n</think>\n\nHello!<|im_end|>",
        "<think>\n\n</think>\n\nSee you.<|im_end|>",
    ]
    assert each.texts.texts[1] == forgetful.apply_chat_template(TALK, tokenize=False)
    assert each.texts.row_numbers == [1, 1, 2, 2]


def test_a_row_whose_prompt_alone_makes_other_tokens_is_refused(tmp_path: Path) -> None:
    glued = tokenizer_with(GLUED, tmp_path / "glued")
    bad = {"messages": [{"role": "user", "content": "the c"}, {"role": "assistant", "content": "ap"}]}
    good = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " y"}]}
    found = read([good, good, bad], glued, tmp_path)
    assert found.train.texts.row_numbers == [1, 2]
    assert any("the first row 3: the prompt makes other tokens alone" in note for note in found.report.notes)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TALK[:1]}, "there is no assistant turn to learn"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "an assistant turn is empty"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "a message has to be"),
        ({"messages": "hello"}, "messages is not JSON"),
        ({"messages": None}, "a text or a list of messages is needed, not NoneType"),
        ({"messages": [TALK[1]]}, "the conversation begins with an assistant turn"),
        ({"messages": [TALK[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "is not JSON"),
    ],
)
def test_a_broken_row_is_dropped_with_its_reason_and_many_are_refused(
    row: dict[str, Any], reason: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    good = {"messages": TALK}
    found = read([good, good, row], tokenizer, tmp_path)
    assert found.train.texts.row_numbers == [1, 2]
    assert any(reason in note and "the first row 3" in note for note in found.report.notes)
    with pytest.raises(DataError, match="2 of 3 rows cannot be learned from; row 2: ") as error:
        read([good, row, row], tokenizer, tmp_path / "many")
    assert reason in str(error.value)


def test_what_is_cut_is_counted_and_said_and_a_row_with_nothing_left_is_dropped(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    long = {"messages": [TALK[0], {"role": "assistant", "content": "Hello! " * 60}]}
    late = {"messages": [{"role": "user", "content": "Hi " * 90}, TALK[1]]}
    found = read([{"messages": TALK}, long, late, {"messages": TALK}], tokenizer, tmp_path, max_length=80)
    assert found.train.texts.row_numbers == [1, 2, 4]
    assert found.train.encoded.lengths.max() == 80
    assert found.train.encoded.row_labels(1)[-1] == NO_TARGET
    text = found.report.text()
    assert "1 longer rows cut at their end" in text
    assert "the first row 3: nothing that the assistant says is within model.max_length=80 tokens" in text
    assert "OpenAI messages = 'messages'" in text
    assert "⟦Hello!<|im_end|>⟧" in text


def test_a_tokenizer_without_a_template_is_refused_unless_the_rows_are_plain_texts(tmp_path: Path) -> None:
    bare = tokenizer_with(None, tmp_path / "bare")
    with pytest.raises(DataError, match="no chat template"):
        read([{"messages": TALK}] * 2, bare, tmp_path)
    plain = read([{"text": "What is the capital?"}] * 2, bare, tmp_path).train
    assert learned(plain, 0, bare)[0].endswith("capital?<|endoftext|>")


def test_the_template_is_asked_and_its_refusal_is_the_reason(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    refusing = tokenizer_with(strict, tmp_path / "strict")
    with pytest.raises(DataError, match="row 1: the chat template refuses it: no system role"):
        read([{"messages": [{"role": "system", "content": "x"}, *TALK]}] * 2, refusing, tmp_path)
    for number, broken in enumerate(("{{ 1 / 0 }}", "{{ range(10 ** 9) | list }}", "{{ foo.bar }}", "{% for m in %}")):
        with pytest.raises(DataError, match="row 1: the chat template refuses it: "):
            read([{"messages": TALK}] * 2, tokenizer_with(broken, tmp_path / str(number)), tmp_path)


def job_of(model: Path, folder: Path, **overrides: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "name": "talks",
        "model": {"model_name_or_path": str(model), "max_length": 128},
        "data": {
            "train": write_rows(folder / "train.jsonl", talks(40)),
            "test": write_rows(folder / "test.jsonl", talks(12, 1)),
            "cache_dir": str(folder / "cache"),
        },
        "task": {"kind": "chat"},
        "optim": {"learning_rate": 1e-2},
        "precision": "fp32",
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": 12,
        "storage": str(folder / "storage"),
    }
    return TrainJob.model_validate(fields | overrides)


def test_it_learns_its_scores_are_those_of_transformers_and_its_probes_those_of_generate(model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path)
    trained = sdk.train(job)
    found = trained.evaluations["test"].scores
    folder = trained.bundle.path / "model"
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    _, split = sdk.evaluate(trained.reference, storage=job.storage)
    total, hits, tokens = 0.0, 0, 0
    for index in range(len(split)):
        ids = torch.from_numpy(split.encoded.row(index).astype(np.int64))[None]
        targets = split.encoded.row_labels(index)
        labels = torch.full_like(ids, -100)
        at = torch.from_numpy(np.flatnonzero(targets != NO_TARGET) + 1)
        labels[0, at] = ids[0, at]
        with torch.no_grad():
            out = plain(input_ids=ids, labels=labels)
        total += float(out.loss) * len(at)
        hits += int((out.logits[0, at - 1].argmax(-1) == ids[0, at]).sum())
        tokens += len(at)
    assert found.metrics()["loss"] == pytest.approx(total / tokens, abs=1e-4)
    assert found.metrics()["token_accuracy"] == pytest.approx(hits / tokens)
    first = next(record for record in trained.run.records() if record["kind"] == "step")
    assert found.metrics()["loss"] < first["loss"] - 0.5

    settings = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    assert len(trained.bundle.meta.probes) == 8
    for probe in trained.bundle.meta.probes:
        assert tokenizer.apply_chat_template(probe.messages, add_generation_prompt=True, tokenize=False) == probe.text
        prompt = tokenizer.apply_chat_template(probe.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert prompt["input_ids"][0].tolist() == probe.prompt_token_ids
        made = plain.generate(**prompt, do_sample=False, max_new_tokens=16)[0, len(probe.prompt_token_ids) :]
        assert made.tolist() == probe.completion_token_ids
        with torch.no_grad():
            logits = plain(torch.tensor([probe.prompt_token_ids + probe.completion_token_ids])).logits[0]
        every = logits[len(probe.prompt_token_ids) - 1 : -1].log_softmax(-1)
        expected = every[torch.arange(len(made)), made].tolist()
        assert probe.logprobs == pytest.approx(expected, abs=1e-4)
    answer = sdk.predict(trained.reference, ["What is the capital of Peru?"], storage=job.storage)[0]
    assert answer.to_dict()["completion"] == answer.completion


def test_packed_losses_and_gradients_are_those_of_each_row_alone(model: Path, tmp_path: Path) -> None:
    from danlu.data.pack import pack_rows

    tokenizer = load_tokenizer(model)
    split = read(talks(6), tokenizer, tmp_path).train
    module = chat.wrap(chat.build_model(model), Chat())
    plain = AutoModelForCausalLM.from_pretrained(model)
    assert module.packed
    chat.loss(module, pack_rows(split.encoded, range(len(split))), Chat()).backward()
    for index in range(len(split)):
        ids = torch.from_numpy(split.encoded.row(index).astype(np.int64))
        targets = torch.from_numpy(split.encoded.row_labels(index).astype(np.int64))
        torch.nn.functional.cross_entropy(plain(ids[None]).logits[0], targets, reduction="sum").backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in module.model.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-4), name


@pytest.mark.parametrize("tuning", [{"kind": "lora", "r": 4}, {"kind": "qlora", "r": 4}, {"kind": "prompt", "num_virtual_tokens": 4}])
def test_an_adapters_bundle_answers_its_probes_again(tuning: dict[str, Any], model: Path, tmp_path: Path) -> None:
    from danlu.compress.load import load_judge
    from danlu.tasks.judge import DecoderJudge

    if tuning["kind"] == "qlora":
        pytest.importorskip("bitsandbytes")
    bundle = sdk.train(job_of(model, tmp_path, tuning=tuning, max_steps=3)).bundle
    judge = load_judge(bundle)
    assert isinstance(judge, DecoderJudge)
    assert judge.tokenizer.chat_template == CHATML
    for probe in bundle.meta.probes[:3]:
        again = judge.continued(probe.text, probe.prompt_token_ids, 16)
        assert list(again.token_ids) == probe.completion_token_ids
        assert list(again.logprobs) == pytest.approx(probe.logprobs, abs=1e-4)
