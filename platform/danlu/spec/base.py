"""Spec: the frozen, strict base of everything a user writes; and the small types specs share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Spec(BaseModel):
    """Frozen and closed: a misspelt field is an error, and nothing changes a spec after it was validated."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


def _not_a_bool(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


Number = BeforeValidator(_not_a_bool)
"""Beside a Literal of numbers: Python's `True == 1` would let `true` pass for 1."""

DNS_LABEL = r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"
"""47 characters are what KubeRay takes of a RayJob's or RayService's name: it makes longer ones of it."""
DNS_LABEL_RULE = "lower-case letters, digits and dashes are needed, a letter first, no dash last, 47 at most"
MEMORY = r"^[1-9][0-9]*(Mi|Gi|Ti)$"
MEMORY_RULE = "a whole number of Mi, Gi or Ti is needed"
MODEL_NAME = r"^[A-Za-z0-9][-A-Za-z0-9_.:/]{0,127}$"
MODEL_NAME_RULE = "letters, digits and -_.:/ are needed, a letter or a digit first, 128 at most"

DnsLabel = Annotated[str, Field(pattern=DNS_LABEL)]
"""A short DNS label: it also names the RayJob or RayService."""

ModelName = Annotated[str, Field(pattern=MODEL_NAME)]
"""That an adapter answers to, besides its service's model."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
