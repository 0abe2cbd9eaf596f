"""Routes whose requests are answered as a whole: `/v1/classify`, `/v1/answer`, `/v1/embeddings` and the others of the engine's task."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from danlu.errors import RequestError
from danlu.metrics import catalog
from danlu.serve.admission import Admission
from danlu.serve.asgi import Call, Reply, Route, Routes
from danlu.serve.encoder_wire import Wire
from danlu.serve.engine import Engine
from danlu.serve.keys import Key
from danlu.serve.openai.common import ModelCard
from danlu.serve.openapi import encoder_paths, encoder_try_it
from danlu.serve.wires import routes_of
from danlu.spec.serve import Limits
from danlu.tasks.exchange import BadExample, Written


class PredictApi:
    """The routes of an engine that answers a task's requests as a whole."""

    def __init__(self, engine: Engine, model: str, limits: Limits, admission: Admission, count: Callable[..., None]) -> None:
        self.engine, self.model, self.limits, self.admission, self.count = engine, model, limits, admission, count
        self.wires = routes_of(engine.task)

    def routes(self) -> Routes:
        return {path: Route("POST", functools.partial(self._predict, wire)) for path, wire in self.wires.items()}

    def models(self) -> list[ModelCard]:
        return [ModelCard(self.model)]

    def paths(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the OpenAPI document: paths and schemas."""
        return encoder_paths(self.model, self.wires, self.engine.labels, self.limits), {}

    def try_it(self) -> str:
        """A form for the docs page."""
        return encoder_try_it(self.model, next(iter(self.wires.values())))

    def cut(self, error: RequestError) -> None:
        """Nothing here lasts longer than a drain may."""

    async def _predict(self, wire: Wire, call: Call) -> Reply:
        request = wire.parse_body(call.body, self.limits.max_inputs)
        check_model(request.model or self.model, [self.model], call.key)
        with self.admission.room_for(1, call.key):
            try:
                answers = await asyncio.wait_for(self.engine.predict(request.inputs), self.limits.request_timeout_s)
            except TimeoutError as error:
                raise RequestError(
                    f"no answer within {self.limits.request_timeout_s:g} s",
                    status=504,
                    kind="server_error",
                    fix="fewer texts, or again later",
                ) from error
            except BadExample as error:
                raise RequestError(error.problem, param=error.field, fix=error.fix) from error
        num_tokens = sum(answer.num_tokens for answer in answers)
        self.count(catalog.SERVE_INPUTS, len(answers))
        self.count(catalog.SERVE_TOKENS, num_tokens)
        call.facts["inputs"], call.facts["prompt_tokens"] = len(answers), num_tokens
        if written := [answer.prediction for answer in answers if isinstance(answer.prediction, Written)]:
            call.facts["completion_tokens"] = made = sum(one.num_tokens for one in written)
            self.count(catalog.SERVE_COMPLETION_TOKENS, made)
            for one in written:
                self.count(catalog.SERVE_SEQUENCES, 1, finish_reason=one.finish_reason)
        return Reply(wire.respond(self.model, request, answers, self.engine.labels))


def check_model(name: str, served: list[str], key: Key | None) -> None:
    """RequestError if there is no such model, or the key may not ask it."""
    if name not in served:
        raise RequestError(
            f"there is no model {name!r} here",
            status=404,
            kind="not_found_error",
            param="model",
            code="model_not_found",
            fix=" or ".join(map(repr, served)),
        )
    if key is not None and not key.may_ask(name):
        raise RequestError(
            f"the key {key.name!r} may not ask {name!r}",
            status=403,
            kind="permission_error",
            param="model",
            code="model_not_allowed",
            fix=f"a key made with --model {name}",
        )
