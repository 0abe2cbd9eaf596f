"""`danlu`: the commands, each a few lines over the SDK. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from danlu import __version__, cli_cluster, logs, terminal, traces
from danlu.errors import DanluError

app = typer.Typer(
    name="danlu",
    help="Danlu (丹炉): fine-tune open language models and serve what was evaluated. One YAML says what is wanted.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(cli_cluster.jobs, name="jobs")
app.add_typer(cli_cluster.services, name="services")
data_app = typer.Typer(
    help="Rows: what they hold, and cleaning them. `danlu data report FILE` says it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and SIGINT's number, as shells have it."""

SpecFile = Annotated[Path, typer.Argument(help="The YAML spec.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change one field: --set optim.learning_rate=1e-4. May be repeated."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on with an unfinished run.")]
On = Annotated[str, typer.Option("--on", metavar="WHERE", help="local; k8s, the cluster of the kubeconfig; ray://HOST, a Ray cluster.")]
DryRun = Annotated[
    str | None, typer.Option("--dry-run", metavar="server", help="With --on k8s: ask the API server whether it would take it.")
]
_BUNDLE = "name@alias, name@v1, a folder or a URI; unset: the job's"
LatestOf = Annotated[str | None, typer.Option("--bundle", metavar="BUNDLE", help=f"{_BUNDLE} latest.")]
ProductionOf = Annotated[str | None, typer.Option("--bundle", metavar="BUNDLE", help=f"{_BUNDLE} production.")]

Out = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Also write it there.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="DANLU_API_KEY", help="The endpoint's key.", show_envvar=True)]


@app.command()
def plan(spec: SpecFile, set_: Set = None, json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say what a job will take and what its rows look like. Parameters, memory, steps, time; lengths, labels, doubles. Starts nothing."""
    from danlu import walk

    walk.plan(spec, set_ or [], as_json=json_)


@app.command()
def train(
    spec: SpecFile,
    set_: Set = None,
    fresh: Fresh = False,
    on: On = "local",
    dry_run: DryRun = None,
    context: cli_cluster.Context = None,
    namespace: cli_cluster.Namespace = None,
) -> None:
    """Fine-tune, score on dev and test, and store a bundle. Goes on with an unfinished run of the same spec."""
    from danlu import places, walk, walk_cluster

    if places.place(on, fresh=fresh, dry_run=dry_run, context=context, namespace=namespace) == "local":
        walk.train(spec, set_ or [], fresh=fresh)
    else:
        walk_cluster.submit(spec, set_ or [], on=on, dry_run=dry_run is not None, context=context, namespace=namespace)


@app.command()
def evaluate(
    spec: SpecFile,
    set_: Set = None,
    bundle: LatestOf = None,
    data: Annotated[list[str] | None, typer.Option("--data", metavar="FILE", help="Files to score instead of the job's test rows.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="Ask this endpoint for the answers, which serves the bundle.")] = None,
    api_key: ApiKey = None,
    by: Annotated[list[str] | None, typer.Option("--by", metavar="COLUMN", help="Also score by the values of a column.")] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval", metavar="TASK", help="Instead of rows, a task of lm-evaluation-harness, or a task's YAML. May be repeated."
        ),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="With --lm-eval: examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="With --lm-eval: so many rows of each task.")] = None,
    out: Out = None,
) -> None:
    """Score a bundle or an endpoint on test rows or other files. With intervals, slices, calibration and wrong answers."""
    from danlu import walk

    if lm_eval or num_fewshot is not None or limit is not None:
        few = {"num_fewshot": num_fewshot, "limit": limit}
        walk.harness(spec, set_ or [], lm_eval or [], bundle=bundle, url=url, api_key=api_key, **few, rows=bool(data or by), out=out)
    else:
        walk.evaluate(spec, set_ or [], bundle=bundle, data=data, url=url, api_key=api_key, by=by or [], out=out)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A bundle (name@alias, name@v1, a folder or a URI) or an endpoint's URL.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    storage: Annotated[str, typer.Option(help="Where the bundles are.")] = "runs",
    data: Annotated[list[str] | None, typer.Option("--data", metavar="FILE", help="Files instead of A's own test rows.")] = None,
    api_key: ApiKey = None,
    out: Out = None,
) -> None:
    """Two bundles or endpoints on the same rows. What changes, whether that may be chance, and where they disagree."""
    from danlu import walk

    walk.compare(a, b, storage=storage, data=data, api_key=api_key, out=out)


@app.command()
def suite(
    name: Annotated[str, typer.Argument(help="clue or glue.")],
    spec: Annotated[Path, typer.Argument(help="A job that says model, tuning and the rest; data and task are the suite's.")],
    data: Annotated[Path, typer.Option("--data", metavar="FOLDER", help="The suite's own files, a folder a task.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where rows, scores and the files to hand in go.")],
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Only this task. May be repeated.")] = None,
    set_: Set = None,
) -> None:
    """Train and score a benchmark's tasks from their official files. One table, and the files that are handed in."""
    from danlu import walk

    walk.suite(name, spec, set_ or [], data=data, out=out, tasks=tasks or [])


@data_app.command("report")
def data_report(
    files: Annotated[list[str] | None, typer.Argument(help="Files, globs or URIs; without any, the job's own.", show_default=False)] = None,
    spec: Annotated[Path | None, typer.Option("--spec", help="A job whose model and columns are to be used.")] = None,
    set_: Set = None,
    test: Annotated[list[str] | None, typer.Option("--test", metavar="FILE", help="Files to look for among the rows.")] = None,
    near: Annotated[bool, typer.Option("--near/--no-near", help="Look for near duplicates, which takes most of the time.")] = True,
    max_rows: Annotated[int | None, typer.Option("--max-rows", min=1, help="Read at most so many rows of each file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    out: Out = None,
) -> None:
    """Say what files hold and what is wrong with them. Types, lengths, labels, duplicates, broken rows, languages, personal data."""
    from danlu import walk

    walk.data_report(files or [], spec, set_ or [], test=test or [], near=near, max_rows=max_rows, as_json=json_, out=out)


@data_app.command("clean")
def data_clean(spec: SpecFile, set_: Set = None, out: Out = None) -> None:
    """Run `data.clean` and `data.split` into shards. In memory that does not grow with the files; goes on where it stopped."""
    from danlu import walk

    walk.data_clean(spec, set_ or [], out=out)


@app.command()
def quantize(spec: SpecFile, set_: Set = None, bundle: LatestOf = None) -> None:
    """Make the smaller version that `compress:` asks for. Shown beside the original's quality and speed; kept only within the budget."""
    from danlu import walk

    walk.quantize(spec, set_ or [], bundle=bundle)


@app.command()
def serve(
    spec: SpecFile,
    set_: Set = None,
    bundle: ProductionOf = None,
    on: On = "local",
    dry_run: DryRun = None,
    context: cli_cluster.Context = None,
    namespace: cli_cluster.Namespace = None,
) -> None:
    """Serve a bundle on Ray Serve until Ctrl-C. Takes a service spec, or a training job's (its `production` bundle)."""
    from danlu import places, walk, walk_cluster

    if places.place(on, dry_run=dry_run, context=context, namespace=namespace) == "local":
        walk.serve(spec, set_ or [], bundle=bundle)
    else:
        walk_cluster.deploy(spec, set_ or [], on=on, bundle=bundle, dry_run=dry_run is not None, context=context, namespace=namespace)


@app.command()
def predict(
    spec: SpecFile,
    text: Annotated[list[str] | None, typer.Argument(help="Texts; without any, one a line from standard input.")] = None,
    set_: Set = None,
    bundle: ProductionOf = None,
    explain: Annotated[bool, typer.Option("--explain", help="Of classification: say which words did most to each answer.")] = False,
) -> None:
    """Answer in this process, without a server. Takes texts, or JSON as the task's endpoint does; prints one JSON object a line."""
    from danlu import walk

    walk.predict(spec, set_ or [], text or [], bundle=bundle, explain=explain)


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
def monitor(
    port: Annotated[int, typer.Option(help="Prometheus' port on 127.0.0.1; 0 takes a free one.")] = 9090,
    alert_port: Annotated[int, typer.Option(help="Alertmanager's.")] = 9093,
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="Where alerts are sent; unset: they are only shown.")] = None,
) -> None:
    """Watch this machine's Ray with Prometheus until Ctrl-C. And with Alertmanager; as the system has them, our rules."""
    from danlu import walk

    walk.monitor(port=port, alert_port=alert_port, webhook=webhook)


@app.command()
def top(
    storage: Annotated[str, typer.Option(help="The storage URI whose jobs are shown.")] = "runs",
    once: Annotated[bool, typer.Option("--once", help="Print it once instead of live.")] = False,
) -> None:
    """Show jobs and services live in the terminal. Steps, loss, speed and time left; requests, failures, p95."""
    from danlu.top import watch

    watch(storage, once=once)


@app.command()
def render(spec: SpecFile, set_: Set = None) -> None:
    """Print what a spec is on Kubernetes, for a Git repository. The objects that --on k8s makes."""
    from danlu import walk_cluster

    walk_cluster.render(spec, set_ or [])


@app.command()
def doctor(
    storage: Annotated[str, typer.Option("--storage", help="Where runs would be kept.")] = "runs",
    on: Annotated[str | None, typer.Option("--on", help="k8s: a cluster is needed; local: none is asked; unset: if there is one.")] = None,
    context: cli_cluster.Context = None,
    namespace: cli_cluster.Namespace = None,
) -> None:
    """What this machine and the cluster have and lack, and what to do. Exits with 3 if something is missing."""
    from danlu import doctor as examination

    findings = examination.examine(storage, on=on, context=context, namespace=namespace)
    typer.echo(examination.table(findings))
    if any(finding.verdict == "missing" for finding in findings):
        raise typer.Exit(3)


@app.command()
def chat(
    target: Annotated[str | None, typer.Argument(metavar="[MODEL|URL]", help="A model's name, or a service's URL.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="The service; unset: OPENAI_BASE_URL, or port 8000 here.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
) -> None:
    """Talk with a served language model. The key comes from DANLU_API_KEY or OPENAI_API_KEY."""
    from danlu.client.chat import chat

    chat(target, url, system)


keys = typer.Typer(help="API keys of services: made, listed, revoked.", no_args_is_help=True)
app.add_typer(keys, name="keys")
KeysFile = Annotated[Path, typer.Option("--file", help="The file that `auth.keys_file` names.")]


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)],
    file: KeysFile = Path("keys.json"),
    tenant: Annotated[str | None, typer.Option("--tenant", help="Who pays for it, as for other keys; unset: NAME.")] = None,
    expires: Annotated[str | None, typer.Option("--expires", metavar="DAYS", help="30d, 12h; unset: never.")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model it may ask, or a pattern; may be repeated. Unset: all.")
    ] = None,
    max_ongoing: Annotated[int | None, typer.Option("--max-ongoing", min=1, help="Requests at once, in one replica.")] = None,
) -> None:
    """Make a key and print it. Only its hash is kept: it cannot be shown again."""
    from danlu.client import commands

    commands.create_key(file, name, tenant, expires, model or [], max_ongoing)


@keys.command("list")
def keys_list(file: KeysFile = Path("keys.json")) -> None:
    """List the keys and the tenants. Names, budgets, beginnings, dates, models."""
    from danlu.client import commands

    commands.list_keys(file)


@keys.command("revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(help="The key's name or beginning.", show_default=False)], file: KeysFile = Path("keys.json")
) -> None:
    """Make a key invalid. Services that read the file notice within a second."""
    from danlu.client import commands

    commands.revoke_key(file, name)


@keys.command("budget")
def keys_budget(
    tenant: Annotated[str, typer.Argument(help="Whose keys: --tenant of `create`, or the key's own name.", show_default=False)],
    usd_per_week: Annotated[float | None, typer.Option("--usd-per-week", help="What seven days may cost; unset: no budget.")] = None,
    file: KeysFile = Path("keys.json"),
) -> None:
    """Give a tenant a budget. Alerts tell at 80 and at 100 %; nobody is refused."""
    from danlu.client import commands

    commands.set_budget(file, tenant, usd_per_week)


bench = typer.Typer(help="Measurements.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("serve")
def bench_serve(
    url: Annotated[str, typer.Argument(help="The service's URL.", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", help="Unset: the service's base model.")] = None,
    requests: Annotated[int, typer.Option("--requests", min=1, help="How many, after the warm-up.")] = 200,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Clients that each wait for their answer.")] = 8,
    rate: Annotated[float | None, typer.Option("--rate", min=0.001, help="Requests a second at random instead (Poisson).")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Of every answer; unset: 16 to 128, mixed.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and arrivals.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", help="Write this .json, and an .html beside it.")] = None,
) -> None:
    """Put a load on a language model's service. Times to first token, between tokens and end to end, as its clients see them."""
    from danlu.client import commands

    commands.bench_serve(url, model, requests, concurrency, rate, max_tokens, seed, output)


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
            logs.begin("text", level=logging.WARNING)
            traces.begin("danlu")
            with traces.span(" ".join(["danlu", *sys.argv[1:2]]), carrier=traces.from_environment()):
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
        traces.end()
    sys.exit(code)


if __name__ == "__main__":
    main()
