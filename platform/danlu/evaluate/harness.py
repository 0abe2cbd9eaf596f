"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), asked of an endpoint: its own prompts, metrics and
standard errors over the endpoint's log probabilities (`/v1/completions` with `echo`) and answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from danlu.errors import DataError, RequestError, ResourceError

CONCURRENT = 16
"""Requests at once: the endpoint batches them."""
TIMEOUT_S = 300


@dataclass(frozen=True)
class Measured:
    """A metric's value and its standard error (None where the harness has none)."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScores:
    """A task's or a group's; `metrics` by name, with the harness' filter behind a comma where it has one."""

    task: str
    version: str
    num_fewshot: int | None
    num_rows: int | None
    metrics: Mapping[str, Measured]


@dataclass(frozen=True)
class Harnessed:
    """What the harness found, and which harness it was."""

    lm_eval: str
    tasks: Sequence[TaskScores]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def text(self) -> str:
        """The table for the terminal."""
        width = max(len(one.task) for one in self.tasks)
        lines = []
        for one in self.tasks:
            rows = "" if one.num_rows is None else f"{one.num_rows:,} rows"
            shots = "" if one.num_fewshot is None else f"{one.num_fewshot}-shot"
            values = (
                f"{name} {found.value:.4f}" + ("" if found.stderr is None else f" ± {found.stderr:.4f}")
                for name, found in one.metrics.items()
            )
            lines.append(f"  {one.task:<{width}} {rows:>12} {shots:>8}   {'   '.join(values)}")
        return "\n".join([*lines, f"  lm-evaluation-harness {self.lm_eval}; ± is one standard error"])


def harness(
    url: str,
    tokenizer: Path,
    tasks: Sequence[str],
    *,
    model: str,
    api_key: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> Harnessed:
    """Scores of `tasks` (the harness' names, or YAML files of tasks) of a served model, whose tokenizer is in the folder `tokenizer`.

    `limit`: only so many rows of each task, for trying. Rows longer than the endpoint's context lose their beginning, as in the harness.
    """
    ensure_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    asked = LocalCompletionsAPI(
        model=model,
        base_url=f"{url.rstrip('/')}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(tokenizer),
        tokenized_requests=True,
        max_length=_room(url, model, headers),
        num_concurrent=CONCURRENT,
        timeout=TIMEOUT_S,
        header=headers or {"Accept": "application/json"},  # an empty one would become the key in OPENAI_API_KEY
    )
    manager = _known(tasks)
    found = simple_evaluate(asked, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False)
    return Harnessed(version("lm_eval"), [_scores(found, name) for name in found["results"]])


def ensure_installed() -> None:
    """ResourceError where the extra is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ResourceError("lm-evaluation-harness is not installed", where="--lm-eval", fix="pip install 'danlu[lm-eval]'") from error


def _room(url: str, model: str, headers: dict[str, str]) -> int:
    """The model's context in tokens."""
    try:
        response = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=60)
    except httpx.HTTPError as error:
        raise ResourceError(
            f"the endpoint does not answer: {type(error).__name__}: {error}", where=url, fix="check the address; is it serving?"
        ) from error
    if response.status_code != 200:
        raise RequestError(
            f"the endpoint answers {response.status_code}: {response.text[:300]}",
            status=response.status_code,
            where=url,
            fix="--api-key" if response.status_code in (401, 403) else "a language model's endpoint",
        )
    served = {one["id"]: one for one in response.json()["data"]}
    if model not in served or "max_model_len" not in served[model]:
        raise RequestError(
            f"the endpoint does not serve the language model {model!r}, but {', '.join(served)}",
            status=404,
            where=url,
            fix="the endpoint of the bundle that is evaluated",
        )
    return int(served[model]["max_model_len"])


def _known(tasks: Sequence[str]) -> Any:
    """The harness' tasks; DataError for one that there is not."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for task in tasks:
        if task in manager.all_tasks or (task.endswith((".yaml", ".yml")) and Path(task).is_file()):
            continue
        near = difflib.get_close_matches(task, manager.all_tasks, n=3)
        raise DataError(
            f"lm-evaluation-harness {version('lm_eval')} has no task {task!r}",
            where="--lm-eval",
            fix=f"did you mean {' or '.join(near)}?" if near else "a name that `lm_eval ls tasks` lists, or a task's YAML file",
        )
    return manager


def _scores(found: Mapping[str, Any], name: str) -> TaskScores:
    """One entry of the harness' results, whose keys are metric,filter and metric_stderr,filter."""
    values: Mapping[str, Any] = found["results"][name]
    metrics = {}
    for key, value in values.items():
        metric, _, filter_ = key.partition(",")
        if not filter_ or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        stderr = values.get(f"{metric}_stderr,{filter_}")
        told = metric if filter_ == "none" else key
        metrics[told] = Measured(float(value), float(stderr) if isinstance(stderr, float | int) else None)
    rows = found.get("n-samples", {}).get(name)
    return TaskScores(
        task=name,
        version=str(found.get("versions", {}).get(name, "")),
        num_fewshot=found.get("n-shot", {}).get(name),
        num_rows=None if rows is None else int(rows["effective"]),
        metrics=metrics,
    )
