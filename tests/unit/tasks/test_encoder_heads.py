"""Every encoder task's outputs and losses, against transformers' own head classes, one unpadded sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import make_rows, write_tokenizer
from torch import nn

from danlu.data.pack import Batches, pack_rows
from danlu.spec.data import Data
from danlu.spec.task import (
    Classification,
    Embed,
    EncoderTask,
    ExtractiveQA,
    MultiLabelClassification,
    MultipleChoice,
    Regression,
    TokenClassification,
)
from danlu.tasks.exchange import Choices, Example, Question, Text, split_words
from danlu.tasks.predictor import Predictor
from danlu.tasks.task import encoder_file
from danlu.tasks.tokenizer import load_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES: dict[str, Any] = {
    "bert": lambda n: transformers.BertConfig(vocab_size=n, max_position_embeddings=64, initializer_range=0.2, **SIZES),
    "roberta": lambda n: transformers.RobertaConfig(
        vocab_size=n, max_position_embeddings=66, type_vocab_size=1, pad_token_id=0, initializer_range=0.2, **SIZES
    ),
    "distilbert": lambda n: transformers.DistilBertConfig(
        vocab_size=n, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64, initializer_range=0.2
    ),
    "electra": lambda n: transformers.ElectraConfig(
        vocab_size=n, embedding_size=16, max_position_embeddings=64, initializer_range=0.2, **SIZES
    ),
}
TEXTS = [row["text"] for row in make_rows(9, 3)]
TASKS: dict[str, tuple[EncoderTask, list[str], list[Example]]] = {
    "classification": (Classification(), ["a", "b", "c"], [Text(text) for text in TEXTS]),
    "pairs": (Classification(), ["a", "b"], [Text(text, other) for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]),
    "multi_label": (MultiLabelClassification(), ["a", "b", "c"], [Text(text) for text in TEXTS]),
    "regression": (Regression(), [], [Text(text, other) for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]),
    "extractive_qa": (ExtractiveQA(), [], [Question(text, " ".join(TEXTS)) for text in TEXTS]),
    "multiple_choice": (MultipleChoice(), [], [Choices(text, tuple(TEXTS[: 2 + i % 3]), TEXTS[-1]) for i, text in enumerate(TEXTS)]),
    "token_classification": (TokenClassification(), ["O", "B-X", "I-X"], [split_words(text) for text in TEXTS]),
    "embedding": (Embed(), [], [Text(text) for text in TEXTS]),
    "embedding, cls": (Embed(pooling="cls"), [], [Text(text) for text in TEXTS]),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than such small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretrained folder of each family."""
    found = {}
    for name, config in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config(write_tokenizer(folder))).save_pretrained(folder)
        found[name] = folder
    return found


def make_predictor(folder: Path, name: str) -> Predictor:
    """A predictor whose head is not near zero, so that answers differ."""
    task, names, _ = TASKS[name]
    file = encoder_file(task)
    torch.manual_seed(1)
    model = file.build_model(folder, names, dropout=0.0)
    for head in ("classifier", "qa_outputs"):
        layer = getattr(model, head, None)
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1.0)
    return Predictor(file.wrap(model, task), load_tokenizer(folder), names, max_length=24, task=task)


def plain(predictor: Predictor, ids: np.ndarray, types: np.ndarray | None) -> np.ndarray:
    """One sequence through the unmodified class, its attention transformers' own."""
    model = own(predictor)
    given: dict[str, Any] = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
    if types is not None and predictor.model.has_segments:
        given["token_type_ids"] = torch.from_numpy(types.astype(np.int64))[None]
    if predictor.task.kind == "multiple_choice":
        given = {name: value[None] for name, value in given.items()}
    with torch.no_grad():
        output = model(**given)
    match predictor.task:
        case ExtractiveQA():
            return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1).numpy()
        case TokenClassification():
            return output.logits[0].numpy()
        case Embed(pooling=pooling):
            hidden = output.last_hidden_state[0]
            vector = hidden.mean(0) if pooling == "mean" else hidden[0]
            return (vector / vector.norm()).numpy()[None]
        case _:
            return output.logits.numpy().reshape(1, -1)


def own(predictor: Predictor) -> Any:
    """The unmodified model, its attention transformers' own again, and nothing to learn."""
    predictor.model.model.set_attn_implementation("sdpa")
    return predictor.model.model.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TASKS)
def test_packed_outputs_are_the_head_classs_own(folders: dict[str, Path], family: str, name: str) -> None:
    predictor = make_predictor(folders[family], name)
    encoded = predictor.encode(TASKS[name][2])
    assert predictor.model.packed, "these families read packed rows"
    found = predictor.outputs(encoded, batch_tokens=60)
    sequences = encoded.sequences
    types = [None if sequences.token_type_ids is None else sequences.token_types(i) for i in range(len(sequences))]
    expected = np.concatenate([plain(predictor, sequences.row(i), types[i]) for i in range(len(sequences))])
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=3e-5)


@pytest.mark.parametrize("name", ["pairs", "extractive_qa", "multiple_choice", "token_classification", "embedding"])
def test_padded_batches_give_the_same(folders: dict[str, Path], name: str) -> None:
    predictor = make_predictor(folders["bert"], name)
    encoded = predictor.encode(TASKS[name][2])
    packed = predictor.outputs(encoded)
    predictor.model.packed = False
    predictor.model.model.set_attn_implementation("sdpa")
    np.testing.assert_allclose(predictor.outputs(encoded, batch_tokens=100), packed, atol=3e-5)


# losses


def test_the_multi_label_loss_is_transformers(folders: dict[str, Path]) -> None:
    predictor = make_predictor(folders["bert"], "multi_label")
    labels = np.random.default_rng(0).integers(0, 2, (len(TEXTS), 3)).astype(np.float32)
    encoded = predictor.encode(TEXTS)
    batch = pack_rows(encoded, range(len(TEXTS)), labels)
    found = float(predictor.file.loss(predictor.model, batch, predictor.task).detach()) / predictor.file.num_targets(batch)
    model = own(predictor)
    assert model.config.problem_type == "multi_label_classification"
    rows = [
        float(model(input_ids=torch.from_numpy(encoded.row(i).astype(np.int64))[None], labels=torch.from_numpy(labels[i : i + 1])).loss)
        for i in range(len(TEXTS))
    ]
    assert found == pytest.approx(np.mean(rows), rel=1e-5)


def test_the_regression_loss_is_transformers(folders: dict[str, Path]) -> None:
    predictor = make_predictor(folders["bert"], "regression")
    labels = np.linspace(0, 5, len(TEXTS)).astype(np.float32)
    encoded = predictor.encode(TEXTS)
    batch = pack_rows(encoded, range(len(TEXTS)), labels)
    found = float(predictor.file.loss(predictor.model, batch, predictor.task).detach()) / predictor.file.num_targets(batch)
    rows = [
        float(
            own(predictor)(
                input_ids=torch.from_numpy(encoded.row(i).astype(np.int64))[None], labels=torch.from_numpy(labels[i : i + 1])
            ).loss
        )
        for i in range(len(TEXTS))
    ]
    assert found == pytest.approx(np.mean(rows), rel=1e-5)


def test_the_span_loss_is_transformers(folders: dict[str, Path]) -> None:
    predictor = make_predictor(folders["bert"], "extractive_qa")
    encoded = predictor.encode(TASKS["extractive_qa"][2]).sequences
    assert len(encoded) > len(TEXTS), "long contexts are several windows"
    lengths = encoded.lengths
    draw = np.random.default_rng(0)
    labels = np.stack([draw.integers(0, lengths), draw.integers(0, lengths)], axis=1)
    batch = pack_rows(encoded, range(len(encoded)), labels)
    found = float(predictor.file.loss(predictor.model, batch, predictor.task).detach()) / predictor.file.num_targets(batch)
    rows = []
    for i in range(len(encoded)):
        ids, types = (torch.from_numpy(part.astype(np.int64))[None] for part in (encoded.row(i), encoded.token_types(i)))
        start, end = (torch.tensor([labels[i, k]]) for k in (0, 1))
        rows.append(float(own(predictor)(input_ids=ids, token_type_ids=types, start_positions=start, end_positions=end).loss))
    assert found == pytest.approx(np.mean(rows), rel=1e-5)


def test_the_choice_loss_is_transformers(folders: dict[str, Path]) -> None:
    predictor = make_predictor(folders["bert"], "multiple_choice")
    examples = TASKS["multiple_choice"][2]
    encoded = predictor.encode(examples)
    assert encoded.groups is not None
    assert len(set(np.diff(encoded.groups).tolist())) == 3, "rows have different numbers of options"
    labels = np.array([i % 2 for i in range(len(examples))])
    batch = pack_rows(encoded, [4, 0, 7, 2], labels)
    found = float(predictor.file.loss(predictor.model, batch, predictor.task).detach()) / predictor.file.num_targets(batch)
    tokenizer, rows = predictor.tokenizer, []
    for i in (4, 0, 7, 2):
        one = examples[i]
        assert isinstance(one, Choices)
        texts = [f"{one.question} {option}" for option in one.options]
        given = tokenizer([one.context] * len(texts), texts, truncation=True, max_length=24, padding=True, return_tensors="pt")
        types = tokenizer([one.context] * len(texts), texts, truncation=True, max_length=24, padding=True, return_token_type_ids=True)
        shaped = {name: given[name][None] for name in ("input_ids", "attention_mask")}
        output = own(predictor)(**shaped, token_type_ids=torch.tensor(types["token_type_ids"])[None], labels=torch.tensor([labels[i]]))
        rows.append(float(output.loss))
    assert found == pytest.approx(np.mean(rows), rel=1e-4)


def test_the_tagging_loss_is_transformers_over_words_first_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    predictor = make_predictor(folders["bert"], "token_classification")
    (tmp_path / "t.conll").write_text("oats B-X\nlinseed I-X\nthe O\n\nwheat O\nquickly B-X\n", encoding="utf-8")
    split = predictor.file.given_split(
        str(tmp_path / "t.conll"),
        Data(train="-", cache_dir=str(tmp_path)),
        predictor.task,
        predictor.tokenizer,
        predictor.label_names,
        max_length=24,
    )
    batch = pack_rows(split.encoded.sequences, [1, 0])
    assert batch.labels is not None
    assert predictor.file.num_targets(batch) == 5
    total = float(predictor.file.loss(predictor.model, batch, predictor.task))
    expected = 0.0
    for words, tags in ((["oats", "linseed", "the"], [1, 2, 0]), (["wheat", "quickly"], [0, 1])):
        given = predictor.tokenizer(words, is_split_into_words=True, return_tensors="pt")
        labels, before = [], None
        for word in given.word_ids(0):
            labels.append(-100 if word is None or word == before else tags[word])
            before = word
        expected += float(own(predictor)(input_ids=given["input_ids"], labels=torch.tensor([labels])).loss) * len(words)
    assert total == pytest.approx(expected, rel=1e-5)


def test_the_contrastive_loss_is_sentence_transformers_formula_with_hard_negatives(folders: dict[str, Path], tmp_path: Path) -> None:
    """Plain: cross-entropy over the cosines with all positives and negatives, divided by the temperature."""
    predictor = make_predictor(folders["bert"], "embedding")
    (tmp_path / "t.jsonl").write_text(
        '{"query": "wheat", "pos": ["corn harvest"], "neg": ["port strike", "quota"]}\n'
        '{"query": "vessel", "pos": ["cargo port"], "neg": []}\n',
        encoding="utf-8",
    )
    split = predictor.file.given_split(
        str(tmp_path / "t.jsonl"), Data(train="-", cache_dir=str(tmp_path)), predictor.task, predictor.tokenizer, [], max_length=24
    )
    batch = pack_rows(split.encoded, [0, 1])
    found = float(predictor.file.loss(predictor.model, batch, predictor.task).detach())
    texts = ["wheat", "vessel", "corn harvest", "port strike", "quota", "cargo port"]
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = own(predictor)(**predictor.tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        vectors.append(hidden.mean(0) / hidden.mean(0).norm())
    cosines = torch.stack(vectors[:2]) @ torch.stack(vectors[2:]).T
    expected = nn.functional.cross_entropy(cosines / 0.05, torch.tensor([0, 3]), reduction="sum")
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["multi_label", "regression", "extractive_qa", "multiple_choice", "token_classification"])
def test_the_loss_of_a_step_does_not_depend_on_ranks_and_micro_batches(folders: dict[str, Path], name: str) -> None:
    predictor = make_predictor(folders["bert"], name)
    encoded = predictor.encode(TASKS[name][2])
    draw = np.random.default_rng(0)
    labels: np.ndarray | None = {
        "multi_label": draw.integers(0, 2, (9, 3)).astype(np.float32),
        "regression": draw.normal(size=9).astype(np.float32),
        "multiple_choice": draw.integers(0, 2, 9),
    }.get(name)
    if name == "extractive_qa":
        encoded = encoded.sequences
        labels = draw.integers(0, 3, (len(encoded), 2))
    if name == "token_classification":
        encoded = replace(encoded, token_labels=draw.integers(0, 3, len(encoded.input_ids)))
    sums = []
    for micro_batch_size, world_size in ((8, 1), (2, 1), (2, 2), (1, 4)):
        made = [
            Batches(encoded, labels, global_batch_size=8, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, seed=3).at(1)
            for rank in range(world_size)
        ]
        batches = [batch for rank in made for batch in rank]
        with torch.no_grad():
            loss = sum(float(predictor.file.loss(predictor.model, batch, predictor.task)) for batch in batches)
        sums.append((loss, sum(predictor.file.num_targets(batch) for batch in batches)))
    for loss, targets in sums[1:]:
        assert loss == pytest.approx(sums[0][0], rel=1e-4)
        assert targets == sums[0][1] > 0
