"""The exception tree: everything a user can get wrong, said in one shape.

DanluError                  a user's mistake or an outside fault; the CLI prints it and exits with `exit_code`
├── SpecError               the YAML or a --set
├── DataError               rows, files, columns, labels
├── ModelError              a model folder, its weights, its tokenizer
├── DivergedError           a loss that is no number any more
├── CheckpointError         a checkpoint that is damaged or of another shape
├── StorageError            the storage URI: missing, full, not writable
├── ResourceError           not enough cores, GPUs, memory, a port in use
├── ClusterError            a Kubernetes cluster: no way to it, no rights there, not what it knows
├── QualityError            a hand-over whose check failed
└── RequestError            a request to an endpoint; carries the HTTP status
"""

from __future__ import annotations


class DanluError(Exception):
    """What went wrong, where, and what would work.

    `where` names the field, file or line; `problem` states the value and the rule; `fix` says what would work.
    """

    exit_code = 2

    def __init__(self, problem: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(problem, where, fix)  # all three, so that it survives pickling between processes
        self.problem, self.where, self.fix = problem, where, fix

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problem, self.where, self.fix))

    def __str__(self) -> str:
        text = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{text}\n  try: {self.fix}" if self.fix else text


def _rebuild(kind: type[DanluError], problem: str, where: str, fix: str) -> DanluError:
    return kind(problem, where=where, fix=fix)


class SpecError(DanluError):
    """The YAML document or an override is not a valid spec."""


class DataError(DanluError):
    """The rows cannot be read or cannot be learned from."""


class ModelError(DanluError):
    """The model cannot be loaded."""


class DivergedError(DanluError):
    """Training went wrong: a loss or a gradient that is not finite."""


class CheckpointError(DanluError):
    """A checkpoint is damaged, or was written by a differently shaped run."""


class StorageError(DanluError):
    """The storage URI cannot be read or written."""

    exit_code = 3


class ResourceError(DanluError):
    """The machine or cluster lacks what the spec asks for."""

    exit_code = 3


class ClusterError(DanluError):
    """A Kubernetes cluster that cannot be reached, or that refuses."""

    exit_code = 3


class QualityError(DanluError):
    """A hand-over was checked and did not hold."""

    exit_code = 4


class RequestError(DanluError):
    """A request an endpoint refuses. `status` is the HTTP status; `kind`, `param` and `code` are OpenAI's error `type`, `param`, `code`."""

    def __init__(
        self,
        problem: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        where: str = "",
        fix: str = "",
    ) -> None:
        super().__init__(problem, where=where, fix=fix)
        self.status, self.kind, self.param, self.code, self.retry_after_s = status, kind, param, code, retry_after_s
