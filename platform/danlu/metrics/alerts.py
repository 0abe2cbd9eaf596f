"""What somebody should hear of: recording rules and alerts, each declared once. Rule files and runbooks are made from this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danlu.metrics import catalog as c
from danlu.metrics import costs
from danlu.metrics import foreign as f
from danlu.metrics.objectives import ERROR_BUDGET, ERROR_RATIO, SLOW_BUDGET, SLOW_RATIO, SLOW_S
from danlu.metrics.promql import (
    Expr,
    Matches,
    Recorded,
    aggregate,
    call,
    increase,
    mean,
    now,
    over_time,
    quantile,
    rate,
    select,
    total,
)

MFU_BASELINE = Recorded(
    "train_job:danlu_train_mfu:p90_6h",
    aggregate("max", over_time("quantile", c.TRAIN_MFU, "6h", quantile=0.9), ["train_job"]),
    "What a job has shown it can reach: the 90th percentile of six hours.",
)
READY_REPLICAS = Recorded(
    "deployment:ray_serve_replicas_ready:sum",
    total(select(f.RAY_HEALTHY_REPLICAS), "application", "deployment"),
    "Replicas that answer.",
)
RECORDED: tuple[Recorded, ...] = (*ERROR_RATIO.values(), *SLOW_RATIO.values(), MFU_BASELINE, READY_REPLICAS, *costs.RECORDED)

Severity = Literal["critical", "warning"]
Component = Literal["train", "serve", "cluster"]


@dataclass(frozen=True)
class Alert:
    """One alert. `for_` is how long `expr` has to hold; `steps` are what to do, commands as they are typed."""

    name: str
    component: Component
    severity: Severity
    expr: Expr
    for_: str
    summary: str
    meaning: str
    steps: tuple[str, ...]
    dashboard: str

    @property
    def runbook(self) -> str:
        """Its path in the repository."""
        return f"ops/runbooks/{self.name}.md"


def _job(expr: Expr) -> Expr:
    """One series a job: a process that ordered it before may still be remembered."""
    return aggregate("max", expr, ["train_job"])


def _while_training(expr: Expr) -> Expr:
    return expr & _job(select(c.TRAIN_RUNNING)).equals(1)


_RUN, _FLEET, _SERVING, _CLUSTER, _COST = "danlu-training-run", "danlu-training-fleet", "danlu-serving", "danlu-cluster", "danlu-cost"
_TOP = "`danlu top` lists jobs with their last step and speed."
_WORKER_LOGS = "Look into the workers: `ray list actors --filter state=ALIVE`, then `ray logs actor --id ACTOR_ID`."
_POD_LOGS = "On Kubernetes: `kubectl get pods -l ray.io/node-type=worker`, then `kubectl logs POD`."
_GO_ON = "The same `danlu train SPEC` goes on from the last whole checkpoint."


def _burns(ratios: dict[str, Recorded], budget: float, factor: float, long: str, short: str) -> Expr:
    """https://sre.google/workbook/alerting-on-slos: a long window that it matters, a short one that it still goes on."""
    return (select(ratios[long]) > factor * budget) & (select(ratios[short]) > factor * budget)


ALERTS: tuple[Alert, ...] = (
    Alert(
        "TrainingStalled", "train", "critical",
        _while_training(_job(over_time("changes", c.TRAIN_STEP, "10m")).equals(0)), "5m",
        "{{ $labels.train_job }} has made no step for 15 minutes",
        "The job runs and holds its devices, but no optimizer step ends: a rank hangs in a collective, a disk or an object store does not "
        "answer, or one worker is stopped while the others wait for it.",
        (_TOP, _WORKER_LOGS, _POD_LOGS,
         "See where a worker stands: `py-spy dump --pid PID` on its node. All in a collective but one: that one is the fault.",
         f"End the hanging worker's process; with `max_failures` the job restarts by itself. {_GO_ON}"), _RUN,
    ),
    Alert(
        "TrainingDiverging", "train", "warning",
        _while_training(_job(over_time("avg", c.TRAIN_LOSS, "10m")) > _job(select(c.TRAIN_BEST_LOSS)) * 1.5 + 0.2), "5m",
        "The loss of {{ $labels.train_job }} is far above its best",
        "The mean loss of ten minutes is more than half above the best that 20 steps ever had. Training seldom comes back from this.",
        ("Look at loss, gradient norm and learning rate side by side: a norm that grew first means the rate is too high.",
         "Stop it with Ctrl-C, or `kubectl delete rayjob NAME`: an earlier checkpoint is kept.",
         "Go on with a lower rate: `danlu train SPEC --set optim.learning_rate=1e-5 --fresh`."), _RUN,
    ),
    Alert(
        "TrainingFailed", "train", "critical",
        total(increase(c.TRAIN_FAILURES, "15m", reason=Matches("interrupted", negated=True)), "train_job", "reason") > 0, "0m",
        "{{ $labels.train_job }} ended without a result: {{ $labels.reason }}",
        "The job is over and left no bundle. `diverged`: a loss or gradient that is not a number. `worker_lost`: no restarts were left. "
        "`error`: the error stands in its log and in the run's status.json.",
        (_TOP, "Read the reason: it says what would work.", _GO_ON), _RUN,
    ),
    Alert(
        "CheckpointTooOld", "train", "warning",
        _while_training(now() - _job(select(c.TRAIN_CHECKPOINT_TIME)) > _job(select(c.TRAIN_CHECKPOINT_INTERVAL)) * 3 + 600), "1m",
        "{{ $labels.train_job }} has not saved a checkpoint for three times its interval",
        "A lost worker would now cost all the work since the last whole checkpoint.",
        (_TOP, "See whether saving takes long, or whether training is slow or stalled (then its own alert says so).",
         "Is the storage full or slow? `df -h`, and the object store's own status.",
         "Save more often: `danlu train SPEC --set checkpoint.save_steps=100`."), _RUN,
    ),
    Alert(
        "TrainingStraggler", "train", "warning",
        _while_training(_job(over_time("min", c.TRAIN_STRAGGLING, "10m")) > 1.5), "5m",
        "One rank of {{ $labels.train_job }} is 1.5 times slower than the others",
        "Every step waits for its slowest rank. The panel of ranks shows which one; it is a busy or hot node, a failing GPU, or uneven rows.",
        ("Find the rank in the panel `Ranks by themselves`, and its node: `ray list actors --filter state=ALIVE`.",
         "On the node: `nvidia-smi -q -d TEMPERATURE,CLOCK,ECC`, `top -b -n 1`.",
         "Take the node out: `kubectl cordon NODE`, end its worker; the job restarts on another (`max_failures`)."), _RUN,
    ),
    Alert(
        "TrainingRestarting", "train", "warning",
        total(increase(c.TRAIN_RESTARTS, "1h", reason=Matches("started_again", negated=True)), "train_job", "reason") > 2, "0m",
        "{{ $labels.train_job }} restarted more than twice in an hour ({{ $labels.reason }})",
        "Each restart loses the steps since the last checkpoint and the time to start again. The reason is the label's.",
        (_TOP, "out_of_memory: `danlu plan SPEC` says what a worker holds; `--set micro_batch_size=...` lowers it.",
         f"worker_lost: {_POD_LOGS} and `kubectl describe pod POD` (OOMKilled, Evicted, spot node taken away).",
         "error: the stack stands in the driver's log."), _RUN,
    ),
    Alert(
        "TrainingSlow", "train", "warning",
        _while_training(_job(over_time("avg", c.TRAIN_MFU, "10m")) < select(MFU_BASELINE) * 0.7), "10m",
        "{{ $labels.train_job }} runs at less than 70 % of what it reached before",
        "Model FLOPs utilisation fell against the job's own last hours: another job on the node, throttling, slow reading, a slow network.",
        ("See which part of the step grew in `Where a step's time goes`.", "data: storage or the tokenizer. wait: a straggler. "
         "communication: the network between workers, or a straggler.", "On the node: `nvidia-smi -q -d PERFORMANCE,CLOCK`, `top -b -n 1`."), _RUN,
    ),
    Alert(
        "TrainingGoodputLow", "train", "warning",
        _while_training(_job(select(c.TRAIN_GOODPUT)) < 0.5), "1h",
        "Less than half of {{ $labels.train_job }}'s time moved its model",
        "Most of the paid time goes into start-up, restarts, evaluation, checkpoints or stalls.",
        ("See which in `Where the time went`.", "evaluation: `--set evaluation.eval_steps=...`, checkpoint: `--set checkpoint.save_steps=...`.",
         "restart, replay: mend the cause, or save more often.", "See what is asked: `danlu plan SPEC`."), _RUN,
    ),
    Alert(
        "BudgetNearlySpent", "train", "warning",
        _job(select(c.TRAIN_BUDGET_USED)) > 0.8, "0m",
        "{{ $labels.train_job }} has cost four fifths of its budget",
        "Of the job's `budget_usd` 80 % are spent, by the prices of platform/danlu/metrics/prices.py, attempts that failed included. Nothing is "
        "stopped.",
        ("Is the rest enough? `Time left` against `USD an hour`.", "Where it went: `Where the time went`; `danlu plan SPEC` says what was expected.",
         "More: `danlu train SPEC --set budget_usd=500` goes on with the same run."), _COST,
    ),
    Alert(
        "BudgetSpent", "train", "critical",
        _job(select(c.TRAIN_BUDGET_USED)) > 1, "0m",
        "{{ $labels.train_job }} has cost more than its budget",
        "The job's `budget_usd` is spent, and it trains on: whether to stop it is for whoever pays to say.",
        ("Stop it: Ctrl-C, or `kubectl delete rayjob NAME`. The last checkpoint is kept.",
         "Go on with it: `danlu train SPEC --set budget_usd=500`."), _COST,
    ),
    Alert(
        "TenantBudgetNearlySpent", "serve", "warning",
        select(costs.TENANT_BUDGET_USED) > 0.8, "15m",
        "{{ $labels.tenant }} has cost four fifths of its week's budget",
        "Its share of what replicas cost in the last seven days, by its share of their tokens, is above 80 % of `danlu keys budget`. Nobody is "
        "refused. In a quiet week a tenant pays for idle replicas, too: fewer of them lower everybody's share.",
        ("By which of its keys? `Tokens in this range, by key`; `danlu keys list` shows whose they are.",
         "Replicas that idle: `danlu serve SPEC --set autoscaling.min_replicas=0`.", "More: `danlu keys budget TENANT --usd-per-week 500`."), _COST,
    ),
    Alert(
        "TenantBudgetSpent", "serve", "critical",
        select(costs.TENANT_BUDGET_USED) > 1, "15m",
        "{{ $labels.tenant }} has cost more than its week's budget",
        "Its budget of seven days is spent, and it is answered on: whether to refuse it is for whoever pays to say.",
        ("Shut it out: `danlu keys revoke NAME`, for each of its keys in `danlu keys list`.",
         "More: `danlu keys budget TENANT --usd-per-week 500`."), _COST,
    ),
    Alert(
        "WorkersNotScheduled", "train", "warning",
        _job(select(c.TRAIN_RUNNING)).equals(1).unless(_job(select(c.TRAIN_NUM_STEPS))), "15m",
        "{{ $labels.train_job }} has been ordered for 15 minutes and its workers have not begun",
        "Ray Train has asked for workers and the cluster does not give them (too few CPUs or GPUs, nodes that do not come), or they take long "
        "to load. Ray's own state of a training is no help: it is shown for seconds after it changed only.",
        ("`ray status` shows demand and nodes.", "On Kubernetes: `kubectl get pods`, `kubectl describe pod POD` (Pending: quota, taints).",
         "Ask for fewer: `danlu train SPEC --set workers.num_workers=...`."), _FLEET,
    ),
    Alert(
        "JobQueuedTooLong", "train", "warning",
        total(select(f.KUEUE_PENDING), "cluster_queue", "status") > 0, "1h",
        "Workloads wait in {{ $labels.cluster_queue }} for over an hour ({{ $labels.status }})",
        "Kueue has no quota for them. `inadmissible` workloads can never run as they are.",
        ("`kubectl get workloads -A`, `kubectl describe workload NAME`.", "`kubectl get clusterqueue -o wide` shows quota and use.",
         "Ask for less, or raise the queue's quota."), _CLUSTER,
    ),
    Alert(
        "RayJobFailed", "train", "critical",
        select(f.KUBERAY_JOB_STATUS, deployment_status="Failed").equals(1), "0m",
        "RayJob {{ $labels.namespace }}/{{ $labels.name }} failed",
        "The job ended without success, and its cluster may be gone with its metrics. The run's folder in the storage has its records.",
        ("`kubectl describe rayjob NAME`, `kubectl logs job/NAME`.", "`danlu top` shows the status the run wrote.", _GO_ON), _FLEET,
    ),
    Alert(
        "GpuFaulty", "cluster", "critical",
        (select(f.DCGM_XID) > 0).unless(select(f.DCGM_XID).equals(13) | select(f.DCGM_XID).equals(31) | select(f.DCGM_XID).equals(43)
                                        | select(f.DCGM_XID).equals(45)) | select(f.DCGM_ROW_REMAP_FAILURE).equals(1), "1m",
        "GPU {{ $labels.gpu }} of {{ $labels.Hostname }} reports a hardware error",
        "An XID that a program does not cause by itself (13, 31, 43 and 45 are left out), or a memory row that could not be mapped away.",
        ("`kubectl cordon NODE`, then end its workers: jobs go on elsewhere from their checkpoints.",
         "On the node: `nvidia-smi -q -d ECC,ROW_REMAPPER`, `dmesg`.",
         "48, 63, 64, 74, 79, 94, 95: reset or replace the GPU."), _CLUSTER,
    ),
    Alert(
        "GpuHot", "cluster", "warning",
        select(f.DCGM_TEMPERATURE) > 88, "10m",
        "GPU {{ $labels.gpu }} of {{ $labels.Hostname }} is above 88 C",
        "It throttles, and every rank waits for it.",
        ("`nvidia-smi -q -d TEMPERATURE,PERFORMANCE`.", "`kubectl cordon NODE` if it stays so."), _CLUSTER,
    ),
    Alert(
        "ServingErrorBudgetFast", "serve", "critical",
        _burns(ERROR_RATIO, ERROR_BUDGET, 14.4, "1h", "5m"), "2m",
        "{{ $labels.model }} fails so many requests that its monthly budget is gone in two days",
        "More than 7.2 % of the requests of an hour and of five minutes got a 5xx.",
        ("See which status in `Answers by status`: 503 is no room (scale up), 504 too slow, 500 the engine.",
         "`danlu top`, `ray list actors --filter class_name=ServeReplica`, then `ray logs actor --id ACTOR_ID`.",
         "A new version? Go back: `danlu serve SPEC --bundle NAME@vN`."), _SERVING,
    ),
    Alert(
        "ServingErrorBudgetSlow", "serve", "warning",
        _burns(ERROR_RATIO, ERROR_BUDGET, 6, "6h", "30m"), "15m",
        "{{ $labels.model }} fails so many requests that its monthly budget is gone in five days",
        "More than 3 % of the requests of six hours and of half an hour got a 5xx.",
        ("As for ServingErrorBudgetFast, with time to find the cause.", "`danlu top`"), _SERVING,
    ),
    Alert(
        "ServingLatencyBudgetFast", "serve", "critical",
        _burns(SLOW_RATIO, SLOW_BUDGET, 14.4, "1h", "5m"), "2m",
        "{{ $labels.model }} answers more than one request in seven too late",
        f"More than 14.4 % of the requests of an hour and of five minutes took longer than {SLOW_S} s.",
        ("Queue or forward? `Waiting for a batch` against `Time of a forward`.",
         "Waiting: more replicas, `danlu serve SPEC --set autoscaling.max_replicas=8`.",
         "Forward: longer texts, or a node shared with training (`top -b -n 1`)."), _SERVING,
    ),
    Alert(
        "ServingLatencyBudgetSlow", "serve", "warning",
        _burns(SLOW_RATIO, SLOW_BUDGET, 6, "6h", "30m"), "15m",
        "{{ $labels.model }} answers more than one request in 17 too late",
        f"More than 6 % of the requests of six hours and of half an hour took longer than {SLOW_S} s.",
        ("As for ServingLatencyBudgetFast.", "`danlu top`"), _SERVING,
    ),
    Alert(
        "ServingErrors", "serve", "warning",
        select(ERROR_RATIO["5m"]) > 0.01, "10m",
        "{{ $labels.model }} answers more than 1 % of requests with a 5xx",
        "Not yet a burning budget, but not noise either.",
        ("See which status in `Answers by status`.", "`danlu top`, `ray logs actor --id ACTOR_ID`."), _SERVING,
    ),
    Alert(
        "RequestsRefused", "serve", "warning",
        total(rate(c.SERVE_REFUSALS, "10m", reason=Matches("429|503")), "model") / total(rate(c.SERVE_REQUESTS, "10m"), "model") > 0.05,
        "10m",
        "{{ $labels.model }} refuses more than 5 % of requests",
        "503: replicas have no room. 429: a tenant is over its limit.",
        ("Are replicas wanted that are not there? See `Replicas`.", "More: `danlu serve SPEC --set autoscaling.max_replicas=8`."), _SERVING,
    ),
    Alert(
        "RequestsWaiting", "serve", "warning",
        quantile(0.95, c.SERVE_QUEUE_SECONDS, "5m", "model") > 0.5, "10m",
        "Texts for {{ $labels.model }} wait over half a second for their batch",
        "The replicas are full; the autoscaler is too slow, or at its bound.",
        ("See `Replicas` and `Texts in a forward`.", "`danlu serve SPEC --set autoscaling.target_ongoing_requests=16`."), _SERVING,
    ),
    Alert(
        "TimeToFirstTokenHigh", "serve", "warning",
        quantile(0.95, c.SERVE_FIRST_TOKEN_SECONDS, "5m", "model") > 2, "10m",
        "One in twenty answers of {{ $labels.model }} takes over 2 s to its first token",
        "Prompts wait for room among the running answers, or are long and read in small bites beside them.",
        ("Waiting? See `Answers running and waiting`: more replicas, `danlu serve SPEC --set autoscaling.max_replicas=8`.",
         "Reading? `danlu serve SPEC --set engine.prefill_chunk_tokens=512`: sooner first tokens, at the cost of the time between tokens.",
         "Prompts that begin alike are read once: see `Prompt tokens found in the cache`."), _SERVING,
    ),
    Alert(
        "KvCacheFull", "serve", "warning",
        (aggregate("max", select(c.SERVE_CACHE_USE), ["model"]) > 0.95) & (total(select(c.SERVE_WAITING), "model") > 0), "10m",
        "The KV cache of {{ $labels.model }} is full, and answers wait for it",
        "A running answer keeps its place in the cache to its end: those that wait begin when one ends. A full cache alone is full use.",
        ("More room: `danlu serve SPEC --set engine.kv_cache_memory_gb=8`, up to `engine.max_num_seqs` answers at once.",
         "Smaller places: `danlu serve SPEC --set engine.max_model_len=2048`.",
         "More replicas: `danlu serve SPEC --set autoscaling.max_replicas=8`; `ray status` shows whether there is room."), _SERVING,
    ),
    Alert(
        "AdapterLoadFailed", "serve", "warning",
        total(increase(c.SERVE_ADAPTER_LOADS, "15m", outcome="failed"), "model") > 0, "0m",
        "An adapter could not be loaded into {{ $labels.model }}",
        "Its folder or bundle is not there, it was trained on another model, or all adapters in memory are in use. Whoever asked was told "
        "which; requests for it get a 404.",
        ("The replica's log names it: `ray list actors --filter class_name=ServeReplica`, then `ray logs actor --id ACTOR_ID`.",
         "All in use: `danlu serve SPEC --set engine.max_loras=16`.",
         "With several replicas each has adapters of its own: put it into the spec's `engine.adapters`."), _SERVING,
    ),
    Alert(
        "ReplicasStuck", "serve", "critical",
        total(select(f.RAY_TARGET_REPLICAS), "application", "deployment") > select(READY_REPLICAS), "10m",
        "{{ $labels.application }} has fewer replicas than it wants for ten minutes",
        "Replicas do not start (no room, an image, a bundle that cannot be read) or do not answer their probes.",
        ("`ray status` shows whether there is room.", "`ray list actors --filter class_name=ServeReplica`, `ray logs actor --id ACTOR_ID`.",
         "On Kubernetes: `kubectl describe rayservice NAME`, `kubectl get pods`."), _SERVING,
    ),
    Alert(
        "ColdStartsSlow", "serve", "warning",
        mean(f.RAY_REPLICA_STARTUP, "30m", "application", "deployment") > 120_000, "0m",
        "Replicas of {{ $labels.application }} take over two minutes to start",
        "A burst waits as long as this for a new replica.",
        ("Is the image or the model downloaded anew on each node? Cache it.", "Keep one warm: `--set autoscaling.min_replicas=1`.",
         "`ray status`"), _SERVING,
    ),
    Alert(
        "KeyExpiring", "serve", "warning",
        aggregate("min", select(c.SERVE_KEY_EXPIRY) > 0, ["model"]) - now() < 7 * 86_400, "0m",
        "A key to {{ $labels.model }} expires within a week",
        "From then on whoever uses it gets 401. It ends when the key is revoked, when its time is over, and when a file without it is read.",
        ("Which? `danlu keys list` shows names and times.", "Give its holder a new one: `danlu keys create NAME --expires 90d`.",
         "Take the old one back once it is not used any more: `danlu keys revoke NAME`."), _SERVING,
    ),
    Alert(
        "KeyStoreDown", "serve", "critical",
        aggregate("max", select(c.SERVE_KEYS_UNREADABLE), ["model"]).equals(1), "5m",
        "Replicas of {{ $labels.model }} cannot read the file of keys",
        "The keys read before go on counting: nobody is shut out, but a key that was revoked still opens, and a replica that starts now fails.",
        ("The replica's log names the file and why: `ray list actors --filter class_name=ServeReplica`, then `ray logs actor --id ACTOR_ID`.",
         "On Kubernetes: `kubectl get secret NAME`, `kubectl describe pod POD` (a secret that is not mounted).",
         "A broken file: `danlu keys list` says what is wrong with it."), _SERVING,
    ),
    Alert(
        "CertificateExpiring", "cluster", "warning",
        aggregate("min", select(f.CERTIFICATE_EXPIRY), ["name"]) - now() < 14 * 86_400, "1h",
        "The certificate {{ $labels.name }} expires within two weeks",
        "cert-manager renews one a month before: that it has not says that renewing fails. Once it is over, clients refuse to connect.",
        ("`kubectl describe certificate NAME`, `kubectl get challenges`.", "The issuer: `kubectl describe issuer NAME`."), _CLUSTER,
    ),
    Alert(
        "TargetDown", "cluster", "critical",
        select(f.UP).equals(0), "5m",
        "{{ $labels.instance }} of {{ $labels.job }} does not answer Prometheus",
        "The node or its process is gone, or the network between. Its other alerts cannot fire while this one does.",
        ("`ray status`, `ray list nodes`.", "On Kubernetes: `kubectl get pods -o wide`, `kubectl describe pod POD`."), _CLUSTER,
    ),
    Alert(
        "RayMetricsMissing", "cluster", "critical",
        call("absent", select(f.RAY_NODE_CPU)), "10m",
        "There are no metrics of any Ray node",
        "Prometheus does not find Ray: no alert about training or serving can fire.",
        ("Are there targets? `curl -s http://127.0.0.1:9090/api/v1/targets`.", "Does Ray run? `ray status`.",
         "On this machine: `danlu monitor` starts a Prometheus that finds it."), _CLUSTER,
    ),
    Alert(
        "NodeDiskFull", "cluster", "warning",
        select(f.RAY_NODE_DISK) > 90, "10m",
        "The disk of {{ $labels.ip }} is over 90 % full",
        "Checkpoints will fail to be saved (the one before stays), and Ray stops taking tasks at 95 %.",
        ("`df -h`, `du -xh --max-depth=2 /tmp/ray`.", "Old runs: keep fewer with `--set checkpoint.save_total_limit=2`."), _CLUSTER,
    ),
    Alert(
        "NodeMemoryFull", "cluster", "warning",
        select(f.RAY_NODE_MEMORY_USED) / select(f.RAY_NODE_MEMORY) > 0.93, "5m",
        "The memory of {{ $labels.ip }} is over 93 % full",
        "Ray ends the newest worker at 95 %.",
        ("`ray status`, `top -b -n 1`.", "`danlu plan SPEC` says what a training worker holds; `--set micro_batch_size=...` lowers it."), _CLUSTER,
    ),
)  # fmt: skip
