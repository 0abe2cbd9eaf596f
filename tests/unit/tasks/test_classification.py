"""Rows, model, loss, metrics and prediction of classification, against plain transformers and scikit-learn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import make_rows, split_of
from rich.cells import cell_len
from safetensors.torch import load_file, save_file
from sklearn import metrics
from torch import nn
from transformers import AutoModelForSequenceClassification

from danlu.data.cells import right
from danlu.data.pack import pack_rows
from danlu.errors import DataError, ModelError
from danlu.spec.data import Data
from danlu.spec.task import Classification
from danlu.tasks.classification import build_model, given_split, head_parameters, loss, predictions, scores, splits
from danlu.tasks.exchange import Text
from danlu.tasks.packed import PackedClassifier
from danlu.tasks.predictor import Predictor, load_predictor
from danlu.tasks.rows import Splits
from danlu.tasks.tokenizer import load_tokenizer

NAMES = ["grain", "ship", "trade"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than such small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier whose answers differ from row to row."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    model = build_model(tiny_model, NAMES)
    nn.init.normal_(model.classifier.weight, std=1.0)
    model.save_pretrained(folder)
    load_tokenizer(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(classifier: Path) -> Predictor:
    return load_predictor(classifier, NAMES, max_length=16)


def plain_logits(folder: Path, texts: list[str], pairs: list[str] | None = None) -> np.ndarray:
    """One text at a time through plain transformers: no packing, no padding."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), load_tokenizer(folder)
    rows = []
    for i, text in enumerate(texts):
        batch = tokenizer(
            text, None if pairs is None else pairs[i], truncation=True, max_length=16, return_tensors="pt", return_token_type_ids=True
        )
        with torch.no_grad():
            rows.append(model(**batch).logits[0].numpy())
    return np.stack(rows)


def texts(number: int, seed: int = 5) -> list[str]:
    return [row["text"] for row in make_rows(number, seed)]


# rows


def load(tiny_model: Path, task: Classification | None = None, **data: Any) -> Splits:
    return splits(Data.model_validate(data), task or Classification(), load_tokenizer(tiny_model), max_length=16, seed=7)


def test_rows_labels_and_names_belong_together(tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    found = load(tiny_model, **topic_files, cache_dir=str(tmp_path))
    assert found.label_names == NAMES
    assert found.test is not None
    frame = pandas.read_csv(topic_files["test"])
    assert [found.label_names[label] for label in found.test.labels] == list(frame["label"])
    tokenizer = load_tokenizer(tiny_model)
    for i, text in enumerate(frame["text"]):
        assert found.test.encoded.row(i).tolist() == tokenizer(text, truncation=True, max_length=16)["input_ids"]
    for split in (found.train, found.dev):
        for i in range(len(split.labels)):
            assert split.encoded.row(i).tolist() == tokenizer(split.texts.texts[i], truncation=True, max_length=16)["input_ids"]
            assert found.label_names[split.labels[i]] == (split.texts.labels or [])[i]
    numbers = sorted(found.train.texts.row_numbers + found.dev.texts.row_numbers)
    assert numbers == list(range(1, 181))
    assert len(found.dev.labels) == 18
    assert np.bincount(found.dev.labels).tolist() == [6, 6, 6]
    assert found.report.splits["train"].rows == 180


def test_a_dev_file_takes_nothing_from_train(tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    found = load(tiny_model, train=topic_files["train"], dev=topic_files["test"], cache_dir=str(tmp_path))
    assert (len(found.train.labels), len(found.dev.labels), found.test) == (180, 60, None)


def test_labels_stand_in_the_tasks_order(tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    task = Classification(labels=["trade", "none", "ship", "grain"])
    found = load(tiny_model, task, **topic_files, cache_dir=str(tmp_path))
    assert found.label_names == ["trade", "none", "ship", "grain"]
    assert found.train.labels.max() == 3
    assert 1 not in found.train.labels


def test_bad_rows_are_refused_before_anything_is_tokenised(tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    frame = pandas.read_csv(topic_files["test"])
    frame.loc[4, "label"] = "gold"
    frame.to_csv(tmp_path / "test.csv", index=False)
    for split in ("dev", "test"):
        with pytest.raises(DataError, match="row 5 has the label 'gold'") as told:
            load(tiny_model, train=topic_files["train"], **{split: str(tmp_path / "test.csv")}, cache_dir=str(tmp_path / "cache"))
        assert told.value.where == f"data.{split}"
    (tmp_path / "none.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="a header but no rows"):
        load(tiny_model, train=topic_files["train"], dev=str(tmp_path / "none.csv"), cache_dir=str(tmp_path / "cache"))
    frame.assign(label="ship").to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(DataError, match="every row has the same label, 'ship'"):
        load(tiny_model, train=str(tmp_path / "one.csv"), cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_rows_given_for_scoring_are_checked_like_the_jobs(tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    data, tokenizer = Data(train="unused", cache_dir=str(tmp_path)), load_tokenizer(tiny_model)
    split = given_split(topic_files["test"], data, Classification(), tokenizer, NAMES, max_length=16)
    assert [NAMES[label] for label in split.labels] == list(pandas.read_csv(topic_files["test"])["label"])
    with pytest.raises(DataError, match="row 1 has the label 'grain'"):
        given_split(topic_files["test"], data, Classification(), tokenizer, ["ship", "trade"], max_length=16)


# model


def test_a_classifier_of_other_labels_gets_a_new_head(classifier: Path) -> None:
    model = build_model(classifier, ["a", "b"])
    assert model.classifier.out_features == 2
    assert model.config.id2label == {0: "a", 1: "b"}
    before = load_file(classifier / "model.safetensors")
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, before["bert.embeddings.word_embeddings.weight"])


def test_the_head_is_what_starts_from_nothing(tiny_model: Path) -> None:
    assert head_parameters(build_model(tiny_model, NAMES)) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "of another size"])
def test_weights_that_are_not_the_encoders_are_refused(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    tensor = weights.pop(name)
    save_file(
        weights | ({} if damage == "missing" else {name: tensor[:, :-1].contiguous()}), folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"1 of the encoder's parameters, such as bert\.encoder\.layer\.1\.output\.dense\.weight"):
        build_model(folder, NAMES)


def test_dropout_is_the_specs_or_the_models_own(tiny_model: Path) -> None:
    for dropout, expected in ((0.3, 0.3), (None, 0.0)):
        model = build_model(tiny_model, NAMES, dropout=dropout)
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {expected}


def test_a_folder_without_a_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer") as raised:
        load_tokenizer(folder)
    assert raised.value.where == "model.model_name_or_path"
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded"):
        load_tokenizer(folder)


# loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_sum_over_rows_of_plain_cross_entropy(classifier: Path, predictor: Predictor, smoothing: float) -> None:
    rows = make_rows(12, 5)
    labels = np.array([NAMES.index(row["label"]) for row in rows])
    batch = pack_rows(predictor.encode([row["text"] for row in rows]), range(12), labels)
    with torch.no_grad():
        found = loss(predictor.model, batch, Classification(label_smoothing=smoothing))
    logits = torch.from_numpy(plain_logits(classifier, [row["text"] for row in rows]))
    expected = sum(
        nn.functional.cross_entropy(row[None], torch.tensor([label]), label_smoothing=smoothing)
        for row, label in zip(logits, labels, strict=True)
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


# metrics


def scored(number: int, present: list[int], classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = draw.choice(present, number)
    logits = draw.normal(size=(number, classes)).astype(np.float32)
    logits[np.arange(number), labels] += 1.0
    return logits, labels


@pytest.mark.parametrize("present", [[0, 1, 2, 3], [0, 2], [3]], ids=["all classes", "absent classes", "one class"])
def test_scores_are_scikit_learns(present: list[int]) -> None:
    logits, labels = scored(200, present)
    names = ["a", "b", "c", "d"]
    found = scores(logits, split_of(labels), names, Classification())
    predicted = logits.argmax(1)
    probabilities = torch.from_numpy(logits).double().softmax(-1).numpy()
    assert found.accuracy == metrics.accuracy_score(labels, predicted)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, predicted, labels=sorted(set(labels)), average="macro"))
    assert found.loss == pytest.approx(metrics.log_loss(labels, probabilities, labels=range(4)))
    assert found.confusion == metrics.confusion_matrix(labels, predicted, labels=range(4)).tolist()
    report = metrics.classification_report(labels, predicted, labels=range(4), target_names=names, output_dict=True, zero_division=0)
    for name in names:
        theirs = report[name]
        ours = found.per_class[name]
        assert [ours["precision"], ours["recall"], ours["f1"], ours["support"]] == pytest.approx(
            [theirs["precision"], theirs["recall"], theirs["f1-score"], theirs["support"]]
        )
    assert found.metrics() == {"accuracy": found.accuracy, "macro_f1": found.macro_f1, "loss": found.loss}
    assert found.num_rows == 200


def test_certain_wrong_answers_have_a_finite_loss() -> None:
    logits = np.array([[1e4, 0.0], [0.0, 1e4]], dtype=np.float32)
    found = scores(logits, split_of([1, 0]), ["a", "b"], Classification())
    assert (found.accuracy, found.loss) == (0.0, pytest.approx(1e4))


# prediction


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_logits_are_those_of_plain_transformers_one_by_one(classifier: Path, predictor: Predictor, paired: bool, batch_tokens: int) -> None:
    pairs = texts(30, 6) if paired else None
    found = predictor.outputs(predictor.encode(texts(30), pairs), batch_tokens=batch_tokens)
    expected = plain_logits(classifier, texts(30), pairs)
    assert found.dtype == np.float32
    assert np.ptp(expected, axis=0).min() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_predictions_name_the_most_probable_label(classifier: Path, predictor: Predictor) -> None:
    found = predictor.predict(texts(20))
    expected = torch.from_numpy(plain_logits(classifier, texts(20))).softmax(-1)
    assert [prediction.label for prediction in found] == [NAMES[int(row.argmax())] for row in expected]
    np.testing.assert_allclose([prediction.probabilities for prediction in found], expected, atol=1e-5)
    assert predictions(np.array([[0.0, np.log(3.0)]]), split_of([0]).encoded, [Text("a")], ["a", "b"], Classification())[
        0
    ].probabilities == pytest.approx([0.25, 0.75])


def test_bf16_stays_near_float32(classifier: Path, predictor: Predictor) -> None:
    bf16 = load_predictor(classifier, NAMES, max_length=16, bf16=True)
    one, other = (which.outputs(which.encode(texts(20))) for which in (predictor, bf16))
    assert other.dtype == np.float32
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(one, other, atol=0.1)


def test_a_predictor_never_drops_out(tiny_model: Path) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_model, NAMES, dropout=0.5).train()
    predictor = Predictor(PackedClassifier(model), load_tokenizer(tiny_model), NAMES, max_length=16)
    assert predictor.predict(texts(5)) == predictor.predict(texts(5))


def test_tables_stand_straight_in_a_terminal_also_where_a_character_takes_two_cells() -> None:
    names = ["好评", "neutral", "é"]
    found = scores(np.eye(3, dtype=np.float32), split_of(np.arange(3)), names, Classification())
    lines = found.text().splitlines()
    for table in (lines[2:6], lines[7:11]):
        assert len({cell_len(line) for line in table}) == 1, table
    assert cell_len(right("中立的一般评价", 7)) == 7
