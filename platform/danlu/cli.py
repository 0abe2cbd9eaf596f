"""`danlu`: the commands, each a few lines over the SDK. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from danlu import __version__, terminal
from danlu.errors import DanluError

app = typer.Typer(
    name="danlu",
    help="Danlu (丹炉): fine-tune open language models and serve what was evaluated. One YAML says what is wanted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and SIGINT's number, as shells have it."""

SpecFile = Annotated[Path, typer.Argument(help="The YAML spec.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change one field: --set optim.learning_rate=1e-4. May be repeated."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on with an unfinished run.")]
_BUNDLE = "name@alias, name@v1, a folder or a URI; unset: the job's"
LatestOf = Annotated[str | None, typer.Option("--bundle", metavar="BUNDLE", help=f"{_BUNDLE} latest.")]
ProductionOf = Annotated[str | None, typer.Option("--bundle", metavar="BUNDLE", help=f"{_BUNDLE} production.")]


@app.command()
def plan(spec: SpecFile, set_: Set = None, json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say what a job will take and what its rows look like. Parameters, memory, steps, time; lengths, labels, doubles. Starts nothing."""
    from danlu import walk

    walk.plan(spec, set_ or [], as_json=json_)


@app.command()
def train(spec: SpecFile, set_: Set = None, fresh: Fresh = False) -> None:
    """Fine-tune, score on dev and test, and store a bundle. Goes on with an unfinished run of the same spec."""
    from danlu import walk

    walk.train(spec, set_ or [], fresh=fresh)


@app.command()
def evaluate(
    spec: SpecFile,
    set_: Set = None,
    bundle: LatestOf = None,
    data: Annotated[list[str] | None, typer.Option("--data", metavar="FILE", help="Files to score instead of the job's test rows.")] = None,
) -> None:
    """Score a bundle on the job's test rows, or on other files. Accuracy, macro F1, each class, the confusion matrix."""
    from danlu import walk

    walk.evaluate(spec, set_ or [], bundle=bundle, data=data)


@app.command()
def quantize(spec: SpecFile, set_: Set = None, bundle: LatestOf = None) -> None:
    """Make the smaller version that `compress:` asks for. Shown beside the original's quality and speed; kept only within the budget."""
    from danlu import walk

    walk.quantize(spec, set_ or [], bundle=bundle)


@app.command()
def serve(spec: SpecFile, set_: Set = None, bundle: ProductionOf = None) -> None:
    """Serve a bundle on Ray Serve until Ctrl-C. Takes a service spec, or a training job's (its `production` bundle)."""
    from danlu import walk

    walk.serve(spec, set_ or [], bundle=bundle)


@app.command()
def predict(
    spec: SpecFile,
    text: Annotated[list[str] | None, typer.Argument(help="Texts; without any, one a line from standard input.")] = None,
    set_: Set = None,
    bundle: ProductionOf = None,
) -> None:
    """Label texts, answer or translate them, fill in masks: in this process, without a server. One JSON object a line."""
    from danlu import walk

    walk.predict(spec, set_ or [], text or [], bundle=bundle)


@app.command()
def run(
    spec: SpecFile,
    set_: Set = None,
    fresh: Fresh = False,
    keep: Annotated[bool | None, typer.Option("--keep/--no-keep", help="Go on serving at the end; unset: if this is a terminal.")] = None,
) -> None:
    """The whole walk, from a plan to a checked endpoint. Plan, train, score, quantize, serve, check what is served, report."""
    from danlu import walk

    walk.run(spec, set_ or [], fresh=fresh, keep=keep)


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="train or serve.")]) -> None:
    """The JSON Schema of a spec, for editors and pipelines."""
    from danlu import walk

    walk.schema(kind)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"danlu {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """The console script: a user's mistake is a message and an exit code, and no process is left behind."""
    code = 0
    with terminal.no_process_left():
        try:
            # Typer makes Ctrl-C an exit code, and returns it.
            code = app(standalone_mode=False) or 0
            if code == INTERRUPTED:
                typer.echo("\nstopped", err=True)
        except DanluError as error:
            typer.echo(f"error: {error}", err=True)
            code = error.exit_code
        except typer.Exit as exit_:
            code = exit_.exit_code
        except (KeyboardInterrupt, typer.Abort):
            typer.echo("\nstopped", err=True)
            code = INTERRUPTED
        except typer._click.exceptions.ClickException as error:
            error.show()
            code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
