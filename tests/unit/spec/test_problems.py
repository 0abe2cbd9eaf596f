"""Messages: each names the field, the line, the value, the rule and what would work, and what it says would work does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from danlu.errors import SpecError
from danlu.spec.files import parse
from danlu.spec.hints import HINTS
from danlu.spec.schema import schema
from danlu.spec.serve import Service
from danlu.spec.train import TrainJob

CLASSES = "task: {kind: classification, labels:"
JOB = "kind: train\nname: topics\nmodel: {model_name_or_path: m}\ndata: {train: t.csv}\n"
SERVICE = "kind: service\nname: topics\n"


def refusal(text: str, *overrides: str, kind: type[TrainJob] | type[Service] = TrainJob) -> str:
    with pytest.raises(SpecError) as caught:
        parse(kind, text, overrides, source="job.yaml")
    return str(caught.value)


def paths_of(kind: type[TrainJob] | type[Service]) -> set[str]:
    """Every field's dotted path, read off the JSON Schema."""
    document = schema(kind)

    def walk(node: dict[str, Any], prefix: str) -> Iterator[str]:
        if "$ref" in node:
            yield from walk(document["definitions"][node["$ref"].rpartition("/")[2]], prefix)
        for part in (*node.get("allOf", []), *node.get("anyOf", []), *node.get("oneOf", [])):
            yield from walk(part, prefix)
        for name, inner in node.get("properties", {}).items():
            yield prefix + name
            yield from walk(inner, f"{prefix}{name}.")

    return set(walk(document, ""))


PATHS = paths_of(TrainJob) | paths_of(Service)

PROBLEMS = {
    "a misspelt field": ("seeed: 3", "seeed (line 5): there is no such field here", "did you mean seed?"),
    "a misspelt inner field": (
        "optim:\n  lerning_rate: 3",
        "optim.lerning_rate (line 6): there is no such field",
        "did you mean optim.learning_rate?",
    ),
    "a misspelt field elsewhere": ("learning_ratee: 3", "learning_ratee (line 5)", "did you mean optim.learning_rate?"),
    "a misplaced field": ("learning_rate: 3", "learning_rate (line 5)", "it belongs at optim.learning_rate"),
    "a misplaced inner field": ("optim: {global_batch_size: 8}", "optim.global_batch_size (line 5)", "it belongs at global_batch_size"),
    "a field that is nothing": ("zzz: 1", "zzz (line 5): there is no such field here", "fields here: kind, name, model, data, task"),
    "another variant's field": (
        "tuning: {kind: full, r: 4}",
        "tuning.r (line 5)",
        "only kind: lora or qlora has it",
    ),
    "the default variant's other": (
        "parallel: {kind: ddp, zero_stage: 2}",
        "parallel.zero_stage (line 5)",
        "only kind: deepspeed or tensor or pipeline has it",
    ),
    "a quoted number": ("optim: {learning_rate: '1e-4'}", "'1e-4': a number is needed", "try: 0.0001, without quotes"),
    "a quoted whole number": ("seed: '1'", "seed (line 5): '1': a whole number is needed", "try: 1, without quotes"),
    "a number with underscores": ("max_steps: 1_000", "'1_000': a whole number is needed", "try: 1000"),
    "a whole number with an exponent": ("max_steps: 1e3", "max_steps (line 5): 1e3: a whole number is needed", "try: 1000"),
    "half a number": ("global_batch_size: 31.5", "global_batch_size (line 5): 31.5: a whole number is needed", ""),
    "a seed that torch does not take": ("seed: 9223372036854775808", "seed (line 5): 9223372036854775808: it should be less than", ""),
    "a truth for a number": ("seed: true", "seed (line 5): true: a whole number is needed", ""),
    "a truth for a choice of numbers": ("workers: {gpus_per_worker: true}", "true: a whole number is needed", ""),
    "a number for a text": ("storage: 010", "storage (line 5): 010: a text is needed", 'in quotes: "010"'),
    "a number for a label": (
        CLASSES + " [a, 1e5]}",
        "task.labels.1 (line 5): 1e5: a text is needed",
        'in quotes: "1e5"',
    ),
    "a text for a truth": ("tuning: {kind: full, freeze_embeddings: yes}", "'yes': true or false is needed", ""),
    "a text for a list": ("tuning: {kind: lora, target_modules: query}", "'query': a list or 'all-linear' is needed", ""),
    "a list for a mapping": ("optim: [a]", "optim (line 5): a list: a mapping is needed", ""),
    "nothing for a mapping": ("optim:", "optim (line 5): nothing: a mapping is needed", ""),
    "a tag for a mapping": ("tuning: lora", "tuning (line 5): 'lora': a mapping is needed", "try: tuning: {kind: lora}"),
    "no tag": ("tuning: {r: 4}", "tuning (line 5): `kind` is needed", "try: kind: full or freeze or lora or"),
    "an unknown tag": ("tuning: {kind: bitfit}", "tuning (line 5): there is no kind 'bitfit'", "try: kind: full or freeze or lora or"),
    "a misspelt tag": ("tuning: {kind: lroa}", "there is no kind 'lroa'", "did you mean lora? choices: full, freeze, lora,"),
    "an unknown inner tag": (
        "compress: {quantization: {kind: int3}}",
        "compress.quantization (line 5)",
        "choices: int8, int4, bnb_int8, bnb_nf4",
    ),
    "another task": (
        "task: {kind: sort}",
        "task (line 5): there is no kind 'sort'",
        "kind: classification or multi_label_classification or",
    ),
    "a choice": ("precision: bf61", "precision (line 5): 'bf61' is none of 'auto', 'fp32', 'bf16' or 'fp16'", "did you mean bf16?"),
    "a choice of numbers": ("workers: {gpus_per_worker: 2}", "workers.gpus_per_worker (line 5): 2 is none of 0 or 1", ""),
    "too little": ("optim: {learning_rate: 0}", "optim.learning_rate (line 5): 0: it should be greater than 0", ""),
    "too much": ("serve: {http: {port: 70000}}", "serve.http.port (line 5): 70000: it should be less than or equal to 65535", ""),
    "endless": ("optim: {learning_rate: .inf}", "optim.learning_rate (line 5): .inf: it should be a finite number", ""),
    "no number at all": ("optim: {weight_decay: .nan}", "optim.weight_decay (line 5): .nan: it should be a finite number", ""),
    "one label": (
        CLASSES + " [a]}",
        "task.labels (line 5): a list: it has 1 items and should have at least 2",
        "",
    ),
    "a label twice": (
        CLASSES + " [a, b, a]}",
        "task (line 5): labels names ['a'] twice; each label stands once",
        "",
    ),
    "more replicas at least than at most": ("serve: {autoscaling: {min_replicas: 3}}", "min_replicas=3 is more than max_replicas=1", ""),
    "an engine without a model": (
        "serve: {engine: {kind: echo}}",
        "serve.engine (line 5): there is no kind 'echo'",
        "encoder or encoder_decoder or torch",
    ),
    "an engine that continues texts for one that has labels": (
        "serve: {engine: {kind: torch}}",
        "serve.engine.kind=torch continues texts, and task.kind=classification does not; serve.engine.kind=encoder, or leave it out",
        "",
    ),
    "an encoder's engine for a chat": (
        "task: {kind: chat}\nserve: {engine: {kind: encoder}}",
        "serve.engine.kind=encoder answers with what an encoder's head says, and task.kind=chat does not; serve.engine.kind=torch",
        "",
    ),
    "an engine that continues texts for what is masked": (
        "task: {kind: pretrain, objective: {kind: masked}}\nserve: {engine: {kind: torch}}",
        "continues texts, and task.kind=pretrain with task.objective.kind=masked does not; serve.engine.kind=encoder, or leave it out",
        "",
    ),
    "an engine that writes a text for a text for a chat": (
        "task: {kind: chat}\nserve: {engine: {kind: encoder_decoder}}",
        "serve.engine.kind=encoder_decoder writes a text for a text, and task.kind=chat does not; serve.engine.kind=torch",
        "",
    ),
    "virtual tokens that no engine puts there": (
        "task: {kind: chat}\ntuning: {kind: p_tuning}\nserve: {}",
        "which tuning.kind=p_tuning has learned; leave serve out (danlu predict answers), or tuning.kind=lora",
        "",
    ),
    "one checkpoint": ("checkpoint: {save_total_limit: 1}", "1: it should be greater than or equal to 2", ""),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_mistake_is_said_with_its_field_its_line_and_what_would_work(name: str) -> None:
    text, problem, fix = PROBLEMS[name]
    said = refusal(JOB + text)
    assert problem in said
    assert fix in said
    assert said.startswith("job.yaml: ")
    assert "problems" not in said, "one mistake is one problem"


SERVICE_PROBLEMS = {
    "an encoder without a bundle": ("", "bundle is needed by engine.kind=encoder: name@alias, name@v1, a folder or a URI", ""),
    "an echo with one": ("engine: {kind: echo}\nbundle: a@v1", "bundle has no effect with engine.kind=echo; leave it out", ""),
    "a language model without one": ("engine: {kind: torch}", "engine.kind=torch needs a model, and one only", ""),
    "a language model with two": ("engine: {kind: torch, model_name_or_path: m}\nbundle: a@v1", "one only: bundle or engine.", ""),
    "a step too small for its sequences": (
        "engine: {kind: torch, model_name_or_path: m, max_num_seqs: 8, max_num_batched_tokens: 8}",
        "leaves no room for prompts beside max_num_seqs=8 running sequences; at least 9",
        "",
    ),
    "more adapters than fit": (
        "bundle: a@v1\nengine: {kind: torch, adapters: {a: b, c: d}, max_loras: 1}",
        "2 adapters are more than max_loras=1; max_loras: 2",
        "",
    ),
    "an adapter of a name that no client can ask for": (
        "bundle: a@v1\nengine: {kind: torch, adapters: {a b: c}}",
        "'a b': letters, digits and -_.:/ are needed, a letter or a digit first, 128 at most",
        "a-b",
    ),
    "an adapter named as the service": (
        "bundle: a@v1\nengine: {kind: torch, adapters: {topics: c}}",
        "engine.adapters has one named 'topics', as the service's own model is; another name",
        "",
    ),
    "a cache larger than any memory": (
        "bundle: a@v1\nengine: {kind: torch, kv_cache_memory_gb: 1.0e300}",
        "engine.kv_cache_memory_gb (line 4): 1.0e300: it should be less than or equal to 100000",
        "",
    ),
    "vLLM without a model": ("engine: {kind: vllm}", "engine.kind=vllm needs a model, and one only", ""),
    "vLLM with other weights than were evaluated": (
        "engine: {kind: vllm, quantization: fp8}\nbundle: a@v1",
        "engine.quantization=fp8 would serve other weights than the bundle's, which were evaluated; leave it out",
        "",
    ),
    **{
        f"vLLM's flag {flag}": (f"engine: {{kind: vllm, args: ['{flag}']}}\nbundle: a@v1", told, "")
        for flag, told in {
            "--tensor-parallel-size=2": "is vLLM's --tensor-parallel-size, which Danlu sets; instead: engine.tensor_parallel_size",
            "--max_model_len": "is vLLM's --max-model-len, which Danlu sets; instead: engine.max_model_len",
            "--max-model": "'--max-model' is vLLM's --max-model-len",
            "--no-enable-prefix-caching": "is vLLM's --enable-prefix-caching, which Danlu sets",
            "--api-key": "instead: auth.keys_file",
            "-tp": "'-tp' is short for a longer flag",
            "fp8": "'fp8' is no flag; a flag first",
        }.items()
    },
    "vLLM on several CPUs": (
        "engine: {kind: vllm, device: cpu, tensor_parallel_size: 2}\nbundle: a@v1",
        "tensor_parallel_size=2 has no effect with device=cpu; raise num_threads",
        "",
    ),
    "a revision of a bundle": (
        "engine: {kind: torch, revision: main}\nbundle: a@v1",
        "revision has no effect without model_name_or_path",
        "",
    ),
    "the other engine's field": (
        "engine: {kind: echo, num_threads: 3}",
        "engine.num_threads (line 3)",
        "only kind: encoder",
    ),
    "a port at the top": ("bundle: a@v1\nport: 80", "port (line 4): there is no such field here", "it belongs at http.port"),
    "a model for a bundle": ("bundle: a@v1\nmodel: b", "model (line 4): there is no such field here", "here that is bundle"),
    "no labels": ("engine: {kind: echo, labels: []}", "engine.labels (line 3): a list: it has 0 items and should have at least 1", ""),
}


@pytest.mark.parametrize("name", SERVICE_PROBLEMS)
def test_a_mistake_in_a_service_is_said_too(name: str) -> None:
    text, problem, fix = SERVICE_PROBLEMS[name]
    said = refusal(SERVICE + text, kind=Service)
    assert problem in said
    assert fix in said


def test_a_bad_name_comes_back_as_one_that_works() -> None:
    for name in ("Topics", "my_topics", "3-topics", "a" * 60, "topics-", "Reuters R8 (丹炉)"):
        said = refusal(JOB, f"name={name}")
        assert "lower-case letters, digits and dashes are needed" in said
        assert parse(TrainJob, JOB, [f"name={said.rpartition('try: ')[2]}"])
    assert "try:" not in refusal(JOB, "name=丹炉")


def test_a_mistake_in_an_item_of_a_list_is_said_with_the_items_kinds_and_fields() -> None:
    said = refusal(JOB, "data.clean=[{kind: lenght}]")
    assert "data.clean.0 (--set): there is no kind 'lenght'" in said

    assert "drop_broken" in said
    assert "data.clean.0.zzz (--set): there is no such field here\n  try: fields here: kind" in refusal(
        JOB, "data.clean=[{kind: deduplicate_near, zzz: 3}]"
    )


def test_what_is_not_finite_is_no_number_to_try() -> None:
    for text in ("nan", "inf", "-inf"):
        assert refusal(JOB, f"optim.learning_rate={text}").endswith(f"'{text}': a number is needed")


def test_a_mapping_with_one_needed_field_says_how_to_write_it() -> None:
    said = refusal("kind: train\nname: a\nmodel: bert\ndata: rows.csv\n")
    assert "model: {model_name_or_path: bert}" in said
    assert "data: {train: rows.csv}" in said
    assert parse(TrainJob, "kind: train\nname: a\nmodel: {model_name_or_path: bert}\ndata: {train: rows.csv}\n")


def test_a_field_that_takes_a_text_or_a_list_is_one_problem() -> None:
    base = JOB.replace("data: {train: t.csv}\n", "")
    assert "data.train (line 4): 5: a text or a list is needed" in refusal(base + "data: {train: 5}\n")
    said = refusal(base + "data:\n  train:\n    - 1\n    - ''\n")
    assert "2 problems" in said
    assert 'data.train.0 (line 6): 1: a text is needed\n    try: in quotes: "1"' in said
    assert "data.train.1 (line 7): '': it should not be empty" in said


def test_everything_that_is_wrong_is_said_at_once_each_with_its_line() -> None:
    said = refusal(
        "kind: train\n"
        "name: topics\n"
        "data: {trian: t.csv}\n"
        "optim:\n"
        "  learning_rate: '1e-4'\n"
        "  schedule:\n"
        "    kind: linaer\n"
        "tuning: {kind: loora}\n"
        "global_batch_size: 1.5\n"
        "lr: 3\n"
    )
    assert said.startswith("job.yaml: 8 problems\n")
    for told in (
        "  model: this field is needed\n",
        "  data.train (line 3): this field is needed\n",
        "  data.trian (line 3): there is no such field here\n    try: did you mean data.train?",
        "  optim.learning_rate (line 5): '1e-4': a number is needed\n",
        "  optim.schedule (line 6): there is no kind 'linaer'\n    try: did you mean linear?",
        "  tuning (line 8): there is no kind 'loora'\n    try: did you mean lora?",
        "  global_batch_size (line 9): 1.5: a whole number is needed\n",
        "  lr (line 10): there is no such field here\n    try: here that is optim.learning_rate",
    ):
        assert told in said


@pytest.mark.parametrize(
    ("batch", "micro", "workers"), [(30, 8, 1), (1, 8, 2), (33, 8, 2), (100, 16, 3), (7, 4, 1), (32, 8, 999), (999, 1, 1000)]
)
def test_a_batch_that_does_not_divide_comes_back_with_numbers_that_work(batch: int, micro: int, workers: int) -> None:
    settings = [f"global_batch_size={batch}", f"micro_batch_size={micro}", f"workers.num_workers={workers}"]
    said = refusal(JOB, *settings)
    assert f"global_batch_size={batch} is not a multiple of micro_batch_size x workers.num_workers = {micro} x {workers}" in said
    found = re.search(r"nearest that works: (\d+)", said)
    assert found
    nearest = int(found[1])
    assert parse(TrainJob, JOB, [*settings, f"global_batch_size={nearest}"]).accumulation_steps >= 1
    multiples = range(micro * workers, 3 * max(batch, micro * workers), micro * workers)
    assert abs(nearest - batch) == min(abs(multiple - batch) for multiple in multiples)
    others = re.search(r"or workers.num_workers: ([\d, ]+)", said)
    assert (others is not None) == (batch % micro == 0)
    for number in others[1].split(", ") if others else ():
        assert parse(TrainJob, JOB, [*settings, f"workers.num_workers={number}"])


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_names_a_field_that_there_is(name: str) -> None:
    hint = HINTS[name]
    if hint.startswith("nothing: "):
        return
    first = re.match(r"[a-z_.]+", hint)
    assert first
    assert first[0] in PATHS
    for told in re.findall(r"\b[a-z]+(?:[._][a-z_.]+)+\b", re.sub(r"\{.*\}", "", hint)):
        assert told in PATHS, told
    if setting := re.fullmatch(r"([a-z_.]+): (\{.*\}|[\w-]+)", hint):
        text = JOB + "workers: {num_workers: 2}\n" + ("tuning: {kind: lora}\n" if setting[1].startswith("tuning.") else "")
        assert parse(TrainJob, text, [f"{setting[1]}={setting[2]}"])


@pytest.mark.parametrize("name", HINTS)
def test_a_foreign_name_is_answered_with_ours_or_is_ours(name: str) -> None:
    """At the top of a job, where the other tools' flat files have it."""
    kind, base = (TrainJob, JOB) if HINTS[name] != "bundle" else (Service, SERVICE + "bundle: a@v1\n")
    if name in paths_of(kind):
        return
    said = refusal(f"{base}{name}: 1\n", kind=kind)
    assert HINTS[name] in said


FOREIGN = {
    "model_name_or_path": "model.model_name_or_path",
    "cutoff_len": "model.max_length",
    "sequence_len": "model.max_length",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size = micro_batch_size x accumulation passes x workers.num_workers",
    "lr_scheduler_type": "optim.schedule.kind",
    "finetuning_type": "tuning.kind",
    "lora_rank": "tuning.r",
    "lora_target": "tuning.target_modules",
    "lora_alpha": "it belongs at tuning.lora_alpha",
    "bf16": "precision: bf16",
    "deepspeed": "parallel: {kind: deepspeed, zero_stage: 2}",
    "output_dir": "storage",
    "num_epochs": "num_train_epochs",
    "load_in_4bit": "compress.quantization: {kind: bnb_nf4}",
    "batch_size": "global_batch_size (all workers) or micro_batch_size (one pass of one worker)",
    "load_best_model_at_end": "the best weights of the dev split are always the ones stored",
    "infer_backend": "serve.engine.kind",
    "min_replicas": "serve.autoscaling.min_replicas",
    "dtype": "here that is precision",
}


def test_another_tools_whole_file_is_answered_field_by_field() -> None:
    said = refusal(JOB + "".join(f"{name}: 1\n" for name in FOREIGN))
    assert said.startswith(f"job.yaml: {len(FOREIGN)} problems")
    for line, (name, ours) in enumerate(FOREIGN.items(), 5):
        assert re.search(rf"^  {name} \(line {line}\): there is no such field here\n    try: .*{re.escape(ours)}$", said, re.MULTILINE), (
            name
        )


def test_a_hint_for_another_kind_of_spec_is_not_given() -> None:
    assert "bundle" not in refusal(JOB + "model_id: a\n")
    assert "precision" not in refusal(SERVICE + "bundle: a@v1\ntorch_dtype: bf16\n", kind=Service)
