"""`python -m danlu.train job.yaml`: what a job's driver runs on a Ray cluster. `danlu train`, and `danlu quantize` if the job asks for it.

An entry point, which nothing imports: it stands above everything that it calls, whatever folder it is in.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from danlu import logs, terminal, traces, walk
from danlu.errors import DanluError
from danlu.local_ray import join_ray
from danlu.spec.files import load
from danlu.spec.train import TrainJob


def main(spec: Path) -> None:
    """Train on the Ray cluster that this process is a job of. Goes on with the unfinished run of the same spec."""
    job = load(TrainJob, spec)
    join_ray()
    walk.train(spec, [], fresh=False)
    if job.compress is not None:
        terminal.heading("Compressing")
        walk.quantize(spec, [], bundle=None)


if __name__ == "__main__":
    with terminal.no_process_left():
        try:
            logs.begin("json")
            traces.begin("danlu-train")
            with traces.span("job", carrier=traces.from_environment()):
                main(Path(*sys.argv[1:2]))
        except DanluError as error:
            # The last lines of the log, which `danlu jobs show` looks for.
            typer.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        finally:
            traces.end()
