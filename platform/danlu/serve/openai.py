"""Wire types: response bodies that every engine has, errors in OpenAI's shape. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from danlu.errors import RequestError


def models_response(names: Sequence[str], created: int) -> dict[str, Any]:
    """`GET /v1/models`."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "danlu"} for name in names]}


def error_response(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    message = f"{error.problem}. Try: {error.fix}" if error.fix else error.problem
    return {"error": {"message": message, "type": error.kind, "param": error.param, "code": error.status}}
