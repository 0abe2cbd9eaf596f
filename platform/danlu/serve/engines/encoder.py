"""Models that answer a request as a whole (task heads on an encoder, masked language models, encoder-decoders): dynamic batching on a
thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from danlu import traces
from danlu.artifact.bundle import Bundle, Probe
from danlu.compress.load import load_answerer
from danlu.data.encode import Encoded, ends
from danlu.errors import QualityError, ResourceError
from danlu.serve.engine import Answer
from danlu.serve.engines.watchdog import Watchdog
from danlu.spec.serve import Encoder, EncoderDecoder
from danlu.spec.task import AnsweredTask, engine_kind
from danlu.tasks.agreement import change, tolerance
from danlu.tasks.answers import Answerer, MaskedJudge, Seq2SeqJudge
from danlu.tasks.device import pick_device
from danlu.tasks.exchange import BadExample, Example, from_fields, largest_change
from danlu.tasks.predictor import Predictor
from danlu.tasks.vocabulary import FIX, num_embeddings, unknown_token

log = logging.getLogger(__name__)

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "quantized": 2e-2}
"""How far a number may be from the evaluation's (as a share of the largest, where that is above 1): other kernels on another CPU round
differently, other weights are further off."""

NO_NUMBERS = "the model's outputs are no numbers: NaN or infinity"


@dataclass
class Job:
    """What one request asks, on its way through the engine: its sequences wait for a forward one by one."""

    inputs: Sequence[Example]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[list[Answer]]
    arrived: float
    encoded: Encoded | None = None
    sequences: Encoded | None = None
    outputs: list[Any] = field(default_factory=list)
    begun: float = 0.0
    """When its first forward began."""

    @property
    def next_sequence(self) -> int:
        return len(self.outputs)

    @property
    def is_whole(self) -> bool:
        return self.sequences is not None and self.next_sequence == len(self.sequences)

    @property
    def is_wanted(self) -> bool:
        return not self.done.done()


@dataclass(frozen=True)
class BatchRecord:
    """What one forward did: sequences, tokens, seconds, and how long each of its requests had waited."""

    rows: int
    tokens: int
    seconds: float
    waited_s: list[float]


class EncoderEngine:
    """Requests are taken in the order they came, their sequences packed into forwards of at most `max_batch_tokens` tokens: a long
    document's windows and a question's options as well as a text. An encoder-decoder writes for `max_num_seqs` texts at once.

    While a forward runs, new requests gather for the next one; the event loop is woken once a forward.
    """

    def __init__(
        self, spec: Encoder | EncoderDecoder, bundle: Bundle, *, predictor: Predictor | MaskedJudge | Seq2SeqJudge | None = None
    ) -> None:
        task = bundle.meta.task
        if (right := engine_kind(task)) != spec.kind or not isinstance(task, AnsweredTask):
            raise ResourceError(
                f"{bundle.meta.name} was trained for {task.kind}, which engine.kind={spec.kind} does not answer",
                where="engine.kind",
                fix=f"engine: {{kind: {right}}}",
            )
        self.spec, self.bundle, self.labels, self.task = spec, bundle, list(bundle.meta.labels), task
        self.predictor = predictor
        self.on_batch: Callable[[BatchRecord], None] | None = None
        self.jobs: deque[Job] = deque()
        self.wake = threading.Condition()
        self.stopping = False
        self.ended = False
        """Nothing is taken from `jobs` any more, and nothing may be put there; as they, it belongs to who holds `wake`."""
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.watchdog = Watchdog(spec.step_timeout_s)
        self.watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        self.thread = threading.Thread(target=self._run, args=(loop, started), name="danlu-engine", daemon=True)
        self.thread.start()
        await started
        self.watching = loop.create_task(self.watchdog.watch(self._end))

    async def predict(self, inputs: Sequence[Example]) -> list[Answer]:
        if not inputs:
            return []
        loop = asyncio.get_running_loop()
        job = Job(inputs, loop, loop.create_future(), time.perf_counter())
        with self.wake:
            self.check_health()
            self.jobs.append(job)
            self.wake.notify()
        answers = await job.done
        if traces.is_on():
            traces.add("queue", job.arrived, job.begun)
            traces.add("forward", job.begun, time.perf_counter(), {"danlu.inputs": len(inputs)})
        return answers

    def check_health(self) -> None:
        if self.failure is not None:
            raise ResourceError(f"the engine has failed: {self.failure!r}")
        if self.thread is None or self.ended or not self.thread.is_alive():
            raise ResourceError("the engine is not running")
        self.watchdog.check()

    async def stop(self) -> None:
        with self.wake:
            self.stopping = True
            self.wake.notify()
        if self.thread is not None and not self.watchdog.is_stuck:
            await asyncio.to_thread(self.thread.join)
        if self.watching is not None:
            self.watching.cancel()

    # On the engine's thread:

    def _run(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[None]) -> None:
        try:
            self._start()
        except BaseException as error:  # noqa: BLE001  # whatever it is belongs to whoever waits for the start
            self._end(error)
            loop.call_soon_threadsafe(started.set_exception, error)
            return
        loop.call_soon_threadsafe(started.set_result, None)
        try:
            self._serve()
        except BaseException as error:  # whatever it is, everybody has to hear of it
            log.exception("the engine has failed")
            self._end(error)
        self._end(None)

    def _start(self) -> None:
        torch.set_num_threads(self.spec.num_threads)
        if self.predictor is None:
            precision = None if self.spec.dtype == "auto" else self.spec.dtype
            self.predictor = load_answerer(self.bundle, precision=precision, device=pick_device(self.spec.num_gpus))
        if isinstance(self.predictor, Seq2SeqJudge):
            self.predictor.on_token = self.watchdog.begin
        for probe, problem in self._wrong_probes(self.predictor):
            raise QualityError(
                problem,
                where=f"{self.bundle.meta.name}: probe {probe.text[:60]!r}",
                fix="the same library versions as in the bundle's lineage, or evaluate and store it again",
            )

    def _serve(self) -> None:
        assert self.predictor is not None
        while (jobs := self._waiting()) is not None:
            self._step(self.predictor, jobs)

    def _end(self, failure: BaseException | None) -> None:
        """Take no more jobs; whoever still waits gets an error."""
        with self.wake:
            if self.ended:
                return
            self.ended, self.failure = True, failure
            left, self.jobs = list(self.jobs), deque()
        why = "the engine is not running" if failure is None else f"the engine has failed: {failure!r}"
        _deliver([(job, ResourceError(why)) for job in left])

    def _waiting(self) -> list[Job] | None:
        """The jobs of the next forward, once there are any; None when it is time to end."""
        with self.wake:
            while not self.jobs:
                if self.stopping or self.ended:
                    return None
                self.wake.wait()
        if self.spec.batch_wait_ms:
            time.sleep(self.spec.batch_wait_ms / 1000)
        with self.wake:
            self.jobs = deque(job for job in self.jobs if job.is_wanted)
            return list(self.jobs)

    def _step(self, predictor: Predictor | MaskedJudge | Seq2SeqJudge, jobs: list[Job]) -> None:
        """One forward over as many rows as fit, taken from the jobs in order. What it raises is the end of the engine: a model that failed
        once is not asked again."""
        self.watchdog.begin()
        taken, refused = self._fill(predictor, jobs)
        self._drop([job for job, _ in refused])
        _deliver(refused)
        if taken:
            self._forward(predictor, taken)
            finished = [(job, self._answers(predictor, job)) for job in jobs if job.is_whole]
            self._drop([job for job, _ in finished])
            _deliver(finished)
        self.watchdog.end()

    def _fill(self, predictor: Answerer, jobs: list[Job]) -> tuple[list[tuple[Job, int]], list[tuple[Job, list[Answer] | Exception]]]:
        """What fills a batch, as (job, sequence), at least one if there is one; and the jobs that ask what this model cannot answer."""
        taken, tokens, refused = list[tuple[Job, int]](), 0, list[tuple[Job, list[Answer] | Exception]]()
        for job in jobs:
            if job.sequences is None:
                try:
                    job.encoded = _encoded(predictor, job.inputs)
                except MemoryError:
                    raise
                except Exception as error:  # noqa: BLE001  # of this request's own inputs, and its own affair
                    refused.append((job, error))
                    continue
                job.sequences = job.encoded.sequences
            lengths = job.sequences.lengths
            for at in range(job.next_sequence, len(lengths)):
                length = int(lengths[at])
                if taken and self._is_full(len(taken), tokens + length):
                    return taken, refused
                taken.append((job, at))
                tokens += length
        return taken, refused

    def _forward(self, predictor: Answerer, taken: Sequence[tuple[Job, int]]) -> None:
        """The outputs of some jobs' sequences; FloatingPointError if they are no numbers."""
        lengths = [int(_sequences(job).lengths[at]) for job, at in taken]
        # Sequences of one length side by side take one attention call; the answers go back by `order`.
        order = np.argsort(lengths, kind="stable")
        batch = _joined([(_sequences(taken[i][0]), taken[i][1]) for i in order])
        began = time.perf_counter()
        pieces = predictor.each(batch)
        seconds = time.perf_counter() - began
        if not all(map(_is_finite, pieces)):
            raise FloatingPointError(NO_NUMBERS)
        placed: list[Any] = [None] * len(taken)
        for place, piece in zip(order, pieces, strict=True):
            placed[place] = piece
        waited = [began - job.arrived for job, at in taken if at == 0]
        for (job, at), piece in zip(taken, placed, strict=True):
            job.begun = job.begun if at else began
            job.outputs.append(piece)
        if self.on_batch is not None:
            self.on_batch(BatchRecord(len(taken), sum(lengths), seconds, waited))

    def _is_full(self, rows: int, tokens: int) -> bool:
        """Whether a batch of so many rows takes none that would make it so many tokens."""
        match self.spec:
            case Encoder():
                return tokens > self.spec.max_batch_tokens
            case EncoderDecoder():
                return rows >= self.spec.max_num_seqs

    def _drop(self, jobs: list[Job]) -> None:
        gone = {id(job) for job in jobs}
        with self.wake:
            self.jobs = deque(job for job in self.jobs if id(job) not in gone)

    def _answers(self, predictor: Answerer, job: Job) -> list[Answer] | Exception:
        assert job.encoded is not None
        try:
            found = predictor.made_of(job.outputs, job.encoded, job.inputs)
        except MemoryError:
            raise
        except Exception as error:  # the model has answered: what is made of that is this request's affair
            log.exception("an answer could not be made of the model's outputs")
            return error
        return [Answer(one, int(length)) for one, length in zip(found, job.encoded.lengths, strict=True)]

    def _wrong_probes(self, predictor: Predictor | MaskedJudge | Seq2SeqJudge) -> Iterator[tuple[Probe, str]]:
        """What is served is what was evaluated: the probes' answers have to come out again. Those that do not, and what came instead."""
        meta = self.bundle.meta
        if not isinstance(predictor, Predictor):
            within = tolerance(meta, served_in_fp32=not predictor.bf16).logprob
            for probe in meta.probes:
                # The evaluation's own tokens are put in, so that a near tie that falls the other way does not make another text.
                found = predictor.probe_logprobs(probe)
                if not all(change(one, true) <= within for one, true in zip(found, probe.logprobs, strict=True)):
                    yield probe, f"the bundle gives {probe.completion!r} {found} where its evaluation gave it {probe.logprobs}"
            return
        tolerated = TOLERANCE["quantized" if meta.quantization else "bf16" if predictor.bf16 else "fp32"]
        asked = [from_fields(probe.input, predictor.task) for probe in meta.probes]
        for probe, answer in zip(meta.probes, predictor.predict(asked) if asked else [], strict=True):
            scale = max(1.0, *map(abs, probe.probabilities))
            moved = largest_change(answer.probabilities, probe.probabilities) / scale
            # Where the two best answers are near each other rounding may swap them.
            if moved > tolerated or (answer.label != probe.label and probe.margin > 2 * tolerated):
                yield (
                    probe,
                    (
                        f"the bundle answers {answer.label!r} {answer.probabilities} "
                        f"where its evaluation answered {probe.label!r} {probe.probabilities}"
                    ),
                )


def _encoded(predictor: Answerer, inputs: Sequence[Example]) -> Encoded:
    """BadExample for what this model cannot answer."""
    encoded = predictor.encode(inputs)
    if found := unknown_token(encoded.input_ids, predictor.tokenizer, num_embeddings(predictor.model.model.config)):
        raise BadExample(f"a text has {found[1]}", "input", f"leave it out, or serve {FIX}")
    return encoded


def _is_finite(output: Any) -> bool:
    """Of what a model gave for a sequence: a head's outputs, a masked model's (probabilities, tokens), or tokens that were written, whose
    numbers the judge has looked at."""
    match output:
        case np.ndarray():
            return bool(np.isfinite(output).all())
        case (torch.Tensor() as probabilities, _):
            return bool(probabilities.isfinite().all())
    return True


def _sequences(job: Job) -> Encoded:
    assert job.sequences is not None
    return job.sequences


def _joined(rows: Sequence[tuple[Encoded, int]]) -> Encoded:
    """Sequences of several requests as one."""
    ids = [encoded.row(row) for encoded, row in rows]
    offsets = ends([len(row) for row in ids])
    with_types = any(encoded.token_type_ids is not None for encoded, _ in rows)
    types = [e.token_types(row) if e.token_type_ids is not None else np.zeros(len(e.row(row)), dtype=np.int8) for e, row in rows]
    return Encoded(np.concatenate(ids), offsets, np.zeros(len(rows), dtype=bool), np.concatenate(types) if with_types else None)


def _deliver(results: Sequence[tuple[Job, list[Answer] | Exception]]) -> None:
    """Set the futures, waking each event loop once."""

    def settle(some: Sequence[tuple[Job, list[Answer] | Exception]]) -> None:
        for job, result in some:
            if job.done.done():
                continue
            if isinstance(result, Exception):
                job.done.set_exception(result)
            else:
                job.done.set_result(result)

    loops = dict.fromkeys(job.loop for job, _ in results)
    for loop in loops:
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, [(job, result) for job, result in results if job.loop is loop])
