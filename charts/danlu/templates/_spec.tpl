{{/* What specs leave out and what pods have, by `python -m danlu.generate`. */}}
{{- define "danlu.facts" -}}
{
 "ray_version": "2.60.0",
 "ray_env": {
  "RAY_worker_niceness": "0",
  "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
  "RAY_TRAIN_V2_ENABLED": "1",
  "RAY_USAGE_STATS_ENABLED": "0"
 },
 "head_ports": [
  {
   "name": "gcs-server",
   "port": 6379
  },
  {
   "name": "dashboard",
   "port": 8265
  },
  {
   "name": "client",
   "port": 10001
  },
  {
   "name": "serve",
   "port": 8000
  },
  {
   "name": "metrics",
   "port": 8080
  },
  {
   "name": "as-metrics",
   "port": 44217
  },
  {
   "name": "dash-metrics",
   "port": 44227
  }
 ],
 "writable": [
  {
   "name": "tmp",
   "path": "/tmp"
  },
  {
   "name": "home",
   "path": "/home/danlu"
  }
 ],
 "spot": {
  "gke": {
   "label": "cloud.google.com/gke-spot",
   "value": "true",
   "taint": true
  },
  "eks": {
   "label": "eks.amazonaws.com/capacityType",
   "value": "SPOT",
   "taint": false
  },
  "karpenter": {
   "label": "karpenter.sh/capacity-type",
   "value": "spot",
   "taint": false
  },
  "aks": {
   "label": "kubernetes.azure.com/scalesetpriority",
   "value": "spot",
   "taint": true
  }
 },
 "head": {
  "cpus": 2,
  "memory": "8Gi",
  "node_selector": {}
 },
 "memory": "16Gi",
 "workers": {
  "num_workers": 1,
  "cpus_per_worker": 1,
  "gpus_per_worker": 0
 },
 "autoscaling": {
  "min_replicas": 1,
  "max_replicas": 1,
  "target_ongoing_requests": 8.0,
  "upscale_delay_s": 10.0,
  "downscale_delay_s": 300.0
 },
 "engine": {
  "kind": "encoder",
  "dtype": "auto",
  "max_batch_tokens": 1024,
  "batch_wait_ms": 0.0,
  "num_threads": 1,
  "num_gpus": 0,
  "step_timeout_s": 120.0
 },
 "tls_env": {
  "RAY_USE_TLS": "1",
  "RAY_TLS_SERVER_CERT": "/etc/ray-tls/tls.crt",
  "RAY_TLS_SERVER_KEY": "/etc/ray-tls/tls.key",
  "RAY_TLS_CA_CERT": "/etc/ray-tls/ca.crt"
 },
 "certificate": "set -eu\numask 077\nopenssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=ray -keyout /etc/ray-tls/tls.key -out /tmp/tls.csr\necho \"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:$POD_IP,DNS:*.$POD_NAMESPACE.svc.cluster.local\" > /tmp/tls.ext\nopenssl x509 -req -in /tmp/tls.csr -extfile /tmp/tls.ext -days 3650 -set_serial \"0x$(openssl rand -hex 16)\" \\\n  -CA /etc/ray-ca/tls.crt -CAkey /etc/ray-ca/tls.key -out /etc/ray-tls/tls.crt\ncp /etc/ray-ca/tls.crt /etc/ray-tls/ca.crt\n",
 "drain_timeout_s": 20.0,
 "leave_s": 120,
 "end_s": 30,
 "request_timeout_s": 30.0,
 "cleanup": {
  "ttl": {
   "kind": "ttl",
   "ttl_seconds_after_finished": 300
  },
  "rules": {
   "kind": "rules",
   "after_success_s": 0,
   "workers_after_failure_s": 0,
   "head_after_failure_s": 86400
  }
 },
 "incremental": {
  "step_size_percent": 25,
  "interval_s": 30,
  "max_surge_percent": 100
 }
}
{{- end }}
