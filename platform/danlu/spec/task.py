"""What the model learns to do."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import Spec


class Classification(Spec):
    """One label per text, out of two or more."""

    kind: Literal["classification"] = "classification"

    labels: Annotated[list[str], Field(min_length=2, json_schema_extra={"uniqueItems": True})] | None = None
    """Label names in the order of the model's outputs. Unset: the sorted distinct labels of the training rows."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            twice = sorted({name for name in self.labels if self.labels.count(name) > 1})
            raise ValueError(f"labels names {twice} twice; each label stands once")
        return self


class Pretrain(Spec):
    """Causal language modelling: every next token of plain text, by a pretrained decoder that goes on learning.

    Texts longer than `model.max_length` are cut into pieces of that length, none of which is lost.
    """

    kind: Literal["pretrain"] = "pretrain"


Task = Annotated[Classification | Pretrain, Field(discriminator="kind")]

METRICS: dict[str, tuple[str, ...]] = {"classification": ("accuracy", "macro_f1", "loss"), "pretrain": ("loss",)}
"""What a task's dev split is scored by; the first is what chooses the best weights unless the job says otherwise."""
