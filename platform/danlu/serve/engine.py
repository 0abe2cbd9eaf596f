"""Engine: what answers requests as a whole inside a replica; and the one place where it is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from danlu.serve.generation import TextEngine
from danlu.spec.serve import Echo, EchoText, Encoder, EncoderDecoder, Service, Torch
from danlu.spec.task import AnsweredTask
from danlu.spec.vllm import Vllm
from danlu.tasks.exchange import Example, Prediction

if TYPE_CHECKING:
    from danlu.artifact.bundle import Bundle


@dataclass(frozen=True)
class Answer:
    """A prediction, and the tokens that were read for it."""

    prediction: Prediction
    num_tokens: int

    @property
    def label(self) -> str:
        return self.prediction.label

    @property
    def probabilities(self) -> list[float]:
        return self.prediction.probabilities


class Engine(Protocol):
    """start once; predict from any number of coroutines at a time; stop once. `labels` are the model's, in the order of its outputs."""

    labels: list[str]

    @property
    def task(self) -> AnsweredTask:
        """What it answers."""
        ...

    async def start(self) -> None:
        """Load, and answer the bundle's probes as the evaluation did; QualityError if the answers differ."""
        ...

    async def predict(self, inputs: Sequence[Example]) -> list[Answer]:
        """An answer for each of the task's examples; BadExample for what this model cannot answer. Being cancelled takes what has not
        begun out of the queue."""
        ...

    def check_health(self) -> None:
        """Raises if no answer can be expected any more."""
        ...

    async def stop(self) -> None:
        """Finish what has begun, then end the engine's thread."""
        ...


def make_engine(service: Service, bundle: Bundle | None) -> Engine | TextEngine:
    """The engine of a service's `engine:`."""
    match service.engine:
        case Encoder() | EncoderDecoder():
            from danlu.serve.engines.encoder import EncoderEngine

            assert bundle is not None, "the spec asks for a bundle of these engines"
            return EncoderEngine(service.engine, bundle)
        case Echo():
            from danlu.serve.engines.echo import EchoEngine

            return EchoEngine(service.engine)
        case EchoText():
            from danlu.serve.engines.echo import EchoTextEngine

            return EchoTextEngine(service.engine)
        case Torch():
            from danlu.serve.engines.torch.engine import TorchEngine

            return TorchEngine(service.engine, bundle, storage=service.storage)
        case Vllm():
            from danlu.serve.engines.vllm.engine import VllmEngine

            return VllmEngine(service.engine, bundle, storage=service.storage)
