"""Tiny real objects shared by the tests: a model of a few thousand weights, a tokenizer, rows that can be learned, a local Ray."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

# Its share of the cores: `make test` runs two of these processes side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A shell's background job ignores Ctrl-C, and so does all that it starts; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from danlu.spec.task import EncoderTask
    from danlu.tasks.rows import Split, Splits


ORDER = ("ray", "soak", "e2e", "distributed", "unit/train", "unit/tasks", "unit/serve", "unit")
"""Folders, those of the longest tests first, so that two processes end at about the same time. What needs a Ray comes before the units,
which find none (see unit/conftest.py)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(folder).as_posix()
        return next((i for i, name in enumerate(ORDER) if path.startswith(f"{name}/")), len(ORDER))

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process, and all on a Ray in the same one: it starts once, and what one file trains serves the next."""
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith("tests/ray/") else super()._split_scope(nodeid)

    return OneRay(config, log)


TOPICS = {
    "grain": ["wheat", "corn", "harvest", "tonnes", "maize"],
    "ship": ["vessel", "port", "cargo", "strike", "tanker"],
    "trade": ["tariff", "export", "deficit", "import", "quota"],
}
FILLER = ["the", "a", "of", "and", "said", "new", "year", "market", "price", "on", "in", "rose", "fell", "group", "report"]


def make_rows(number: int, seed: int) -> list[dict[str, str]]:
    """`number` rows of 3 to 20 words; two of them tell the label."""
    draw = random.Random(seed)
    rows = []
    for i in range(number):
        label = list(TOPICS)[i % len(TOPICS)]
        words = draw.choices(FILLER, k=draw.randint(1, 18)) + draw.choices(TOPICS[label], k=2)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_tokenizer(folder: Path, more: str = "") -> int:
    """A WordPiece tokenizer of the rows' words, and of the characters in `more`; its number of entries."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *(word for topic in TOPICS.values() for word in topic)]
    words += list("abcdefghijklmnopqrstuvwxyz") + [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    words += list(dict.fromkeys(more))
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    fast.save_pretrained(folder)
    return len(words)


def write_tiny_decoder(folder: Path, *, hidden_size: int = 32, layers: int = 2) -> Path:
    """A Qwen3 with random weights and tied embeddings, as a Hugging Face folder; its texts end with [SEP]."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vocabulary = write_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def write_tiny_model(folder: Path, *, hidden_size: int = 32, layers: int = 2, more: str = "") -> Path:
    """A BERT with random weights, as a Hugging Face folder."""
    import torch
    from transformers import BertConfig, BertModel

    vocabulary = write_tokenizer(folder, more)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def split_of(labels: object, texts: list[str] | None = None) -> Split:
    """Labels as a split, for scoring outputs against."""
    import numpy as np

    from danlu.data.columns import Labelled
    from danlu.data.encode import Encoded
    from danlu.tasks.rows import Split

    array = np.asarray(labels)
    rows = len(array)
    encoded = Encoded(np.zeros(rows, np.int32), np.arange(rows + 1), np.zeros(rows, bool))
    return Split(encoded, array, Labelled(texts or [""] * rows, None, None, list(range(1, rows + 1)), {}))


CHINESE = "小明在北京大学读书他喜欢苹果和香蕉谁哪里"


class Reader:
    """Writes files and reads them as a task does."""

    def __init__(self, tokenizer_folder: Path, folder: Path) -> None:
        from danlu.tasks.tokenizer import load_tokenizer

        self.tokenizer, self.folder = load_tokenizer(tokenizer_folder), folder

    def write(self, name: str, content: str | list[Any]) -> str:
        text = content if isinstance(content, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)

    def given(self, task: EncoderTask, path: str, names: list[str] | None = None, max_length: int = 32, **data: Any) -> Split:
        from danlu.spec.data import Data
        from danlu.tasks.task import encoder_file

        spec = Data.model_validate({"train": "-", "cache_dir": str(self.folder / "cache"), **data})
        return encoder_file(task).given_split(path, spec, task, self.tokenizer, names or [], max_length=max_length)

    def splits(self, task: EncoderTask, path: str, max_length: int = 32, **data: Any) -> Splits:
        from danlu.spec.data import Data
        from danlu.tasks.task import encoder_file

        spec = Data.model_validate({"train": path, "cache_dir": str(self.folder / "cache"), "dev_size": 0.25, **data})
        return encoder_file(task).splits(spec, task, self.tokenizer, max_length=max_length, seed=3)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, CHINESE)
    return folder


@pytest.fixture
def reader(tokenizer_folder: Path, tmp_path: Path) -> Reader:
    return Reader(tokenizer_folder, tmp_path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_decoder(tmp_path_factory.mktemp("tiny-qwen3"))


@pytest.fixture(scope="session")
def topic_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """train.csv (180 rows) and test.csv (60 rows)."""
    import pandas

    folder = tmp_path_factory.mktemp("topics")
    for name, number, seed in (("train", 180, 1), ("test", 60, 2)):
        pandas.DataFrame(make_rows(number, seed)).to_csv(folder / f"{name}.csv", index=False)
    return {name: str(folder / f"{name}.csv") for name in ("train", "test")}


@pytest.fixture(scope="session")
def write_spec(tiny_model: Path, topic_files: dict[str, str]) -> Callable[..., Path]:
    """Writes the spec of a cheap job on two workers into a folder; keywords replace its fields."""

    def write(path: Path, **overrides: Any) -> Path:
        fields: dict[str, Any] = {
            "kind": "train",
            "name": "topics",
            "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
            "data": topic_files,
            "parallel": {"kind": "deepspeed", "zero_stage": 2},
            "workers": {"num_workers": 2},
            "optim": {"learning_rate": 3e-3, "schedule": {"kind": "constant"}},
            "precision": "fp32",
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "max_steps": 60,
            "compress": {"quantization": {"kind": "int8"}, "max_quality_drop": 1.0, "min_speedup": 1e-9},
            "serve": {"http": {"port": 0}},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(fields | overrides))
        return path

    return write


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    import stores

    with stores.amazon() as endpoint:
        yield endpoint


@pytest.fixture
def s3_uri(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in an object store, found as on a user's machine: by the variables that Amazon's own tools read."""
    import stores

    for name, value in {**stores.ENVIRONMENT, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{stores.BUCKET}/{tmp_path.parent.name}/{tmp_path.name}"


@pytest.fixture(params=["folder", "memory", "s3"])
def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of this machine, and stores that can neither rename nor append."""
    match request.param:
        case "folder":
            return str(tmp_path / "runs")
        case "memory":
            return f"memory://{tmp_path.name}/runs"
        case _:
            return str(request.getfixturevalue("s3_uri"))


@pytest.fixture(scope="session")
def ray_local() -> Iterator[object]:
    """One Ray of our own for the whole session."""
    import ray
    from ray._private import parameter

    from danlu import local_ray

    # `ray.init` has no word for this port, and of two Rays on one machine the second could not take jobs.
    parameter.RayParams = partial(parameter.RayParams, dashboard_agent_listen_port=0)
    # As in the image: `python`, which jobs are started with, is the one that has Danlu.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, value in (local_ray.ENVIRONMENT | local_ray.OF_THIS_MACHINE).items():
        os.environ.setdefault(name, value)
    context = ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=0, log_to_driver=False)
    yield context
    ray.shutdown()


@pytest.fixture
def spans() -> Iterator[Callable[[], dict[str, list[Any]]]]:
    """Traces are on; a call gives what was made so far, by name, as OpenTelemetry's SDK exports it."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from danlu import traces

    memory = InMemorySpanExporter()

    def found() -> dict[str, list[Any]]:
        traces.flush()
        by_name: dict[str, list[Any]] = {}
        for span in memory.get_finished_spans():
            by_name.setdefault(span.name, []).append(span)
        return by_name

    traces.begin("tests", exporter=memory)
    yield found
    traces.end()


@pytest.fixture
def log_lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Log lines are JSON, as in a replica; a call gives those written since the last one."""
    import logging

    from danlu import logs

    logs.begin("json", service="tests")
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    logger = logging.getLogger("danlu")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
