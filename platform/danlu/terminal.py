"""What a person sees while a job runs: headings, the live progress line, and the end of every process that was started."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

if TYPE_CHECKING:
    from danlu.train.run import Record

console = Console(highlight=False, soft_wrap=True, emoji=False)
LINE_EVERY_S = 5.0
"""Without a terminal the progress line is printed anew so often."""

FAILED = {"worker_lost": "a worker was lost", "out_of_memory": "a worker was ended for the memory it took", "error": "a worker failed"}
"""A failure's reason, in words."""


def heading(text: str) -> None:
    """A step of the walk."""
    console.print(f"\n[bold]{text}[/bold]")


def show(text: str) -> None:
    """Plain text, exactly as it is."""
    console.print(text, markup=False)


class TrainingView:
    """The listener of a training run: one live line on a terminal, a line every few seconds in a log."""

    def __init__(self) -> None:
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self.task: TaskID | None = None
        self.last_line = 0.0

    @contextmanager
    def live(self) -> Iterator[TrainingView]:
        """Shows the line while the block runs."""
        with self.progress:
            yield self

    def __call__(self, record: Record) -> None:
        match record.kind:
            case "step":
                self._step(record)
            case "eval":
                self._above(f"  step {record.step}: dev {_metrics(record.metrics)}{'  (best so far)' if record.is_best else ''}")  # type: ignore[union-attr]
            case "event" if record.event == "failure":  # type: ignore[union-attr]
                failed = FAILED[record.detail]  # type: ignore[union-attr]
                self._above(f"  step {record.step}: {failed}; while max_failures allows it, training goes on from its last checkpoint")
            case "event":
                self._above(f"  step {record.step}: {record.event}{': ' + record.detail if record.detail else ''}")  # type: ignore[union-attr]

    def _step(self, record: Record) -> None:
        line = step_line(record)
        if console.is_terminal:
            if self.task is None:
                self.task = self.progress.add_task(line, total=record.num_steps)  # type: ignore[union-attr]
            self.progress.update(self.task, completed=record.step, description=line, refresh=True)
        elif time.monotonic() - self.last_line > LINE_EVERY_S or record.step in (1, record.num_steps):  # type: ignore[union-attr]
            self.last_line = time.monotonic()
            show(f"  {line}")

    def _above(self, text: str) -> None:
        self.progress.console.print(text, markup=False)


def step_line(record: Record) -> str:
    """`step 40/155  loss 0.4312  lr 1.2e-04  grad norm 2.31  1,843 tokens/s  58 s left`."""
    from danlu.plan import duration

    return (
        f"step {record.step}/{record.num_steps}  loss {record.loss:.4f}  lr {record.learning_rate:.1e}  "  # type: ignore[union-attr]
        f"grad norm {record.grad_norm:.2f}  {record.tokens_per_second:,.0f} tokens/s  {duration(record.eta_s)} left"  # type: ignore[union-attr]
    )


def _metrics(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())


@contextmanager
def no_process_left() -> Iterator[None]:
    """Ends every process that was started inside the block, however the block ends; a second Ctrl-C cannot stop that."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _shut_down()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _shut_down() -> None:
    import psutil

    started = psutil.Process(os.getpid()).children(recursive=True)
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        # Listed before: once the raylet is gone, its workers are nobody's children.
        ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=3)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=3)
