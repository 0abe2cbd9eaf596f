"""For every alert: series under which it fires, does not fire, and ends again. In promtool's notation, a value a minute.

`a+bxn` is a, a+b, ... n steps further; `axn` is a, n+1 times. Each case says when exactly which alerts fire, and no others.
"""

from __future__ import annotations

from dataclasses import dataclass

JOB = 'train_job="a"'
ORDERED = {f"ray_danlu_train_running{{{JOB}}}": "1x600"}
RUNS = ORDERED | {f"ray_danlu_train_num_steps{{{JOB}}}": "6000x600"}
ALIVE = {'ray_node_cpu_utilization{ip="10.0.0.1"}': "20x800"}
"""Without it RayMetricsMissing fires everywhere."""
MOVES = {f'ray_danlu_train_step{{{JOB}, WorkerId="1"}}': "0+10x600"}


@dataclass(frozen=True)
class Case:
    """`firing` maps a minute to the names of the alerts that fire then."""

    alert: str
    series: dict[str, str]
    firing: dict[int, set[str]]


def case(alert: str, series: dict[str, str], *, quiet: tuple[int, ...], fires: tuple[int, ...], also: set[str] | None = None) -> Case:
    """`also` fires with it."""
    return Case(alert, series, {**{minute: set() for minute in quiet}, **{minute: {alert, *(also or set())} for minute in fires}})


def training(**gauges: str) -> dict[str, str]:
    """A job that runs and moves, with more of its gauges."""
    return RUNS | MOVES | {f"ray_danlu_train_{name}{{{JOB}}}": values for name, values in gauges.items()}


def requests(good: str, bad: str) -> dict[str, str]:
    """Counters of a model's requests."""
    name = "ray_danlu_serve_requests_total"
    return {f'{name}{{model="m", route="/v1/classify", status="{status}"}}': values for status, values in (("200", good), ("500", bad))}


def tenant(cost: str, budget: str) -> dict[str, str]:
    """What a model costs in USD, all of it one tenant's, and that tenant's budget, which two replicas tell."""
    return {
        'ray_danlu_serve_cost_total{model="m", WorkerId="1"}': cost,
        'ray_danlu_serve_key_tokens_total{model="m", tenant="research", key="ada", kind="prompt"}': "0+10x200",
        **{f'ray_danlu_serve_tenant_budget{{tenant="research", WorkerId="{replica}"}}': budget for replica in (1, 2)},
    }


def seconds(every: str, fast: str) -> dict[str, str]:
    """Counters of all requests and of those within a second."""
    labels = 'model="m", route="/v1/classify"'
    return {
        f"ray_danlu_serve_request_seconds_count{{{labels}}}": every,
        f'ray_danlu_serve_request_seconds_bucket{{{labels}, le="1.0"}}': fast,
    }


CASES = [
    # It moves for 30 minutes, stands for 40, moves again: 10 minutes without a change, for 5.
    case("TrainingStalled", RUNS | {f"ray_danlu_train_step{{{JOB}}}": "0+10x30 300x40 310+10x60"}, quiet=(20, 42, 80), fires=(50, 65)),
    # A finished job does not step and does not alarm.
    Case("TrainingStalled", {f"ray_danlu_train_running{{{JOB}}}": "0x200", f"ray_danlu_train_step{{{JOB}}}": "500x200"}, {60: set(), 190: set()}),
    case("TrainingDiverging", training(loss="0.5x30 3x30 0.5x60", best_loss="0.4x200"), quiet=(25, 80), fires=(50,)),
    case("TrainingFailed",
         {f'ray_danlu_train_failures_total{{{JOB}, reason="diverged"}}': "0x20 1x60",
          f'ray_danlu_train_failures_total{{{JOB}, reason="interrupted"}}': "0x20 1x60"}, quiet=(15, 50), fires=(25,)),
    # Saved at minute 0 and 60, an interval of 5 minutes: 3 x 5 + 10 are over at 25.
    case("CheckpointTooOld", training(checkpoint_timestamp_seconds="0x60 3600x100", checkpoint_interval_seconds="300x200"),
         quiet=(20, 65, 80), fires=(40, 100)),
    case("TrainingStraggler", training(straggling="1.1x20 1.9x30 1.1x60"), quiet=(20, 60), fires=(45,)),
    case("TrainingRestarting",
         {f'ray_danlu_train_restarts_total{{{JOB}, reason="worker_lost"}}': "0x10 1x3 2x3 3x3 4x100",
          f'ray_danlu_train_restarts_total{{{JOB}, reason="started_again"}}': "0 1 2 3 4 5x100"}, quiet=(5, 90), fires=(40,)),
    case("TrainingSlow", training(mfu="0.4x200 0.2x60 0.4x60"), quiet=(150, 290), fires=(235,)),
    case("TrainingGoodputLow", training(goodput="0.9x10 0.3x120 0.9x60"), quiet=(60, 140), fires=(90,)),
    case("WorkersNotScheduled", ORDERED | {f"ray_danlu_train_num_steps{{{JOB}}}": "_x40 500x60"}, quiet=(10, 50), fires=(30,)),
    case("JobQueuedTooLong", {'kueue_pending_workloads{cluster_queue="q", status="active"}': "2x90 0x60"}, quiet=(50, 100), fires=(70,)),
    case("RayJobFailed", {'kuberay_job_deployment_status{name="j", namespace="n", deployment_status="Running"}': "1x20 _x100",
                          'kuberay_job_deployment_status{name="j", namespace="n", deployment_status="Failed"}': "_x20 1x20 _x60"},
         quiet=(10, 60), fires=(30,)),
    case("GpuFaulty", {'DCGM_FI_DEV_XID_ERRORS{Hostname="h", gpu="0"}': "0x10 79x20 0x60"}, quiet=(5, 40), fires=(20,)),
    case("GpuFaulty", {'DCGM_FI_DEV_ROW_REMAP_FAILURE{Hostname="h", gpu="1"}': "0x10 1x20 0x60"}, quiet=(5, 40), fires=(20,)),
    # XID 31 is a program's own page fault.
    Case("GpuFaulty", {'DCGM_FI_DEV_XID_ERRORS{Hostname="h", gpu="0"}': "0x10 31x60"}, {40: set()}),
    case("GpuHot", {'DCGM_FI_DEV_GPU_TEMP{Hostname="h", gpu="0"}': "70x10 91x30 70x60"}, quiet=(15, 50), fires=(30,)),
    # A language model's long answers burn no budget.
    Case("ServingLatencyBudgetFast", {series.replace("/v1/classify", "/v1/chat/completions"): values
                                      for series, values in seconds("0+100x400", "0x400").items()}, {200: set()}),
    # A tenth fails for an hour and a half. The short window ends the alert minutes after the errors end.
    case("ServingErrorBudgetFast", requests("0+100x120 12000+90x90 20100+100x180", "0x120 0+10x90 900x180"), quiet=(110, 270), fires=(200,),
         also={"ServingErrors", "ServingErrorBudgetSlow"}),
    case("ServingErrorBudgetSlow", requests("0+100x360 36000+95x300 64500+100x100", "0x360 0+5x300 1500x100"), quiet=(350, 720), fires=(655,),
         also={"ServingErrors"}),
    case("ServingErrors", requests("0+100x60 6000+98x30 8940+100x60", "0x60 0+2x30 60x60"), quiet=(60, 120), fires=(85,)),
    case("ServingLatencyBudgetFast", seconds("0+100x400", "0+100x120 12000+70x90 18300+100x180"), quiet=(110, 270), fires=(205,), also={"ServingLatencyBudgetSlow"}),
    case("ServingLatencyBudgetSlow", seconds("0+100x900", "0+100x360 36000+90x300 63000+100x100"), quiet=(350, 720), fires=(655,)),
    case("RequestsRefused", requests("0+100x200", "0x200") | {'ray_danlu_serve_refusals_total{model="m", reason="503"}': "0x30 0+20x40 800x60"},
         quiet=(25, 90), fires=(60,)),
    # A client's own mistakes are refused and nobody's alarm.
    Case("RequestsRefused", requests("0+100x200", "0x200") | {'ray_danlu_serve_refusals_total{model="m", reason="invalid_request_error"}': "0+50x200"},
         {100: set()}),
    case("RequestsWaiting", {'ray_danlu_serve_queue_seconds_bucket{model="m", le="0.5"}': "0+10x30 300x40 300+10x60",
                             'ray_danlu_serve_queue_seconds_bucket{model="m", le="1.0"}': "0+10x200",
                             'ray_danlu_serve_queue_seconds_bucket{model="m", le="+Inf"}': "0+10x200"}, quiet=(25, 90), fires=(60,)),
    case("TimeToFirstTokenHigh", {'ray_danlu_serve_time_to_first_token_seconds_bucket{model="m", le="1.0"}': "0+10x30 300x40 300+10x60",
                                  'ray_danlu_serve_time_to_first_token_seconds_bucket{model="m", le="2.5"}': "0+10x200",
                                  'ray_danlu_serve_time_to_first_token_seconds_bucket{model="m", le="+Inf"}': "0+10x200"}, quiet=(25, 90), fires=(60,)),
    case("KvCacheFull", {'ray_danlu_serve_kv_cache_usage{model="m", replica="1"}': "0.5x10 1x30 0.5x60",
                         'ray_danlu_serve_sequences_waiting{model="m", replica="1"}': "0x10 3x30 0x60"}, quiet=(15, 50), fires=(30,)),
    # Full, and nobody waits.
    Case("KvCacheFull", {'ray_danlu_serve_kv_cache_usage{model="m"}': "1x100", 'ray_danlu_serve_sequences_waiting{model="m"}': "0x100"}, {50: set()}),
    case("AdapterLoadFailed", {'ray_danlu_serve_adapter_loads_total{model="m", outcome="failed"}': "0x20 1x60",
                               'ray_danlu_serve_adapter_loads_total{model="m", outcome="loaded"}': "0+1x80"}, quiet=(15, 50), fires=(25,)),
    case("ReplicasStuck", {'ray_serve_autoscaling_target_replicas{application="m", deployment="m"}': "2x200",
                           'ray_serve_deployment_replica_healthy{application="m", deployment="m", replica="1"}': "1x200",
                           'ray_serve_deployment_replica_healthy{application="m", deployment="m", replica="2"}': "1x10 0x40 1x100"},
         quiet=(15, 60), fires=(40,)),
    case("ColdStartsSlow", {'ray_serve_replica_startup_latency_ms_sum{application="m", deployment="m"}': "0x10 200000x100",
                            'ray_serve_replica_startup_latency_ms_count{application="m", deployment="m"}': "0x10 1x100"}, quiet=(8, 60), fires=(20,)),
    case("BudgetNearlySpent", training(budget_used="0.5x20 0.9x20 0.3x60"), quiet=(15, 60), fires=(30,)),
    case("BudgetSpent", training(budget_used="0.5x20 1.1x20 0.3x60"), quiet=(15, 60), fires=(30,), also={"BudgetNearlySpent"}),
    case("TenantBudgetNearlySpent", tenant(cost="0+0.3x30 9x170", budget="10x80 100x120"), quiet=(15, 110), fires=(60,)),
    case("TenantBudgetSpent", tenant(cost="0+0.4x30 12x170", budget="10x80 100x120"), quiet=(15, 110), fires=(60,),
         also={"TenantBudgetNearlySpent"}),
    # It would expire at minute 10,100, a week after minute 20; another is made, and the first one revoked. One replica still has the old file.
    case("KeyExpiring", {'ray_danlu_serve_key_expiry_timestamp_seconds{model="m", replica="1"}': "606000x60 6000000x60",
                         'ray_danlu_serve_key_expiry_timestamp_seconds{model="m", replica="2"}': "606000x40 6000000x80"}, quiet=(15, 70), fires=(25, 50)),
    # No key ever expires.
    Case("KeyExpiring", {'ray_danlu_serve_key_expiry_timestamp_seconds{model="m"}': "0x60"}, {30: set()}),
    case("KeyStoreDown", {'ray_danlu_serve_keys_unreadable{model="m", replica="1"}': "0x60",
                          'ray_danlu_serve_keys_unreadable{model="m", replica="2"}': "0x10 1x20 0x30"}, quiet=(12, 40), fires=(25,)),
    # Two weeks are 20,160 minutes: left at minute 20. Renewed at minute 140.
    case("CertificateExpiring", {'certmanager_certificate_expiration_timestamp_seconds{name="api", namespace="n"}': "1210800x140 7776000x60"},
         quiet=(15, 70, 160), fires=(100,)),
    case("TargetDown", {'up{job="ray", instance="10.0.0.1:1"}': "1x10 0x20 1x60"}, quiet=(12, 40), fires=(25,)),
    Case("RayMetricsMissing", {"ray_node_cpu_utilization": "20x20 _x40 20x60"}, {15: set(), 45: {"RayMetricsMissing"}, 80: set()}),
    case("NodeDiskFull", {'ray_node_disk_utilization_percentage{ip="10.0.0.1"}': "50x10 95x30 50x60"}, quiet=(15, 50), fires=(30,)),
    case("NodeMemoryFull", {'ray_node_mem_used{ip="10.0.0.1"}': "50x10 95x30 50x60", 'ray_node_mem_total{ip="10.0.0.1"}': "100x200"},
         quiet=(12, 50), fires=(30,)),
]  # fmt: skip
