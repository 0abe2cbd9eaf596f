{{/*
The pods of a spec's cluster, as platform/danlu/k8s/pods.py has them: a test holds the two equal. A spec's own fields are never changed
here; what it leaves out is filled in from _spec.tpl, which is generated.
*/}}

{{- /* What a spec says over what it leaves out, as JSON. Sprig's merge and default take a 0 and a false for nothing said. */}}
{{- define "danlu.filled" -}}
{{- $found := dict }}
{{- range . }}{{ range $key, $value := . }}{{ $_ := set $found $key $value }}{{ end }}{{ end }}
{{- toJson $found }}
{{- end }}

{{- define "danlu.labels" -}}
danlu.ai/kind: {{ .kind }}
danlu.ai/name: {{ .name | quote }}
{{- end }}

{{- define "danlu.metadata" -}}
{{- $c := .cluster -}}
name: {{ .objectName | default .name | quote }}
namespace: {{ $c.namespace | default .release.Namespace | quote }}
labels:
  {{- include "danlu.labels" . | nindent 2 }}
  {{- with $c.scheduler }}
  {{- if eq .kind "kueue" }}
  kueue.x-k8s.io/queue-name: {{ .queue | quote }}
  {{- else if eq .kind "volcano" }}
  ray.io/scheduler-name: volcano
  {{- with .queue }}
  volcano.sh/queue-name: {{ . | quote }}
  {{- end }}
  {{- with $c.priority_class }}
  ray.io/priority-class-name: {{ . | quote }}
  {{- end }}
  {{- else if eq .kind "yunikorn" }}
  ray.io/gang-scheduling-enabled: "true"
  yunikorn.apache.org/app-id: {{ $.name | quote }}
  yunikorn.apache.org/queue: {{ .queue | quote }}
  {{- else if eq .kind "kai" }}
  kai.scheduler/queue: {{ .queue | quote }}
  {{- end }}
  {{- end }}
{{- end }}

{{- define "danlu.identity" -}}
{{- with .service_account }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- with .image_pull_secrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with .priority_class }}
priorityClassName: {{ . | quote }}
{{- end }}
securityContext:
  runAsNonRoot: true
  fsGroup: 1000
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "danlu.image" -}}
image: {{ .image | quote }}
{{- with .image_pull_policy }}
imagePullPolicy: {{ . }}
{{- end }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
  readOnlyRootFilesystem: true
{{- end }}

{{- define "danlu.scratchMounts" -}}
{{- $facts := include "danlu.facts" . | fromJson }}
{{- range $facts.writable }}
- {name: {{ .name | quote }}, mountPath: {{ .path }}}
{{- end }}
{{- end }}

{{- define "danlu.scratchVolumes" -}}
{{- $facts := include "danlu.facts" . | fromJson }}
{{- range $facts.writable }}
- {name: {{ .name | quote }}, emptyDir: {}}
{{- end }}
{{- end }}

{{- define "danlu.tolerations" -}}
{{- range .cluster.tolerations }}
- key: {{ .key | quote }}
  {{- if kindIs "string" .value }}
  operator: Equal
  value: {{ .value | quote }}
  {{- else }}
  operator: Exists
  {{- end }}
  {{- with .effect }}
  effect: {{ . }}
  {{- end }}
{{- end }}
{{- if .gpus }}
- {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
{{- end }}
{{- with .spot }}
{{- if .taint }}
- {key: {{ .label | quote }}, operator: Equal, value: {{ .value | quote }}, effect: NoSchedule}
{{- end }}
{{- end }}
{{- end }}

{{- define "danlu.pod" -}}
{{- $facts := include "danlu.facts" . | fromJson }}
{{- $c := .cluster }}
{{- $worker := eq .role "worker" }}
{{- $spot := dict }}
{{- with $c.spot }}{{ $spot = index $facts.spot . }}{{ end }}
metadata:
  labels:
    {{- include "danlu.labels" . | nindent 4 }}
spec:
  {{- include "danlu.identity" $c | nindent 2 }}
  automountServiceAccountToken: {{ and (not $worker) .scales | ternary true false }}
  {{- if $c.tls }}
  initContainers:
    - name: certificate
      {{- include "danlu.image" $c | nindent 6 }}
      command: [sh, -c, {{ $facts.certificate | quote }}]
      env:
        - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
      resources:
        requests: {cpu: 500m, memory: 256Mi}
        limits: {cpu: 500m, memory: 256Mi}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: ca, mountPath: /etc/ray-ca, readOnly: true}
        - {name: tls, mountPath: /etc/ray-tls}
  {{- end }}
  {{- if and $worker .leave }}
  terminationGracePeriodSeconds: {{ add (int .leave) (int $facts.end_s) }}
  {{- end }}
  containers:
    - name: ray-{{ .role }}
      {{- include "danlu.image" $c | nindent 6 }}
      env:
        {{- $plain := include "danlu.filled" (list $facts.ray_env (ternary $facts.tls_env dict (not (empty $c.tls))) .env $c.env) | fromJson }}
        {{- range $key := keys $plain | sortAlpha }}
        - {name: {{ $key | quote }}, value: {{ index $plain $key | quote }}}
        {{- end }}
        {{- range $c.secret_env }}
        - name: {{ .name | quote }}
          valueFrom: {secretKeyRef: {name: {{ .secret | quote }}, key: {{ .key | quote }}}}
        {{- end }}
      ports:
        {{- range $facts.head_ports }}
        {{- if or (not $worker) (has .name (list "serve" "metrics")) }}
        - {name: {{ .name | quote }}, containerPort: {{ .port }}}
        {{- end }}
        {{- end }}
      {{- if and $worker .leave }}
      lifecycle:
        preStop: {exec: {command: [python, -m, danlu.serve.leave, {{ .leave | toString | quote }}]}}
      {{- end }}
      resources:
        {{- range list "requests" "limits" }}
        {{ . }}:
          cpu: {{ $.cpus | toString | quote }}
          memory: {{ $.memory }}
          {{- if $.gpus }}
          nvidia.com/gpu: {{ $.gpus | toString | quote }}
          {{- end }}
        {{- end }}
      volumeMounts:
        {{- include "danlu.scratchMounts" . | nindent 8 }}
        {{- if .configMap }}
        - {name: spec, mountPath: /etc/danlu, readOnly: true}
        {{- end }}
        {{- if $c.tls }}
        - {name: tls, mountPath: /etc/ray-tls, readOnly: true}
        {{- end }}
        {{- if $c.shared_memory }}
        - {name: shared-mem, mountPath: /dev/shm}
        {{- end }}
        {{- range $i, $volume := $c.volumes }}
        - name: volume-{{ $i }}
          mountPath: {{ .mount_path | quote }}
          {{- if .read_only }}
          readOnly: true
          {{- end }}
        {{- end }}
        {{- range $i, $volume := $c.secret_volumes }}
        - {name: secret-{{ $i }}, mountPath: {{ .mount_path | quote }}, readOnly: true}
        {{- end }}
  {{- $nodes := merge (dict) (ternary (default dict $c.node_selector) (default dict (dig "head" "node_selector" dict $c)) $worker) }}
  {{- if and $worker $c.gpu_type }}{{ $_ := set $nodes "nvidia.com/gpu.product" $c.gpu_type }}{{ end }}
  {{- if and $worker $spot }}{{ $_ := set $nodes $spot.label $spot.value }}{{ end }}
  {{- with $nodes }}
  nodeSelector:
    {{- range $key, $value := . }}
    {{ $key | quote }}: {{ $value | quote }}
    {{- end }}
  {{- end }}
  {{- with include "danlu.tolerations" (dict "cluster" $c "gpus" .gpus "spot" (ternary $spot dict $worker)) }}
  tolerations:
    {{- . | nindent 4 }}
  {{- end }}
  {{- if and $worker $c.same_topology }}
  affinity:
    podAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - labelSelector: {matchLabels: {danlu.ai/kind: {{ .kind }}, danlu.ai/name: {{ .name | quote }}, ray.io/node-type: worker}}
          topologyKey: {{ $c.same_topology | quote }}
  {{- else if and (not $worker) $spot }}
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
          - matchExpressions:
              - {key: {{ $spot.label | quote }}, operator: NotIn, values: [{{ $spot.value | quote }}]}
  {{- end }}
  {{- if and $worker $c.spread_over }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ $c.spread_over | quote }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector: {matchLabels: {danlu.ai/kind: {{ .kind }}, danlu.ai/name: {{ .name | quote }}, ray.io/node-type: worker}}
  {{- end }}
  volumes:
    {{- include "danlu.scratchVolumes" . | nindent 4 }}
    {{- with .configMap }}
    - {name: spec, configMap: {name: {{ . | quote }}}}
    {{- end }}
    {{- with $c.tls }}
    - {name: ca, secret: {secretName: {{ .ca_secret | quote }}}}
    - {name: tls, emptyDir: {medium: Memory}}
    {{- end }}
    {{- with $c.shared_memory }}
    - {name: shared-mem, emptyDir: {medium: Memory, sizeLimit: {{ . }}}}
    {{- end }}
    {{- range $i, $volume := $c.volumes }}
    - {name: volume-{{ $i }}, persistentVolumeClaim: {claimName: {{ .claim | quote }}}}
    {{- end }}
    {{- range $i, $volume := $c.secret_volumes }}
    - {name: secret-{{ $i }}, secret: {secretName: {{ .secret | quote }}}}
    {{- end }}
{{- end }}

{{- define "danlu.rayCluster" -}}
{{- $facts := include "danlu.facts" . | fromJson }}
{{- $head := include "danlu.filled" (list $facts.head .cluster.head) | fromJson }}
{{- $scales := lt (int .low) (int .high) }}
rayVersion: {{ $facts.ray_version }}
authOptions: {mode: token}
{{- if $scales }}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  securityContext:
    allowPrivilegeEscalation: false
    capabilities: {drop: [ALL]}
  {{- if .cluster.tls }}
  env:
    {{- range $key := keys $facts.tls_env | sortAlpha }}
    - {name: {{ $key | quote }}, value: {{ index $facts.tls_env $key | quote }}}
    {{- end }}
  volumeMounts:
    - {name: tls, mountPath: /etc/ray-tls, readOnly: true}
  {{- end }}
{{- end }}
headGroupSpec:
  rayStartParams: {dashboard-host: 0.0.0.0, num-cpus: "0"}
  template:
    {{- include "danlu.pod" (merge (dict "role" "head" "cpus" (int $head.cpus) "memory" $head.memory "gpus" 0 "scales" $scales) (omit . "gpus")) | nindent 4 }}
workerGroupSpecs:
  - groupName: workers
    replicas: {{ .low }}
    minReplicas: {{ .low }}
    maxReplicas: {{ .high }}
    rayStartParams: {}
    template:
      {{- include "danlu.pod" (merge (dict "role" "worker" "memory" (.cluster.memory | default $facts.memory) "scales" $scales) .) | nindent 6 }}
{{- end }}
