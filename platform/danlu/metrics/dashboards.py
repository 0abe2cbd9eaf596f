"""Grafana dashboards out of the catalogue: what is on them. `grafana.py` turns them into Grafana's JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danlu.metrics import catalog as c
from danlu.metrics import costs
from danlu.metrics import foreign as f
from danlu.metrics.alerts import MFU_BASELINE, READY_REPLICAS
from danlu.metrics.objectives import ERROR_BUDGET, ERROR_RATIO, SLOW_RATIO
from danlu.metrics.promql import (
    Expr,
    Series,
    aggregate,
    call,
    count_rate,
    increase,
    mean,
    now,
    quantile,
    rate,
    select,
    total,
)

W = "$__rate_interval"
"""Grafana's own window: never shorter than four scrapes."""


@dataclass(frozen=True)
class Panel:
    """One panel: what it shows, in which unit, and how it looks when all is well. `queries` are (expression, legend)."""

    title: str
    good: str
    queries: tuple[tuple[Expr, str], ...]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    warn: float | None = None
    bad: float | None = None
    """Thresholds; with bad < warn small values are the bad ones."""
    stacked: bool = False
    width: int = 8
    link: str = ""
    """The dashboard that a click leads to."""


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of a series' label."""

    label: str
    series: Series


@dataclass(frozen=True)
class Dashboard:
    """A page. `rows` are titled groups of panels."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]
    annotations: tuple[tuple[str, Expr, str], ...] = ()
    """Marks on every panel: (name, expression, text)."""
    logs: tuple[str, str] | None = None
    """Whose log lines belong to it: the field of a line, and the variable whose values it has."""

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All of them, in order."""
        return tuple(panel for _, panels in self.rows for panel in panels)


_JOB = Variable("train_job", c.TRAIN_RUNNING)
_MODEL = Variable("model", c.SERVE_REQUESTS)
_RESTARTS = ("Restarts", increase(c.TRAIN_RESTARTS, "1m", train_job="$train_job") > 0, "{{train_job}} restarted: {{reason}}")
_CHECKPOINTS = (
    "Checkpoints",
    now() - select(c.TRAIN_CHECKPOINT_TIME, train_job="$train_job") < 30,
    "{{train_job}} saved a checkpoint",
)
_VERSIONS = ("New replicas", total(count_rate(f.RAY_REPLICA_STARTUP, "1m"), "application") > 0, "{{application}} started a replica")


def _of_job(series: Series) -> Expr:
    return aggregate("max", select(series, train_job="$train_job"), ["train_job"])


_TRAINING_JOBS = Panel(
    "Jobs that train",
    "As many as you started.",
    ((total(select(c.TRAIN_RUNNING)), "jobs"),),
    kind="stat",
    width=4,
    link="danlu-training-fleet",
)

OVERVIEW = Dashboard(
    "danlu-overview", "Danlu / Overview", "Is everything well? Training, serving and the machines on one page.", (),
    (("Now", (
        _TRAINING_JOBS,
        Panel("Steps left, slowest job", "Falls steadily.", ((aggregate("max", select(c.TRAIN_ETA)), "time left"),), "s", "stat", width=4),
        Panel("Goodput, worst job", "Above 0.8 after the first minutes.", ((aggregate("min", select(c.TRAIN_GOODPUT)), "goodput"),),
              "percentunit", "stat", warn=0.8, bad=0.5, width=4, link="danlu-training-fleet"),
        Panel("Requests a second", "Follows your users.", ((total(rate(c.SERVE_REQUESTS, W)), "requests"),), "reqps", "stat", width=4,
              link="danlu-serving"),
        Panel("Share of failed requests", f"Under {ERROR_BUDGET:.1%}, the objective.",
              ((aggregate("max", select(ERROR_RATIO["5m"])), "5xx"),), "percentunit", "stat", warn=ERROR_BUDGET, bad=0.05, width=4,
              link="danlu-serving"),
        Panel("Targets down", "0.", ((aggregate("count", select(f.UP).equals(0)) | aggregate("count", select(f.UP)) * 0, "down"),), kind="stat",
              warn=1, bad=1, width=4, link="danlu-cluster"))),
     ("Training", (
        Panel("Loss", "Falls, then levels off.", ((aggregate("max", select(c.TRAIN_LOSS), ["train_job"]), "{{train_job}}"),), width=12,
              link="danlu-training-run"),
        Panel("Tokens a second", "Level.", ((aggregate("max", select(c.TRAIN_TOKENS_PER_SECOND), ["train_job"]), "{{train_job}}"),), width=12,
              link="danlu-training-run"))),
     ("Serving", (
        Panel("Requests", "Follows your users; refusals and errors near the floor.",
              ((total(rate(c.SERVE_REQUESTS, W), "status"), "{{status}}"),), "reqps", stacked=True, width=12, link="danlu-serving"),
        Panel("Time to answer, p95", "Under 1 s.", ((quantile(0.95, c.SERVE_SECONDS, W, "model"), "{{model}}"),), "s", warn=0.5, bad=1.0,
              width=12, link="danlu-serving"))),
     ("Machines", (
        Panel("Processor", "Busy while training; below 90 % while only serving.", ((select(f.RAY_NODE_CPU), "{{ip}}"),), "percent", warn=90, bad=98,
              width=12, link="danlu-cluster"),
        Panel("Memory", "Below 90 %: Ray ends workers at 95 %.", ((select(f.RAY_NODE_MEMORY_USED) / select(f.RAY_NODE_MEMORY), "{{ip}}"),),
              "percentunit", warn=0.9, bad=0.95, width=12, link="danlu-cluster")))),
    (_VERSIONS,),
)  # fmt: skip

TRAINING_RUN = Dashboard(
    "danlu-training-run", "Danlu / Training run", "One job from its loss down to its ranks.", (_JOB,),
    (("Now", (
        Panel("Steps done", "Reaches 100 %.", ((_of_job(c.TRAIN_STEP) / _of_job(c.TRAIN_NUM_STEPS), "{{train_job}}"),), "percentunit", "stat", width=4),
        Panel("Time left", "Falls as fast as the clock.", ((_of_job(c.TRAIN_ETA), "{{train_job}}"),), "s", "stat", width=4),
        Panel("Goodput", "Above 0.8 after the first minutes.", ((_of_job(c.TRAIN_GOODPUT), "{{train_job}}"),), "percentunit", "stat",
              warn=0.8, bad=0.5, width=4),
        Panel("MFU", "Level; 0.3 to 0.5 is good on GPUs.", ((_of_job(c.TRAIN_MFU), "{{train_job}}"),), "percentunit", "stat", width=4),
        Panel("Age of the checkpoint", "Under three of its intervals.", ((now() - _of_job(c.TRAIN_CHECKPOINT_TIME), "{{train_job}}"),), "s",
              "stat", width=4),
        Panel("Restarts", "0.", ((total(increase(c.TRAIN_RESTARTS, "$__range", train_job="$train_job"), "reason"), "{{reason}}"),), kind="stat",
              warn=1, bad=3, width=4))),
     ("Learning", (
        Panel("Loss", "Falls, then levels off, near its best.",
              ((_of_job(c.TRAIN_LOSS), "loss"), (_of_job(c.TRAIN_BEST_LOSS), "best of 20 steps"))),
        Panel("Dev scores", "Rise with training; a falling score while the loss falls is overfitting.",
              ((aggregate("max", select(c.TRAIN_EVAL, train_job="$train_job"), ["metric"]), "{{metric}}"),)),
        Panel("Gradient norm before clipping", "Level or falling; a rise comes before a loss that runs away.", ((_of_job(c.TRAIN_GRAD_NORM), "norm"),)),
        Panel("Learning rate", "The schedule you asked for.", ((_of_job(c.TRAIN_LEARNING_RATE), "rate"),), "sci"),
        Panel("Tokens a second", "Level.", ((total(rate(c.TRAIN_TOKENS, W, train_job="$train_job"), "train_job"), "tokens"),)),
        Panel("Examples a second", "Level.", ((total(rate(c.TRAIN_EXAMPLES, W, train_job="$train_job"), "train_job"), "examples"),)))),
     ("Speed", (
        Panel("Time of a step", "p50 and p95 close together.",
              ((quantile(0.5, c.TRAIN_STEP_SECONDS, W, train_job="$train_job"), "p50"),
               (quantile(0.95, c.TRAIN_STEP_SECONDS, W, train_job="$train_job"), "p95")), "s"),
        Panel("Where a step's time goes", "Mostly forward and backward; data, wait and communication thin.",
              ((total(rate(c.TRAIN_PHASE_SECONDS, W, train_job="$train_job"), "phase"), "{{phase}}"),), "s", stacked=True),
        Panel("MFU against its own baseline", "Above 70 % of the baseline.",
              ((_of_job(c.TRAIN_MFU), "MFU"), (select(MFU_BASELINE, train_job="$train_job"), "p90 of 6 h")), "percentunit"),
        Panel("Where the time went", "Mostly step.", ((total(rate(c.TRAIN_WALL_SECONDS, W, train_job="$train_job"), "activity"), "{{activity}}"),), "s",
              stacked=True),
        Panel("Tokens lost to restarts", "0.", ((total(increase(c.TRAIN_TOKENS_LOST, "$__range", train_job="$train_job")), "tokens"),), kind="stat", warn=1),
        Panel("Peak of a worker", "What its maker states, or what was measured.",
              ((aggregate("max", select(c.TRAIN_PEAK_FLOPS, train_job="$train_job"), ["source"]), "{{source}}"),), "flops", "stat"))),
     ("Ranks and checkpoints", (
        Panel("Ranks by themselves", "All alike: the slowest sets the pace.",
              ((aggregate("max", select(c.TRAIN_RANK_SECONDS, train_job="$train_job"), ["rank"]), "rank {{rank}}"),), "s"),
        Panel("Slowest over median rank", "Close to 1.", ((_of_job(c.TRAIN_STRAGGLING), "ratio"),), warn=1.3, bad=1.5),
        Panel("Memory of a rank", "Level.", ((aggregate("max", select(c.TRAIN_MEMORY, train_job="$train_job"), ["rank"]), "rank {{rank}}"),), "bytes"),
        Panel("Time to save a checkpoint", "Level, small against the interval.",
              ((mean(c.TRAIN_CHECKPOINT_SECONDS, "30m", train_job="$train_job"), "mean"),), "s"),
        Panel("Size of a checkpoint", "Level.", ((_of_job(c.TRAIN_CHECKPOINT_BYTES), "size"),), "bytes"),
        Panel("Checkpoint interval", "What a restart may lose; minutes.", ((_of_job(c.TRAIN_CHECKPOINT_INTERVAL), "interval"),), "s")))),
    (_RESTARTS, _CHECKPOINTS), ("train_job", "train_job"),
)  # fmt: skip

TRAINING_FLEET = Dashboard(
    "danlu-training-fleet", "Danlu / Training fleet", "All jobs beside each other.", (),
    (("Jobs", (
        _TRAINING_JOBS,
        Panel("Failed in the last day", "0.", ((total(increase(c.TRAIN_FAILURES, "1d"), "reason"), "{{reason}}"),), kind="stat", warn=1, bad=1, width=10),
        Panel("Restarts in the last day", "Few, and only worker_lost on spot machines.",
              ((total(increase(c.TRAIN_RESTARTS, "1d"), "reason"), "{{reason}}"),), kind="stat", warn=3, bad=10, width=10),
        Panel("Goodput", "Above 0.8.", ((aggregate("max", select(c.TRAIN_GOODPUT), ["train_job"]), "{{train_job}}"),), "percentunit", "table",
              warn=0.8, bad=0.5, link="danlu-training-run"),
        Panel("MFU", "Level in each job.", ((aggregate("max", select(c.TRAIN_MFU), ["train_job"]), "{{train_job}}"),), "percentunit", "table",
              link="danlu-training-run"),
        Panel("Time left", "Falls.", ((aggregate("max", select(c.TRAIN_ETA), ["train_job"]), "{{train_job}}"),), "s", "table",
              link="danlu-training-run"))),
     ("Over time", (
        Panel("Wall time by what it went into", "Mostly step.", ((total(rate(c.TRAIN_WALL_SECONDS, W), "activity"), "{{activity}}"),), "s",
              stacked=True, width=12),
        Panel("Tokens a second", "Level.", ((total(rate(c.TRAIN_TOKENS, W), "train_job"), "{{train_job}}"),), stacked=True, width=12,
              link="danlu-training-run"),
        Panel("Slowest over median rank", "Close to 1.", ((aggregate("max", select(c.TRAIN_STRAGGLING), ["train_job"]), "{{train_job}}"),),
              warn=1.3, bad=1.5, width=12),
Panel("Jobs whose workers have not begun", "0 after a minute or two.",
              ((aggregate("count", select(c.TRAIN_RUNNING).equals(1).unless(select(c.TRAIN_NUM_STEPS)))
                | aggregate("count", select(c.TRAIN_RUNNING)) * 0, "jobs"),), width=12)))),
)  # fmt: skip

SERVING = Dashboard(
    "danlu-serving", "Danlu / Serving", "One model's users: how much, how fast, how well.", variables=(_MODEL,),
    logs=("service", "model"), rows=(("Objectives", (
        Panel("Failed requests, by window", f"All under {ERROR_BUDGET:.1%}.",
              tuple((select(ratio, model="$model"), window) for window, ratio in ERROR_RATIO.items()), "percentunit", warn=ERROR_BUDGET, bad=0.072,
              width=12),
        Panel("Slow requests, by window", "All under 1 %.",
              tuple((select(ratio, model="$model"), window) for window, ratio in SLOW_RATIO.items()), "percentunit", warn=0.01, bad=0.144,
              width=12))),
     ("Requests", (
        Panel("Answers by status", "Nearly all 200.", ((total(rate(c.SERVE_REQUESTS, W, model="$model"), "status"), "{{status}}"),), "reqps",
              stacked=True),
        Panel("Time to answer", "p95 under 1 s, p99 not far from it.",
              tuple((quantile(q, c.SERVE_SECONDS, W, model="$model"), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)), "s", warn=0.5, bad=1.0),
        Panel("Refused", "None, or a client's own mistakes.", ((total(rate(c.SERVE_REFUSALS, W, model="$model"), "reason"), "{{reason}}"),), "reqps"),
        Panel("In flight", "Below max_ongoing_requests times replicas.", ((total(select(c.SERVE_IN_FLIGHT, model="$model"), "model"), "requests"),)),
        Panel("Texts a second", "Follows requests.", ((total(rate(c.SERVE_INPUTS, W, model="$model"), "model"), "texts"),)),
        Panel("Tokens a second", "Follows texts.", ((total(rate(c.SERVE_TOKENS, W, model="$model"), "model"), "tokens"),)))),
     ("Batches", (
        Panel("Waiting for a batch, p95", "Close to the time of a forward.", ((quantile(0.95, c.SERVE_QUEUE_SECONDS, W, "model", model="$model"), "p95"),),
              "s", warn=0.25, bad=0.5),
        Panel("Texts in a forward, mean", "Grows with load: that is what batching is for.", ((mean(c.SERVE_BATCH_ROWS, W, model="$model"), "texts"),)),
        Panel("Time of a forward", "Level.", ((quantile(0.5, c.SERVE_BATCH_SECONDS, W, model="$model"), "p50"),
                                            (quantile(0.95, c.SERVE_BATCH_SECONDS, W, model="$model"), "p95")), "s"))),
     ("Language models", (
        Panel("Time to the first token", "p95 under 2 s.",
              tuple((quantile(q, c.SERVE_FIRST_TOKEN_SECONDS, W, model="$model"), f"p{q * 100:g}") for q in (0.5, 0.95)), "s", warn=1, bad=2),
        Panel("Time between tokens", "p95 not far from p50, and faster than one reads.",
              tuple((quantile(q, c.SERVE_INTER_TOKEN_SECONDS, W, model="$model"), f"p{q * 100:g}") for q in (0.5, 0.95)), "s", warn=0.1, bad=0.25),
        Panel("Answers running and waiting", "Waiting near 0.", ((total(select(c.SERVE_RUNNING, model="$model"), "model"), "running"),
                                                                 (total(select(c.SERVE_WAITING, model="$model"), "model"), "waiting"))),
        Panel("KV cache, fullest replica", "Below 95 %, or nobody waits.",
              ((aggregate("max", select(c.SERVE_CACHE_USE, model="$model"), ["model"]), "use"),), "percentunit", warn=0.9, bad=0.95),
        Panel("Prompt tokens found in the cache", "High where prompts begin alike.",
              ((total(rate(c.SERVE_PREFIX_HIT, W, model="$model"), "model")
                / call("clamp_min", total(rate(c.SERVE_PREFIX_QUERIED, W, model="$model"), "model"), 1e-9), "found"),), "percentunit"),
        Panel("Prompt and answer tokens a second", "Follows requests.",
              ((total(rate(c.SERVE_PROMPT_TOKENS, W, model="$model"), "model"), "prompts"),
               (total(rate(c.SERVE_COMPLETION_TOKENS, W, model="$model"), "model"), "answers"))),
        Panel("Answers by how they ended", "Mostly stop; length is an answer cut short.",
              ((total(rate(c.SERVE_SEQUENCES, W, model="$model"), "finish_reason"), "{{finish_reason}}"),), "reqps", stacked=True),
        Panel("Adapters in memory, fullest replica", "Those you have loaded.",
              ((aggregate("max", select(c.SERVE_ADAPTERS, model="$model"), ["model"]), "adapters"),)),
        Panel("Adapters loaded in this range", "No failed ones.",
              ((total(increase(c.SERVE_ADAPTER_LOADS, "$__range", model="$model"), "outcome"), "{{outcome}}"),), kind="stat"))),
     ("Replicas", (
        Panel("Replicas", "Ready equals wanted.",
              ((total(select(f.RAY_TARGET_REPLICAS), "application"), "{{application}} wanted"),
               (total(select(READY_REPLICAS), "application"), "{{application}} ready"))),
        Panel("Time to start a replica, mean", "Seconds; a burst waits that long.", ((mean(f.RAY_REPLICA_STARTUP, "30m", "application"), "{{application}}"),),
              "ms", warn=60_000, bad=120_000))),
     ("Keys", (
        Panel("Time to answer by key, p95", "Alike for those who ask alike.",
              ((quantile(0.95, c.SERVE_KEY_SECONDS, W, "key", model="$model"), "{{key}}"),), "s", warn=0.5, bad=1.0),
        Panel("Until the next key expires", "Over a week, or empty where none will.",
              ((aggregate("min", select(c.SERVE_KEY_EXPIRY, model="$model") > 0, ["model"]) - now(), "{{model}}"),), "s", "stat", warn=14 * 86_400,
              bad=7 * 86_400),
        Panel("Replicas that cannot read the keys", "0.", ((total(select(c.SERVE_KEYS_UNREADABLE, model="$model"), "model"), "{{model}}"),), kind="stat",
              warn=1, bad=1))),
     ("vLLM", (
        Panel("Time to the first token, p95", "Under 2 s.", ((quantile(0.95, f.VLLM_TTFT, W, "model_name"), "{{model_name}}"),), "s", warn=1, bad=2),
        Panel("KV cache", "Below 95 %.", ((aggregate("max", select(f.VLLM_KV_USAGE), ["model_name"]), "{{model_name}}"),), "percentunit", warn=0.9,
              bad=0.95),
        Panel("Requests running and waiting", "Waiting near 0.", ((total(select(f.VLLM_RUNNING), "model_name"), "{{model_name}} running"),
                                                                  (total(select(f.VLLM_WAITING), "model_name"), "{{model_name}} waiting")))))),
    annotations=(_VERSIONS,),
)  # fmt: skip

CLUSTER = Dashboard(
    "danlu-cluster", "Danlu / Cluster and queue", "Machines, GPUs and who waits for them.", (),
    (("Nodes", (
        Panel("Targets", "All 1.", ((select(f.UP), "{{instance}}"),), kind="stat", warn=1, bad=0.5),
        Panel("Nodes", "As many as you pay for.", ((total(select(f.RAY_NODES), "node_type"), "{{node_type}}"),), kind="stat"),
        Panel("Disk", "Below 90 %.", ((select(f.RAY_NODE_DISK), "{{ip}}"),), "percent", warn=85, bad=90),
        Panel("Processor", "Busy while training.", ((select(f.RAY_NODE_CPU), "{{ip}}"),), "percent"),
        Panel("Memory", "Below 90 %.", ((select(f.RAY_NODE_MEMORY_USED) / select(f.RAY_NODE_MEMORY), "{{ip}}"),), "percentunit", warn=0.9, bad=0.95),
        Panel("Ray's resources", "USED is what you pay for and use; AVAILABLE is idle.",
              ((total(select(f.RAY_RESOURCES), "Name", "State"), "{{Name}} {{State}}"),)))),
     ("GPUs", (
        Panel("Use, as Ray sees it", "Above 80 % while training.", ((select(f.RAY_NODE_GPU), "{{ip}} {{GpuIndex}}"),), "percent"),
        Panel("Use, as DCGM sees it", "Above 80 % while training.", ((select(f.DCGM_UTIL), "{{Hostname}} {{gpu}}"),), "percent"),
        Panel("Memory", "Level.", ((select(f.DCGM_MEMORY_USED), "{{Hostname}} {{gpu}}"),), "decmbytes"),
        Panel("Temperature", "Below 85 C.", ((select(f.DCGM_TEMPERATURE), "{{Hostname}} {{gpu}}"),), "celsius", warn=85, bad=88),
        Panel("Last XID error", "0.", ((select(f.DCGM_XID), "{{Hostname}} {{gpu}}"),), kind="stat", warn=1, bad=1))),
     ("Queue", (
        Panel("Waiting workloads", "Short-lived.", ((total(select(f.KUEUE_PENDING), "cluster_queue", "status"), "{{cluster_queue}} {{status}}"),)),
        Panel("Admitted workloads", "As the quota allows.", ((total(select(f.KUEUE_ADMITTED), "cluster_queue"), "{{cluster_queue}}"),)),
        Panel("Time to admission, p95", "Minutes.", ((quantile(0.95, f.KUEUE_WAIT, "1h", "cluster_queue"), "{{cluster_queue}}"),), "s", warn=900,
              bad=3600),
        Panel("Evicted in an hour", "0, or preempted by what matters more.",
              ((total(increase(f.KUEUE_EVICTED, "1h"), "cluster_queue", "reason"), "{{cluster_queue}} {{reason}}"),)),
        Panel("Until a certificate expires", "Over two weeks; cert-manager renews a month before.",
              ((aggregate("min", select(f.CERTIFICATE_EXPIRY), ["name"]) - now(), "{{name}}"),), "s", warn=21 * 86_400, bad=14 * 86_400),
        Panel("RayJobs by state", "Running, then Complete.",
              ((total(select(f.KUBERAY_JOB_STATUS), "deployment_status"), "{{deployment_status}}"),), stacked=True)))),
)  # fmt: skip

COST = Dashboard(
    "danlu-cost", "Danlu / Tenants and cost", "Device time and money by job, model and tenant. Prices: platform/danlu/metrics/prices.py.",
    (_JOB, _MODEL),
    (("Training", (
        Panel("Spent in this range", "What you planned.", ((total(increase(c.TRAIN_COST, "$__range", train_job="$train_job"), "train_job"), "{{train_job}}"),),
              "currencyUSD", "stat", width=12),
        Panel("Spent on what did not move a model", "Little.",
              ((total(increase(c.TRAIN_COST, "$__range", train_job="$train_job"), "train_job")
                - total(increase(c.TRAIN_COST, "$__range", train_job="$train_job"), "train_job") * _of_job(c.TRAIN_GOODPUT), "{{train_job}}"),),
              "currencyUSD", "stat", width=12),
        Panel("Budget used", "Below 80 %; empty for a job without budget_usd.", ((_of_job(c.TRAIN_BUDGET_USED), "{{train_job}}"),), "percentunit",
              warn=0.8, bad=1.0, width=12),
        Panel("Budget left", "What the rest needs.",
              ((_of_job(c.TRAIN_BUDGET) - _of_job(c.TRAIN_BUDGET) * _of_job(c.TRAIN_BUDGET_USED), "{{train_job}}"),),
              "currencyUSD", "stat", width=12),
        Panel("USD an hour", "Level while jobs run, 0 after.", ((total(rate(c.TRAIN_COST, W, train_job="$train_job"), "train_job") * 3600, "{{train_job}}"),),
              "currencyUSD", stacked=True, width=12),
        Panel("Devices in use", "As many as the jobs asked for.",
              ((total(rate(c.TRAIN_DEVICE_SECONDS, W, train_job="$train_job"), "train_job", "device"), "{{train_job}} {{device}}"),), stacked=True, width=12),
        Panel("USD a million tokens", "Falls with batch size and MFU.",
              ((total(rate(c.TRAIN_COST, "10m", train_job="$train_job"), "train_job")
                / total(rate(c.TRAIN_TOKENS, "10m", train_job="$train_job"), "train_job") * 1e6, "{{train_job}}"),), "currencyUSD", width=12),
        Panel("Device hours in this range", "What you planned.",
              ((total(increase(c.TRAIN_DEVICE_SECONDS, "$__range", train_job="$train_job"), "train_job", "device") / 3600,
                "{{train_job}} {{device}}"),), kind="table", width=12))),
     ("Serving", (
        Panel("Spent in this range", "What you planned; idle replicas cost as much as busy ones.",
              ((costs.spent("$__range", model="$model"), "{{model}}"),), "currencyUSD", "stat", width=12),
        Panel("Device hours in this range", "What you planned.",
              ((total(increase(c.SERVE_DEVICE_SECONDS, "$__range", model="$model"), "model", "device") / 3600, "{{model}} {{device}}"),),
              kind="stat", width=12),
        Panel("USD an hour", "Follows the replicas.", ((total(rate(c.SERVE_COST, W, model="$model"), "model") * 3600, "{{model}}"),),
              "currencyUSD", stacked=True, width=12),
        Panel("USD a million tokens", "Falls with load: idle replicas cost as much as busy ones.",
              ((select(costs.USD_A_MILLION_TOKENS, model="$model"), "{{model}}"),), "currencyUSD", width=12))),
     ("Tenants", (
        Panel("Spent in this range, by tenant", "What each has agreed to. A model's money, by each one's share of its tokens.",
              ((total(costs.of_tenants(costs.spent("$__range", model="$model"), "$__range", model="$model"), "tenant"), "{{tenant}}"),),
              "currencyUSD", "table", width=8),
        Panel("Device hours in this range, by tenant", "As its share of the tokens.",
              ((total(costs.of_tenants(total(increase(c.SERVE_DEVICE_SECONDS, "$__range", model="$model"), "model"), "$__range", model="$model"),
                      "tenant") / 3600, "{{tenant}}"),), kind="table"),
        Panel("USD in an hour, by model and tenant", "As usual.", ((select(costs.TENANT_USD, model="$model"), "{{model}} {{tenant}}"),),
              "currencyUSD", stacked=True),
        Panel("Week's budget used", "Below 80 %; empty without `danlu keys budget`.", ((select(costs.TENANT_BUDGET_USED), "{{tenant}}"),),
              "percentunit", warn=0.8, bad=1.0, width=12),
        Panel("Left of the week's budget", "What the rest of it needs.",
              ((aggregate("max", select(c.SERVE_TENANT_BUDGET), ["tenant"]) - select(costs.TENANT_SPENT), "{{tenant}}"),), "currencyUSD", "stat",
              width=12))),
     ("Keys", (
        Panel("Requests a second, by key", "Those you know, as they usually ask.",
              ((total(rate(c.SERVE_KEY_REQUESTS, W, model="$model"), "key"), "{{key}}"),), "reqps", stacked=True, width=12),
        Panel("Tokens a second, by key", "Nobody takes all of it.",
              ((total(rate(c.SERVE_KEY_TOKENS, W, model="$model"), "key", "kind"), "{{key}} {{kind}}"),), stacked=True, width=12),
        Panel("Tokens in this range, by key", "What each has used.",
              ((total(increase(c.SERVE_KEY_TOKENS, "$__range", model="$model"), "key"), "{{key}}"),), kind="table", width=24)))),
)  # fmt: skip

DASHBOARDS: tuple[Dashboard, ...] = (OVERVIEW, TRAINING_RUN, TRAINING_FLEET, SERVING, CLUSTER, COST)
