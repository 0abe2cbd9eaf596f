"""What an inference service is: the bundle, the engine, scaling and limits."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import DnsLabel, ModelName, NonNegativeInt, Number, PositiveFloat, PositiveInt, Spec
from danlu.spec.cluster import Kueue, ServiceCluster
from danlu.spec.vllm import Vllm


class Encoder(Spec):
    """Task heads on an encoder, and masked language models: padding-free dynamic batching, on CPU or one GPU."""

    kind: Literal["encoder"] = "encoder"

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Computation of a bundle that is not quantized; `auto` is the one it was evaluated in."""

    max_batch_tokens: PositiveInt = 1024
    """Tokens of one forward at most. What a CPU's caches hold is best there; a GPU wants some 16,384."""

    batch_wait_ms: Annotated[float, Field(ge=0)] = 0.0
    """How long an idle engine waits for company before it runs a batch. Requests that come while a forward runs are batched anyway."""

    num_threads: PositiveInt = 1
    """Compute threads of one replica on CPU; also the cores it asks Ray for."""

    num_gpus: Annotated[Literal[0, 1], Number] = 0

    step_timeout_s: PositiveFloat = 120.0
    """A forward that takes longer is stuck: all requests fail and the replica is replaced."""


class EncoderDecoder(Spec):
    """Texts that are written for texts (task.kind=seq2seq), as many as there are at a time, by the task's own beams, on CPU or one GPU."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Computation; `auto` is what the bundle was evaluated in."""

    max_num_seqs: PositiveInt = 32
    """Texts that are written at once; each takes the task's num_beams. One that comes meanwhile waits until they are all written."""

    batch_wait_ms: Annotated[float, Field(ge=0)] = 0.0
    """How long an idle engine waits for company before it begins. Requests that come while it writes are written together anyway."""

    num_threads: PositiveInt = 1
    """Compute threads of one replica on CPU; also the cores it asks Ray for."""

    num_gpus: Annotated[Literal[0, 1], Number] = 0

    step_timeout_s: PositiveFloat = 120.0
    """An encoder's pass or a written token that takes longer is stuck: all requests fail and the replica is replaced."""


class Torch(Spec):
    """Danlu's own language-model engine: continuous batching over any Hugging Face causal language model, on CPU or one GPU. Names are
    vLLM's where vLLM has the field."""

    kind: Literal["torch"] = "torch"

    model_name_or_path: Annotated[str, Field(min_length=1)] | None = None
    """A model as it is, in place of a bundle: a folder, a hub id, a storage URI or `pkg://package/folder`."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of weights, computation and cache. `auto` is what a bundle was evaluated in, or bf16 where the hardware multiplies it."""

    quantization: Literal["int8", "int4"] | None = None
    """Round the weights of `model_name_or_path` when it is loaded, to 8 bits with a scale for each output or to 4 with one for 32 inputs. A
    bundle brings its own (`compress:` of a job), with what it costs."""

    max_model_len: PositiveInt | None = None
    """Longest prompt and answer together, in tokens. Unset: the model's positions, 4096 at most. Each running sequence has a slot of this
    length in the cache."""

    max_num_seqs: PositiveInt = 64
    """Sequences that run at once, where the cache has room for as many."""

    max_num_batched_tokens: PositiveInt = 1024
    """Tokens of one step at most."""

    prefill_chunk_tokens: PositiveInt = 128
    """Tokens of prompts that a step reads while other sequences wait for their next token: more is a sooner first token for the new ones
    and a longer wait for the others."""

    kv_cache_memory_gb: Annotated[float, Field(gt=0, le=100_000)] = 4.0
    """Keys and values of all slots, in GiB."""

    enable_prefix_caching: bool = True
    """Keep what a finished sequence has left until its slot is needed, so that a prompt that begins alike is not read again."""

    adapters: dict[ModelName, str] = {}
    """LoRA adapters that are there from the start: the name they answer to -> a PEFT folder, or a bundle: `name@alias`, a folder, a URI."""

    max_loras: PositiveInt = 8
    """Adapters in memory at once; one more takes the place of the longest unused."""

    allow_runtime_lora_updating: bool = False
    """Serve `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`."""

    num_threads: PositiveInt = 1
    """Compute threads of one replica on CPU; also the cores it asks Ray for."""

    num_gpus: Annotated[Literal[0, 1], Number] = 0

    num_speculative_tokens: NonNegativeInt = 4
    """Tokens that are guessed ahead where a text repeats itself (prompt lookup), and only while few sequences run and the guesses are
    right. What is answered does not change; 0 guesses nothing."""

    draft_model: Annotated[str, Field(min_length=1)] | None = None
    """A smaller model of the same vocabulary that makes these guesses instead: a folder, a hub id, a storage URI or
    `pkg://package/folder`. Its keys and values take their part of `kv_cache_memory_gb`."""

    kernels: Literal["auto", "off"] = "auto"
    """On CPU, small kernels for the Llama family. The images bring them; elsewhere they are compiled once for the machine (g++, some
    seconds) and kept in TORCH_EXTENSIONS_DIR or the user's cache. Without a compiler, or with `off`, PyTorch's operations give the same
    answers, more slowly."""

    step_timeout_s: PositiveFloat = 120.0
    """A step that takes longer is stuck: all requests fail and the replica is replaced."""

    @model_validator(mode="after")
    def _a_step_holds_every_sequence(self) -> Self:
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} leaves no room for prompts beside max_num_seqs={self.max_num_seqs} "
                f"running sequences; at least {self.max_num_seqs + 1}"
            )
        if len(self.adapters) > self.max_loras:
            raise ValueError(f"{len(self.adapters)} adapters are more than max_loras={self.max_loras}; max_loras: {len(self.adapters)}")
        if self.kernels == "off" and self.num_gpus:
            raise ValueError("kernels=off has no effect on a GPU, where there are none; leave it out")
        if self.revision is not None and self.model_name_or_path is None:
            raise ValueError("revision has no effect without model_name_or_path; leave it out")
        if self.draft_model is not None and not self.num_speculative_tokens:
            raise ValueError("draft_model has no effect with num_speculative_tokens=0, which guesses nothing; leave one of them out")
        return self


class Echo(Spec):
    """A fake that answers without a model, at a settable speed: for load tests of everything around the engine."""

    kind: Literal["echo"] = "echo"
    labels: Annotated[list[str], Field(min_length=1)] = ["echo"]
    latency_ms: Annotated[float, Field(ge=0)] = 0.0


class EchoText(Spec):
    """A fake language model that repeats what it is told, at a settable speed: for load tests of everything around the engine."""

    kind: Literal["echo_text"] = "echo_text"
    time_to_first_token_ms: Annotated[float, Field(ge=0)] = 0.0
    time_per_output_token_ms: Annotated[float, Field(ge=0)] = 0.0
    max_model_len: PositiveInt = 4096
    """Prompt and answer together, in tokens. A token is a byte of UTF-8."""
    adapters: dict[ModelName, str] = {}
    """LoRA adapters that are there from the start: the name they answer to -> a folder."""
    allow_runtime_lora_updating: bool = False
    """Serve `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`."""


def check_names(name: str, engine: object) -> None:
    """ValueError if an adapter has the name that the service's own model answers to."""
    if isinstance(engine, Torch | Vllm | EchoText) and name in engine.adapters:
        raise ValueError(f"engine.adapters has one named {name!r}, as the service's own model is; another name")


Engine = Annotated[Encoder | EncoderDecoder | Torch | Vllm | Echo | EchoText, Field(discriminator="kind")]


class Autoscaling(Spec):
    """Ray Serve's autoscaling; names are Ray's."""

    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 8.0
    upscale_delay_s: PositiveFloat = 10.0
    downscale_delay_s: PositiveFloat = 300.0

    @model_validator(mode="after")
    def _min_is_at_most_max(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        return self


class Limits(Spec):
    """What one request may ask for, and how many may wait. Above: 4xx, or 503 with Retry-After."""

    max_ongoing_requests: PositiveInt = 64
    """Requests a replica works on at once."""
    max_queued_requests: PositiveInt = 256
    """Requests that wait for a replica before new ones are told to come back later."""
    max_inputs: PositiveInt = 256
    """Texts in one request; of a language model the answers, which are `n` for each prompt."""
    max_body_bytes: PositiveInt = 1_000_000
    request_timeout_s: PositiveFloat = 30.0
    """How long a client may wait: for the answer; of a language model for the first token, and from one token to the next."""
    drain_timeout_s: PositiveFloat = 20.0
    """How long a replica that is told to stop may finish what it has begun."""


class Http(Spec):
    """Where the service listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free port."""
    haproxy: bool = False
    """Ray Serve's HAProxy ingress instead of its Python proxy: several times the requests per second, one such service per machine."""
    allowed_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]] = []
    """Whose pages may ask from a browser (CORS): `https://chat.example`, or `*` for all. Nobody's unless said."""


class Auth(Spec):
    """Who may ask: holders of a key."""

    keys_file: Annotated[str, Field(min_length=1)]
    """What `danlu keys` writes: hashes, never keys. A Kubernetes secret that is mounted as a file will do. Read again when it changes."""


class Service(Spec):
    """An endpoint: one bundle behind Ray Serve."""

    kind: Literal["service"] = "service"
    name: DnsLabel
    """Also the RayService's name."""
    bundle: str | None = None
    """A bundle: `name@alias`, `name@v3`, a folder or a URI. Not needed by the echo engines, nor with `engine.model_name_or_path`."""
    storage: str = "runs"
    """The storage URI that `bundle` is looked up in."""
    engine: Engine = Encoder()
    autoscaling: Autoscaling = Autoscaling()
    limits: Limits = Limits()
    http: Http = Http()
    auth: Auth | None = None
    """None lets everybody in."""

    cluster: ServiceCluster | None = None
    """Where it runs with `--on k8s`."""

    @property
    def is_language_model(self) -> bool:
        """Whether it answers chats, and not texts with labels."""
        return isinstance(self.engine, Torch | Vllm | EchoText)

    @property
    def allows_lora_updates(self) -> bool:
        """Whether clients may load and unload adapters."""
        return isinstance(self.engine, Torch | Vllm | EchoText) and self.engine.allow_runtime_lora_updating

    @model_validator(mode="after")
    def _gpu_type_has_gpus(self) -> Self:
        if self.cluster is not None and self.cluster.gpu_type is not None and not getattr(self.engine, "num_gpus", 0):
            raise ValueError(f"cluster.gpu_type={self.cluster.gpu_type} has no effect with engine.num_gpus=0; leave it out")
        return self

    @model_validator(mode="after")
    def _a_queue_gives_a_fixed_number_of_pods(self) -> Self:
        if self.cluster is not None and isinstance(self.cluster.scheduler, Kueue):
            if self.cluster.upgrade.kind == "incremental":
                raise ValueError("cluster.upgrade.kind=incremental needs Ray's autoscaler, which cluster.scheduler.kind=kueue turns off")
            each, scaling = self.cluster.replicas_per_pod, self.autoscaling
            low, high = -(-scaling.min_replicas // each), -(-scaling.max_replicas // each)
            if low != high:
                raise ValueError(
                    f"with cluster.scheduler.kind=kueue a service has a fixed number of pods, and autoscaling asks for {low} to {high}; "
                    "min_replicas and max_replicas alike"
                )
        return self

    @model_validator(mode="after")
    def _an_incremental_upgrade_scales(self) -> Self:
        if self.cluster is None or self.cluster.upgrade.kind != "incremental":
            return self
        scaling, each = self.autoscaling, self.cluster.replicas_per_pod
        if scaling.min_replicas == scaling.max_replicas:
            raise ValueError(
                f"cluster.upgrade.kind=incremental moves replicas by Ray's autoscaler, which autoscaling.min_replicas = max_replicas = "
                f"{scaling.max_replicas} turns off; raise max_replicas"
            )
        if -(-scaling.min_replicas // each) == (pods := -(-scaling.max_replicas // each)):
            raise ValueError(
                f"cluster.upgrade.kind=incremental needs Ray's autoscaler, and {pods} x replicas_per_pod={each} has room for all "
                f"replicas at all times; raise max_replicas to {each * pods + 1}"
            )
        return self

    @model_validator(mode="after")
    def _engine_has_a_model(self) -> Self:
        if isinstance(self.engine, Encoder | EncoderDecoder) and self.bundle is None:
            raise ValueError(f"bundle is needed by engine.kind={self.engine.kind}: name@alias, name@v1, a folder or a URI")
        if isinstance(self.engine, Torch | Vllm) and (self.bundle is None) == (self.engine.model_name_or_path is None):
            raise ValueError(f"engine.kind={self.engine.kind} needs a model, and one only: bundle or engine.model_name_or_path")
        if isinstance(self.engine, Torch | Vllm) and self.bundle is not None and self.engine.quantization is not None:
            raise ValueError(
                f"engine.quantization={self.engine.quantization} would serve other weights than the bundle's, which were evaluated; leave "
                "it out, or name the bundle's model folder in engine.model_name_or_path"
            )
        check_names(self.name, self.engine)
        if isinstance(self.engine, Echo | EchoText) and self.bundle is not None:
            raise ValueError(f"bundle has no effect with engine.kind={self.engine.kind}; leave it out")
        return self


class ServeAfterTraining(Spec):
    """The `serve:` of a training job: a Service whose name, bundle and storage are the job's."""

    engine: Annotated[Encoder | EncoderDecoder | Torch | Vllm, Field(discriminator="kind")] | None = None
    """Unset: what the task takes, which is `encoder` for an encoder's; `encoder_decoder` for seq2seq and `torch` for a decoder's, these on
    a GPU if the workers have one. A decoder's may be `vllm` too."""
    autoscaling: Autoscaling = Autoscaling()
    limits: Limits = Limits()
    http: Http = Http()
    cluster: ServiceCluster | None = None
