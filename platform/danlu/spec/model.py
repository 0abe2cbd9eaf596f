"""Which pretrained model a job starts from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from danlu.spec.base import Spec


class Model(Spec):
    """A pretrained model and how much of a text it reads."""

    model_name_or_path: Annotated[str, Field(min_length=1)]
    """A local folder, a hub id (`org/name`), a storage URI (`s3://...`), or `pkg://package/folder`: a folder in an installed package.
    `NAME@ALIAS` or `NAME@v1` goes on from a bundle of the job's storage; an adapter's weights are merged first."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    max_length: Annotated[int, Field(ge=4)] = 512
    """Longest input in tokens; what is longer is cut at the end, and the data report says how much that is."""

    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout on hidden states and attention; unset keeps the model's own."""

    gradient_checkpointing: bool = False
    """Keep only each layer's input and make the rest again for the backward pass: a third more work for a fraction of the activations."""

    @property
    def is_bundle(self) -> bool:
        """True if the name can only be meant for a bundle of the job's storage."""
        return "@" in self.model_name_or_path and "/" not in self.model_name_or_path

    @property
    def is_hub_id(self) -> bool:
        """True if the name can only be meant for a model hub (no scheme, one slash, not a path)."""
        name = self.model_name_or_path
        return "://" not in name and "@" not in name and not name.startswith((".", "/", "~")) and name.count("/") <= 1
