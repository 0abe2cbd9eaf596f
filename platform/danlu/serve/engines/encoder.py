"""Task heads on an encoder: padding-free dynamic batching on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from danlu.artifact.bundle import Bundle
from danlu.compress.load import load_predictor
from danlu.data.encode import Encoded
from danlu.data.pack import pack_rows
from danlu.errors import QualityError, ResourceError
from danlu.serve.engine import Answer, Input
from danlu.spec.serve import Encoder
from danlu.tasks.classification import Predictor, predictions
from danlu.tasks.device import pick_device

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "quantized": 2e-2}
"""How far a probability may be from the evaluation's: other kernels on another CPU round differently, other weights are further off."""


@dataclass
class Job:
    """The texts of one request on their way through the engine."""

    inputs: Sequence[Input]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[list[Answer]]
    arrived: float
    encoded: Encoded | None = None
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def next_row(self) -> int:
        return len(self.logits)

    @property
    def is_wanted(self) -> bool:
        return not self.done.done()


@dataclass(frozen=True)
class BatchRecord:
    """What one forward did: rows, tokens, seconds, and how long each of its requests had waited."""

    rows: int
    tokens: int
    seconds: float
    waited_s: list[float]


class EncoderEngine:
    """Requests are taken in the order they came, their rows packed into forwards of at most `max_batch_tokens` tokens.

    While a forward runs, new requests gather for the next one; the event loop is woken once a forward.
    """

    def __init__(self, spec: Encoder, bundle: Bundle, *, predictor: Predictor | None = None) -> None:
        self.spec, self.bundle, self.labels = spec, bundle, list(bundle.meta.labels)
        self.predictor = predictor
        self.on_batch: Callable[[BatchRecord], None] | None = None
        self.jobs: deque[Job] = deque()
        self.wake = threading.Condition()
        self.stopping = False
        self.ended = False
        """Nothing is taken from `jobs` any more, and nothing may be put there; as they, it belongs to who holds `wake`."""
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

    async def start(self) -> None:
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.thread = threading.Thread(target=self._run, args=(asyncio.get_running_loop(), started), name="danlu-engine", daemon=True)
        self.thread.start()
        await started

    async def classify(self, inputs: Sequence[Input]) -> list[Answer]:
        if not inputs:
            return []
        loop = asyncio.get_running_loop()
        job = Job(inputs, loop, loop.create_future(), time.perf_counter())
        with self.wake:
            self.check_health()
            self.jobs.append(job)
            self.wake.notify()
        return await job.done

    def check_health(self) -> None:
        if self.failure is not None:
            raise ResourceError(f"the engine has failed: {self.failure!r}")
        if self.thread is None or self.ended or not self.thread.is_alive():
            raise ResourceError("the engine is not running")

    async def stop(self) -> None:
        with self.wake:
            self.stopping = True
            self.wake.notify()
        if self.thread is not None:
            await asyncio.to_thread(self.thread.join)

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
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def _start(self) -> None:
        torch.set_num_threads(self.spec.num_threads)
        if self.predictor is None:
            precision = None if self.spec.dtype == "auto" else self.spec.dtype
            self.predictor = load_predictor(self.bundle, precision=precision, device=pick_device(self.spec.num_gpus))
        self._check_probes(self.predictor)

    def _serve(self) -> None:
        assert self.predictor is not None
        while (jobs := self._waiting()) is not None:
            self._step(self.predictor, jobs)

    def _end(self, failure: BaseException | None) -> None:
        """Take no more jobs; those that came too late to be answered get an error."""
        with self.wake:
            self.ended, self.failure = True, failure
            left, self.jobs = list(self.jobs), deque()
        why = "the engine is not running" if failure is None else f"the engine has failed: {failure!r}"
        _deliver([(job, ResourceError(why)) for job in left])

    def _waiting(self) -> list[Job] | None:
        """The jobs of the next forward, once there are any; None when it is time to end."""
        with self.wake:
            while not self.jobs:
                if self.stopping:
                    return None
                self.wake.wait()
        if self.spec.batch_wait_ms:
            time.sleep(self.spec.batch_wait_ms / 1000)
        with self.wake:
            self.jobs = deque(job for job in self.jobs if job.is_wanted)
            return list(self.jobs)

    def _step(self, predictor: Predictor, jobs: list[Job]) -> None:
        """One forward over as many rows as fit, taken from the jobs in order."""
        finished: list[tuple[Job, list[Answer] | Exception]] = []
        taken: list[tuple[Job, int]] = []
        try:
            tokens = self._fill(predictor, jobs, taken)
            if not taken:
                return
            # Rows of one length side by side take one attention call; the answers go back by `order`.
            order = np.argsort([int(_encoded(job).lengths[row]) for job, row in taken], kind="stable")
            batch = _joined([(_encoded(taken[i][0]), taken[i][1]) for i in order])
            began = time.perf_counter()
            logits = predictor.forward(pack_rows(batch, range(len(batch))))
            seconds = time.perf_counter() - began
            placed: list[np.ndarray] = [logits[0]] * len(taken)
            for place, row in zip(order, logits, strict=True):
                placed[place] = row
            waited = [began - job.arrived for job, row in taken if row == 0]
            for (job, _), row in zip(taken, placed, strict=True):
                job.logits.append(row)
            finished = [(job, self._answers(job)) for job in jobs if job.encoded is not None and job.next_row == len(job.encoded)]
            if self.on_batch is not None:
                self.on_batch(BatchRecord(len(taken), tokens, seconds, waited))
        except Exception as error:  # noqa: BLE001  # every request of the batch gets it; none may wait for ever
            failed = [job for job in jobs if job.encoded is None or any(job is other for other, _ in taken)]
            self._drop(failed)
            _deliver([(job, error) for job in failed])
            return
        self._drop([job for job, _ in finished])
        _deliver(finished)

    def _fill(self, predictor: Predictor, jobs: list[Job], taken: list[tuple[Job, int]]) -> int:
        """Put (job, row) into `taken` until the token budget is full; at least one row. The number of tokens."""
        tokens = 0
        for job in jobs:
            if job.encoded is None:
                pairs = [one.text_pair or "" for one in job.inputs] if any(one.text_pair is not None for one in job.inputs) else None
                job.encoded = predictor.encode([one.text for one in job.inputs], pairs)
            for row in range(job.next_row, len(job.encoded)):
                length = int(job.encoded.lengths[row])
                if taken and tokens + length > self.spec.max_batch_tokens:
                    return tokens
                taken.append((job, row))
                tokens += length
        return tokens

    def _drop(self, jobs: list[Job]) -> None:
        gone = {id(job) for job in jobs}
        with self.wake:
            self.jobs = deque(job for job in self.jobs if id(job) not in gone)

    def _answers(self, job: Job) -> list[Answer]:
        encoded = _encoded(job)
        found = predictions(np.stack(job.logits), self.labels)
        return [Answer(one.label, one.probabilities, int(length)) for one, length in zip(found, encoded.lengths, strict=True)]

    def _check_probes(self, predictor: Predictor) -> None:
        """What is served is what was evaluated: the probes' answers have to come out again."""
        meta = self.bundle.meta
        if not meta.probes:
            return
        pairs = [probe.text_pair or "" for probe in meta.probes] if any(probe.text_pair is not None for probe in meta.probes) else None
        tolerance = TOLERANCE["quantized" if meta.quantization else "bf16" if predictor.bf16 else "fp32"]
        for probe, found in zip(meta.probes, predictor.predict([probe.text for probe in meta.probes], pairs), strict=True):
            change = float(np.abs(np.subtract(found.probabilities, probe.probabilities)).max())
            if change > tolerance or (found.label != probe.label and _is_clear(probe.probabilities, tolerance)):
                raise QualityError(
                    f"the bundle answers {found.label!r} {found.probabilities} "
                    f"where its evaluation answered {probe.label!r} {probe.probabilities}",
                    where=f"{meta.name}: probe {probe.text[:60]!r}",
                    fix="the same library versions as in the bundle's lineage, or evaluate and store it again",
                )


def _is_clear(probabilities: Sequence[float], tolerance: float) -> bool:
    """False where the two best labels are so near that rounding may swap them."""
    best, second = sorted(probabilities, reverse=True)[:2] if len(probabilities) > 1 else (1.0, 0.0)
    return best - second > 2 * tolerance


def _encoded(job: Job) -> Encoded:
    assert job.encoded is not None
    return job.encoded


def _joined(rows: Sequence[tuple[Encoded, int]]) -> Encoded:
    """Rows of several requests as one."""
    ids = [encoded.row(row) for encoded, row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
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
