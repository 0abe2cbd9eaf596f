"""Where a job's workers come from: this process for one worker, Ray Train for several. The only file here that imports ray."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import RayTrainError

from danlu import logs, traces
from danlu.artifact.run_logs import RunLog
from danlu.errors import DanluError, ResourceError
from danlu.metrics import emit
from danlu.spec.files import dump, parse
from danlu.spec.train import TrainJob
from danlu.train.budget import budget_of
from danlu.train.observed import run_id
from danlu.train.run import EventRecord, Record, record_from_dict, record_to_dict

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.25
FAILURE = "failure"
"""The event that workers failed, with the reason as its detail."""


def fit(job: TrainJob, run_uri: str, listener: Callable[[Record], None]) -> dict[str, Any]:
    """Train `job` into `run_uri` on the Ray this process is connected to; the fields of the loop's Outcome.

    `listener` hears every record, in order. A user's mistake found in a worker is raised as the DanluError it is.
    """
    _check_resources(job)
    mailbox = _mailbox()
    trainer = _Trainer(
        _worker,
        train_loop_config={
            "job": dump(job),
            "run_uri": run_uri,
            "mailbox": mailbox,
            "trace": traces.carrier(),
            "ordered": time.time(),
        },
        scaling_config=ScalingConfig(
            num_workers=job.workers.num_workers,
            use_gpu=job.workers.gpus_per_worker > 0,
            resources_per_worker={"CPU": job.workers.cpus_per_worker, **({"GPU": 1} if job.workers.gpus_per_worker else {})},
        ),
        run_config=RunConfig(
            name="ray-train",
            storage_path=run_uri,
            failure_config=FailureConfig(max_failures=job.max_failures),
            callbacks=[_Failures(mailbox)],
        ),
        torch_config=TorchConfig(backend="nccl" if job.workers.gpus_per_worker else "gloo"),
    )
    with emit.training(job.name, budget_of(job, run_uri)) as meter, _delivered(mailbox, _Heard(listener, meter)):
        try:
            result = trainer.fit()
        except KeyboardInterrupt:
            trainer.abort()
            raise
        except ray.train.TrainingFailedError as error:
            raise _what_stopped(job, error) from error
    outcome: dict[str, Any] = result.return_value
    return outcome


class _Heard:
    """What hears the records here: the metrics, then the caller's listener."""

    def __init__(self, listener: Callable[[Record], None], meter: Callable[[dict[str, Any]], None]) -> None:
        self.listener, self.meter, self.step = listener, meter, 0

    def __call__(self, record: Record) -> None:
        if isinstance(record, EventRecord) and record.event == FAILURE:
            record = replace(record, step=self.step)  # the controller does not know it
        self.step = record.step
        self.meter(record_to_dict(record))
        self.listener(record)


class _Failures(ray.train.UserCallback):  # type: ignore[misc]
    """Says why workers failed, from Ray Train's controller."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, BaseException]) -> None:
        if worker_exceptions:
            self.mailbox.push.remote(record_to_dict(EventRecord(0, FAILURE, _reason(worker_exceptions))))


def _reason(failures: Mapping[int, BaseException]) -> str:
    """`out_of_memory`, `worker_lost` or `error`."""
    texts = [str(failure) for failure in failures.values()]
    if any("low on memory" in text for text in texts):
        return "out_of_memory"
    lost = [isinstance(failure, (RayTrainError, ray.exceptions.RayActorError)) for failure in failures.values()]
    # A rank that was waiting for the lost one fails as well, in gloo's words for a connection that broke.
    return "worker_lost" if any(lost) or all("by peer" in text for text in texts) else "error"


def on_a_worker(job: TrainJob, function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's value, computed with what one training worker of the job has: after the training, that much is free again."""
    workers = job.workers
    task = ray.remote(num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus_per_worker, max_retries=job.max_failures)(function)
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, DanluError) else error from error


def over_the_cluster(function: Callable[[T], bool], items: Sequence[T]) -> None:
    """`function` of each item on any core of the cluster, through Ray Data; a user's mistake in one of them is raised here."""
    import ray.data

    def called(row: dict[str, Any]) -> dict[str, bytes]:
        try:
            function(items[int(row["id"])])
        except DanluError as error:  # Ray Data would keep its text only
            return {"mistake": pickle.dumps(error)}
        return {"mistake": b""}

    ray.data.DataContext.get_current().enable_progress_bars = False
    numbers = ray.data.range(len(items), override_num_blocks=len(items))
    for row in numbers.map(called, num_cpus=1).iter_rows():
        if row["mistake"]:
            mistake: DanluError = pickle.loads(row["mistake"])
            raise mistake


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray's, but Ctrl-C stays a KeyboardInterrupt: Ray's own handler would exit the process, and stay installed after the training.

    And without the processes that it would start for nothing: one for datasets of Ray's own; one that frees what was reserved if the driver
    dies, on a Ray that ends with the driver.
    """

    controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        node = ray._private.worker._global_node
        needless = (DatasetsCallback, PlacementGroupCleanerCallback) if node is not None and node.head else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, needless)]

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """End the workers; returns once they are gone."""
        if self.controller is not None:
            with contextlib.suppress(ray.exceptions.RayActorError):  # it ends itself as well
                ray.get(self.controller.abort.remote())


def _mailbox() -> Any:
    """An actor with records on their way from rank 0 to the driver, which may be on another machine."""

    # Defined here, it travels by value: its process does not have to import torch to hold a list.
    class Mailbox:
        def __init__(self) -> None:
            self.records: list[dict[str, Any]] = []
            self.mistake: DanluError | None = None
            self.attempts = 0

        def attempt(self) -> int:
            self.attempts += 1
            return self.attempts

        def push(self, record: dict[str, Any]) -> None:
            self.records.append(record)

        def take(self) -> list[dict[str, Any]]:
            taken, self.records = self.records, []
            return taken

        def set_mistake(self, mistake: DanluError) -> None:
            self.mistake = mistake

        def get_mistake(self) -> DanluError | None:
            return self.mistake

    return ray.remote(num_cpus=0)(Mailbox).remote()


def _worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """The train function of every rank."""
    from ray.train.torch import get_device

    from danlu.train.run import RayRun
    from danlu.train.worker import work

    job = parse(TrainJob, config["job"], source="the job's spec")
    mailbox = config["mailbox"]
    run = RayRun(get_device(), lambda record: mailbox.push.remote(record_to_dict(record)))
    logs.begin("json", train_job=job.name, run=run_id(config["run_uri"]), rank=run.rank)
    kept = RunLog(config["run_uri"], f"rank-{run.rank}")
    traces.begin("danlu-train", **{"danlu.train_job": job.name, "danlu.rank": str(run.rank)})
    log.info("worker starts", extra={"about": {"world_size": run.world_size, "device": str(run.device)}})
    # Ray Train restarts after any error; what a user has to mend comes out the same each time.
    if mistake := ray.get(mailbox.get_mistake.remote()):
        raise mistake
    with traces.span("worker", {"danlu.rank": run.rank}, carrier=config["trace"]):
        if run.rank == 0 and ray.get(mailbox.attempt.remote()) == 1:
            now = time.perf_counter()
            traces.add("start workers", now - max(0.0, time.time() - config["ordered"]), now, {"danlu.num_workers": run.world_size})
        try:
            outcome = work(job, run, config["run_uri"], log=kept)
        except DanluError as error:
            log.error("%s", error)
            ray.get(mailbox.set_mistake.remote(error))
            raise
        except Exception:
            log.exception("the worker failed")
            raise
        finally:
            traces.flush()
            kept.keep()
    traces.end()
    return asdict(outcome)


@contextlib.contextmanager
def _delivered(mailbox: Any, listener: Callable[[Record], None]) -> Iterator[None]:
    """Records reach `listener` while the block runs, the last ones before it ends."""
    done = threading.Event()

    def deliver() -> None:
        for record in ray.get(mailbox.take.remote()):
            listener(record_from_dict(record))

    def poll() -> None:
        while not done.wait(POLL_S):
            deliver()

    thread = threading.Thread(target=poll, name="danlu-records", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
        with contextlib.suppress(ray.exceptions.RayError):  # on Ctrl-C the mailbox may be gone already
            deliver()


def _check_resources(job: TrainJob) -> None:
    """ResourceError if the cluster can never hold all workers. An autoscaling cluster may still grow, so there it only waits."""
    workers = job.workers
    if os.environ.get("RAY_JOB_ALLOW_PENDING") or _autoscales():
        return
    total = ray.cluster_resources()
    for resource, each in (("CPU", workers.cpus_per_worker), ("GPU", workers.gpus_per_worker)):
        need, have = each * workers.num_workers, int(total.get(resource, 0))
        if need > have:
            raise ResourceError(
                f"{workers.num_workers} workers with {each} {resource} each need {need}; the Ray cluster has {have}",
                where="workers.num_workers",
                fix=f"workers.num_workers={max(1, have // each)}" if have >= each else f"a machine with at least {each} {resource}",
            )


def _autoscales() -> bool:
    return bool(os.environ.get("RAY_CLUSTER_NAME")) and bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def _what_stopped(job: TrainJob, error: BaseException) -> BaseException:
    """The DanluError a worker raised, or that a worker was lost, if that is what stopped the job; else the error itself."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, DanluError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    for rank, failure in failures.items():
        if isinstance(failure, (RayTrainError, ray.exceptions.RayError)):
            short_of_memory = "low on memory" in str(failure) or isinstance(failure, ray.exceptions.OutOfMemoryError)
            return _worker_lost(job, rank, short_of_memory=short_of_memory)
    if failures and all("by peer" in str(failure) for failure in failures.values()):  # gloo's words for a connection that broke
        return _worker_lost(job, min(failures), short_of_memory=False)
    return error


def _worker_lost(job: TrainJob, rank: int, *, short_of_memory: bool) -> ResourceError:
    why = "its machine ran out of memory" if short_of_memory else "it was killed, ran out of memory, or its machine went away"
    times = f", and {job.max_failures} restarts had been used up" if job.max_failures else ""
    return ResourceError(
        f"a training worker was lost (rank {rank}): {why}{times}",
        where="workers",
        fix=("a smaller micro_batch_size; " if short_of_memory else "")
        + "the same command goes on from the last checkpoint"
        + ("" if job.max_failures else "; max_failures: 2 lets the job do so by itself"),
    )


__all__ = ["fit", "on_a_worker", "over_the_cluster"]
