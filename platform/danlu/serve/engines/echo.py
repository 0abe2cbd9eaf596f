"""A fake that answers at a settable speed: for load tests of everything around the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from danlu.errors import ResourceError
from danlu.serve.engine import Answer
from danlu.spec.serve import Echo
from danlu.spec.task import Classification
from danlu.tasks.exchange import Example, Prediction, Text


class EchoEngine:
    """The same text always gets the same label: its length decides."""

    def __init__(self, spec: Echo) -> None:
        self.spec, self.labels, self.task = spec, list(spec.labels), Classification()
        self.running = False

    async def start(self) -> None:
        self.running = True

    async def predict(self, inputs: Sequence[Example]) -> list[Answer]:
        if self.spec.latency_ms:
            await asyncio.sleep(self.spec.latency_ms / 1000)
        return [self._answer(one) for one in inputs if isinstance(one, Text)]

    def check_health(self) -> None:
        if not self.running:
            raise ResourceError("the echo engine is not running")

    async def stop(self) -> None:
        self.running = False

    def _answer(self, one: Text) -> Answer:
        chosen = (len(one.text) + len(one.text_pair or "")) % len(self.labels)
        probabilities = [float(i == chosen) for i in range(len(self.labels))]
        return Answer(Prediction(self.labels[chosen], probabilities), len(one.text.split()))
