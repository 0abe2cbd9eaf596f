"""What the model learns to do."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import PositiveFloat, PositiveInt, Spec

Labels = Annotated[list[str], Field(min_length=2, json_schema_extra={"uniqueItems": True})]


def _distinct(labels: list[str] | None) -> None:
    if labels is not None and len(set(labels)) != len(labels):
        twice = sorted({name for name in labels if labels.count(name) > 1})
        raise ValueError(f"labels names {twice} twice; each label stands once")


class Classification(Spec):
    """One label per text or pair of texts, out of two or more."""

    kind: Literal["classification"] = "classification"

    labels: Labels | None = None
    """Label names in the order of the model's outputs. Unset: the sorted distinct labels of the training rows."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        _distinct(self.labels)
        return self


class MultiLabelClassification(Spec):
    """Any number of labels per text or pair of texts, none included: each label is a yes or a no of its own."""

    kind: Literal["multi_label_classification"] = "multi_label_classification"

    labels: Labels | None = None
    """Label names in the order of the model's outputs. Unset: the sorted distinct labels of the training rows."""

    separator: Annotated[str, Field(min_length=1)] = ","
    """What stands between the labels of a row that holds them as one text; rows that hold lists need none."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """A label is given from this probability on."""

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        _distinct(self.labels)
        return self


class Regression(Spec):
    """A number per text or pair of texts, as in STS-B."""

    kind: Literal["regression"] = "regression"


class ExtractiveQA(Spec):
    """A question's answer as a piece of its context, as in SQuAD. A context longer than `model.max_length` is read in windows."""

    kind: Literal["extractive_qa"] = "extractive_qa"

    doc_stride: PositiveInt | None = None
    """Tokens that neighbouring windows share. Unset: a third of model.max_length."""

    max_answer_length: PositiveInt = 30
    """Tokens of an answer at most."""

    n_best_size: PositiveInt = 5
    """How many candidates an answer comes with."""

    version_2_with_negative: bool = False
    """Learn and give "no answer" too, as in SQuAD v2. Otherwise rows without an answer are dropped."""

    null_score_diff_threshold: float = 0.0
    """There is no answer where that scores higher than the best answer by more than this."""

    @model_validator(mode="after")
    def _threshold_has_an_effect(self) -> Self:
        if self.null_score_diff_threshold and not self.version_2_with_negative:
            raise ValueError("null_score_diff_threshold has no effect without version_2_with_negative=true")
        return self


class MultipleChoice(Spec):
    """One of a question's options, any number of them per row: a score for each, and their softmax."""

    kind: Literal["multiple_choice"] = "multiple_choice"


class TokenClassification(Spec):
    """A tag for each word, such as named entities in BIO tags: the word's first token is what is labelled."""

    kind: Literal["token_classification"] = "token_classification"

    labels: Labels | None = None
    """Tags in the order of the model's outputs, such as [O, B-PER, I-PER]; needed where rows hold numbers. Unset: O, then those of the
    training rows."""


class Embed(Spec):
    """A vector per text, near those of texts that belong together: learned from pairs or triplets of texts, each against all other texts
    of its micro-batch (InfoNCE, https://arxiv.org/abs/1807.03748)."""

    kind: Literal["embedding"] = "embedding"

    pooling: Literal["mean", "cls"] = "mean"
    """The vector of a text: the mean of its tokens', or its first token's. It is scaled to length 1."""

    temperature: PositiveFloat = 0.05
    """Cosines are divided by it before the softmax."""


class Pretrain(Spec):
    """Causal language modelling: every next token of plain text, by a pretrained decoder that goes on learning.

    Texts longer than `model.max_length` are cut into pieces of that length, none of which is lost.
    """

    kind: Literal["pretrain"] = "pretrain"


EncoderTask = Classification | MultiLabelClassification | Regression | ExtractiveQA | MultipleChoice | TokenClassification | Embed
"""Tasks of encoders: those that are served by the encoder engine and can be compressed."""

Task = Annotated[EncoderTask | Pretrain, Field(discriminator="kind")]

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "loss"),
    "multi_label_classification": ("micro_f1", "macro_f1", "subset_accuracy", "loss"),
    "regression": ("pearson", "spearman", "mae", "mse"),
    "extractive_qa": ("f1", "exact_match"),
    "multiple_choice": ("accuracy", "loss"),
    "token_classification": ("f1", "precision", "recall", "accuracy"),
    "embedding": ("ndcg_at_10", "mrr", "recall_at_1", "recall_at_10"),
    "pretrain": ("loss",),
}
"""What a task's dev split is scored by; the first is what chooses the best weights unless the job says otherwise."""

LOWER_IS_BETTER = frozenset({"loss", "mae", "mse"})

COLUMNS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "text_pair", "label"),
    "multi_label_classification": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
    "extractive_qa": ("question", "context", "answers"),
    "multiple_choice": ("question", "context", "options", "label"),
    "token_classification": ("tokens", "text", "label"),
    "embedding": ("text", "positive", "negative"),
    "pretrain": ("text", "text_pair", "label"),
}
"""The columns that a task reads, of those `data.columns` can name."""
