"""The parts that the jobs' configurations are built from. A field's docstring is its help.

Names are those of the library that a value ends up in (transformers, PEFT, vLLM, Ray). What belongs to
one library as a whole passes through to it and is checked by it: `lora` is peft's LoraConfig,
`serve.engine` vLLM's engine arguments, `serve.autoscaling` Serve's, `predict.sampling` vLLM's
SamplingParams.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from paddock.errors import ConfigError


@dataclass(frozen=True)
class Paths:
    """What relative paths of one configuration are resolved against."""

    root: str | None
    """A directory or URI; None where relative paths must be refused."""
    output_dir: str | None


def _resolve(value: str, info: ValidationInfo) -> str:
    paths: Paths = info.context if isinstance(info.context, Paths) else Paths(os.getcwd(), None)
    value = os.path.expanduser(value.replace("${output_dir}", str(paths.output_dir)))
    if "://" in value or os.path.isabs(value):
        return value
    if paths.root is None:
        raise ConfigError(
            f"{info.field_name}: {value!r} is relative, and a submitted job runs in a copy of the working"
            " directory that vanishes with it; give storage_path=DIR_OR_URI or an absolute path"
        )
    if "://" in paths.root:
        return f"{paths.root.rstrip('/')}/{value}"
    return os.path.abspath(os.path.join(paths.root, value))


def _resolve_model(value: str, info: ValidationInfo) -> str:
    paths: Paths = info.context if isinstance(info.context, Paths) else Paths(os.getcwd(), None)
    here = paths.root or ""
    if _HUB_NAME.fullmatch(value) and "://" not in here and not Path(here, value).exists():
        return f"hf://{value}"
    return _resolve(value, info)


def _split(value: Any) -> Any:
    """`a,b` on the command line is a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Split = BeforeValidator(_split)


class _NotHashed:
    """Marks a field that says where or how a job runs, not what it makes."""


T = TypeVar("T")
How = Annotated[T, _NotHashed()]
Location = Annotated[str, AfterValidator(_resolve), _NotHashed()]
"""A path or URI. It is not part of the configuration's hash: inputs count by their content."""


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
ModelLocation = Annotated[str, AfterValidator(_resolve_model), _NotHashed()]
"""A path, a URI, or a model on the Hugging Face hub: `hf://ORG/NAME@REVISION`, or ORG/NAME where no such path is."""


def is_hashed(field: FieldInfo) -> bool:
    """Whether a field can change the result of a run."""
    return not any(isinstance(mark, _NotHashed) for mark in (*field.metadata, *_marks(field.annotation)))


def _marks(annotation: Any) -> list[Any]:
    """What `Annotated` says anywhere inside an annotation, such as `tuple[Location, ...] | None`."""
    marks = list(getattr(annotation, "__metadata__", ()))
    for inner in get_args(annotation):
        marks += _marks(inner)
    return marks


class Settings(BaseModel):
    """A part of the configuration: immutable, unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        validate_default=True,
    )


class DataConfig(Settings):
    """Files of rows."""

    train: Location | None = None
    """Rows to learn from, each with its target: a file, a glob, or a directory with train.json and perhaps dev.json."""
    dev: Location | None = None
    """Rows to evaluate the loss on while training: a file, a glob, or a directory with dev.json."""
    validation_split_percentage: How[float] = Field(default=0, ge=0, lt=100)
    """The share of the training rows that is set apart as dev rows where there are none."""
    test: Location | None = None
    """Rows to predict; their targets are never read."""
    format: Literal["promptcblue", "alpaca", "messages"] = "promptcblue"
    """How a row is written: the benchmark's six fields, instruction/input/output, or chat messages."""


def _resolve_template(value: str, info: ValidationInfo) -> str:
    """A template's name as it is, a file as any other path."""
    return _resolve(value, info) if os.sep in value or "." in value else value


class PromptConfig(Settings):
    """How a row becomes a prompt."""

    template: How[Annotated[str, AfterValidator(_resolve_template)]] = "promptcblue"
    """A template's name (promptcblue, alpaca), or a file with `{input}` and perhaps `{instruction}`."""


class ModelConfig(Settings):
    """The model that is trained on or served."""

    path: Location
    """A Hugging Face directory."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """The type its weights are loaded in; null keeps the files' own."""


class LoraPart(Settings):
    """peft's LoraConfig; keys that are not listed here pass through to it."""

    model_config = ConfigDict(extra="allow")

    r: int = Field(default=8, ge=1)
    """The rank of the update matrices."""
    lora_alpha: int = 32
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the update matrices."""
    target_modules: Annotated[tuple[str, ...], Split] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
        "up_proj",
    )
    """Linear layers that get an adapter."""
    modules_to_save: Annotated[tuple[str, ...], Split] = ()
    """Layers that are trained whole, in float32, and saved with the adapter."""
    init_from: Location | None = None
    """An adapter directory on the same base to go on from, instead of a fresh adapter."""


class TrainPart(Settings):
    """The recipe, spelt as in transformers' TrainingArguments."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """The peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    """The shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """The share of all steps in which the learning rate rises from 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """The same as a number of steps; where it is given, warmup_ratio does not count."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the gradient's mean."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay of the squared gradient's mean."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's guard against a division by zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient's norm is clipped to this."""
    max_seq_length: int = Field(default=512, ge=8)
    """Tokens in a packed block; a row never spans two."""
    max_train_samples: int | None = Field(default=None, ge=1)
    """Train on so many rows, the first ones; null takes all."""
    max_eval_samples: How[int | None] = Field(default=None, ge=1)
    """Evaluate on so many dev rows, the first ones; null takes all."""
    per_device_train_batch_size: int = Field(default=2, ge=1)
    """Packed blocks in one forward pass of one worker."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes of one worker before the optimizer steps."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps of the whole run; where it is positive, num_train_epochs does not count."""
    num_train_epochs: float = Field(default=3.0, gt=0)
    """How often the run goes through the rows."""
    save_steps: How[int] = Field(default=100, ge=1)
    """Steps from one checkpoint to the next; the last step always makes one."""
    save_total_limit: How[int | None] = Field(default=25, ge=1)
    """The number of checkpoints that are kept, newest first; null keeps all."""
    keep_best: How[bool | Literal["dev_loss", "score"]] = False
    """Keep the best checkpoint beyond save_total_limit: true or dev_loss, by dev loss, which every checkpoint then has;
    score, by what its answers are worth (predict_with_generate)."""
    predict_with_generate: How[bool] = False
    """Let each checkpoint answer the dev rows, and score it, while training goes on; see `validation`."""
    eval_steps: How[int] = Field(default=100, ge=1)
    """Steps from one dev loss to the next."""
    logging_steps: How[int] = Field(default=10, ge=1)
    """Steps from one line of metrics to the next."""
    report_to: How[Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], Split]] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl; mlflow and wandb have to be installed."""
    disable_tqdm: How[bool | None] = None
    """Lines instead of a progress bar; null draws the bar on a terminal."""
    attn_implementation: How[Literal["sdpa", "varlen"] | None] = None
    """How rows in a block are kept apart: by a mask, or not computed at all; null takes varlen on a GPU with 16-bit
    weights."""
    torch_compile: How[bool | None] = None
    """Compile each layer; null does on a GPU."""
    gradient_checkpointing: How[bool | Literal["selective"]] = False
    """Compute activations again instead of keeping them: slower, for less memory; `selective` keeps the costly ones."""
    fp8: bool = False
    """Round the base's layers that have an adapter to 8 bits (e4m3), for products at twice the rate; from H100 on, and
    for plain LoRA only."""
    load_in_4bit: bool = False
    """QLoRA: hold the base's decoder layers in 4 bits; on GPUs, with bitsandbytes. The adapter is one of the base as it
    is in its files."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The values that 4 bits stand for: those of a normal distribution, or a floating point number's."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of 4-bit blocks too."""
    fsdp: How[bool] = False
    """Shard the base over the workers (FSDP2), for one that does not fit a card; a whole GPU a worker."""
    seed: int = 42
    """Seeds the order of the blocks, the adapter's initial weights and dropout."""

    @property
    def best_by(self) -> str | None:
        """What the best checkpoint is the best by."""
        return "dev_loss" if self.keep_best is True else self.keep_best or None

    @field_validator("max_steps")
    @classmethod
    def _trains(cls, value: int) -> int:
        if value == 0:
            raise ValueError("should be at least 1, or -1 to count num_train_epochs")
        return value


class ScalingPart(Settings):
    """Ray Train's ScalingConfig."""

    num_workers: How[int | tuple[int, int]] = 1
    """Training processes, or [min, max] for as many as there is room for. A new run's step takes num_workers (max) x
    per_device_train_batch_size x gradient_accumulation_steps blocks; a run that goes on with other workers keeps its
    steps, which are dealt out to however many there are."""
    use_gpu: How[bool | None] = None
    """One GPU a worker; null takes one where the cluster has any."""
    resources_per_worker: How[dict[str, float]] = Field(default_factory=dict)
    """What Ray reserves for a worker, such as `{CPU: 0.5}` or `{GPU: 0.5}`; empty leaves it to Ray."""
    max_failures: How[int] = Field(default=10, ge=-1)
    """How often Ray Train restarts failed workers from the last checkpoint; -1 is no limit."""

    @field_validator("num_workers")
    @classmethod
    def _ordered(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError("should be a number of at least 1, or [min, max] with 1 <= min <= max")
        return value

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class ShardPart(Settings):
    """How the shards of a model are written; it does not change what is in them."""

    num_workers: How[int | None] = Field(default=None, ge=1)
    """Shards that are written at a time, one Ray task each; 1 stays in this process. null follows memory_gib, with
    tasks on a cluster, without one with a thread a core."""
    memory_gib: How[float] = Field(default=3.0, gt=0)
    """Memory that this process and its tasks may take together."""


class AccessPart(Settings):
    """Who may call the service over HTTP, and how much (`deployments/access.py`)."""

    keys: How[Location | None] = None
    """A YAML file of API keys, read again when it changes; with none, here or in PADDOCK_API_KEYS, all may call."""
    allowed_origins: How[Annotated[tuple[str, ...], Split]] = ()
    """Web sites whose pages may call, such as `https://clinic.example`; `*` is any."""
    admin_routes: How[Annotated[tuple[str, ...], Split]] = ()
    """Administrative routes of vLLM that are open, such as `/load`; where there are keys, to those with `admin`."""
    max_body_bytes: How[int] = Field(default=4 * 2**20, ge=1)
    """The largest body of a request; a larger one is answered 413."""
    request_timeout_s: How[float] = Field(default=600, gt=0)
    """How long an answer may take, streamed to its end."""
    retry_after_s: How[int] = Field(default=1, ge=0)
    """What `Retry-After` says where all replicas and their queues are full."""
    request_log: How[Location | None] = None
    """A file that gets one JSON line a request, without its text; null writes them to Serve's own log."""


class ServePart(Settings):
    """The deployment around vLLM."""

    served_model_name: str | None = None
    """The name that requests give as `model`; null takes the model directory's own."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's engine arguments (max_model_len, tensor_parallel_size, gpu_memory_utilization, ...)."""
    optimize_for: Literal["latency", "throughput"] = "latency"
    """vLLM's sizes of a batch where `engine` does not say: those of `vllm serve`, or the larger ones of `vllm.LLM`,
    which a service takes that jobs.predict starts for itself."""
    autoscaling: dict[str, Any] = Field(
        default_factory=lambda: {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 64}
    )
    """Serve's AutoscalingConfig."""
    max_ongoing_requests: int = Field(default=128, ge=1)
    """Requests that one replica works on at a time."""
    max_queued_requests: int = Field(default=1024, ge=-1)
    """Requests that wait for a replica, per caller, before one is refused; -1 is no limit."""
    ray_actor_options: dict[str, Any] = Field(default_factory=dict)
    """What Ray reserves for a replica, such as `{num_cpus: 1}`; GPUs follow tensor_parallel_size."""
    sampling: SamplingPart = Field(default_factory=lambda: SamplingPart(preset="reference"))
    """What `/generate` uses where a request does not say."""
    adapters: Location | None = None
    """A directory of LoRA adapter directories; requests name one as `model`. `engine.max_loras` serve at a time."""
    access: AccessPart = AccessPart()
    ingress: How[Literal["auto", "serve"]] = "auto"
    """What stands before the replicas: Serve's HAProxy, closed to the outside, where it runs, or Serve's own proxy. It
    is chosen when Serve starts."""
    allow_downtime: How[bool] = False
    """A change of what is served may stop replicas before their successors answer, where there is no room for both."""
    health_check_timeout_s: How[float] = Field(default=30, gt=0)
    """How long the engine may be silent, whatever it computes, before its replica is replaced."""
    startup_timeout_s: float = Field(default=900, gt=0)
    """How long the first replica may take to be ready."""


class SamplingPart(Settings):
    """vLLM's SamplingParams over a preset; keys that are not listed here pass through to it."""

    model_config = ConfigDict(extra="allow")

    preset: Literal["greedy", "reference"] = "greedy"
    """greedy: temperature 0, no penalties. reference: the PromptCBLUE endpoint's defaults."""


class ValidationPart(Settings):
    """How checkpoints answer the dev rows (`train.predict_with_generate`)."""

    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's engine arguments."""
    sampling: SamplingPart = SamplingPart()
    """How answers are drawn."""
    resources: dict[str, float] = Field(default_factory=dict)
    """What Ray reserves for the engine beside the workers; a CPU, and on GPUs tensor_parallel_size of them."""


class PredictPart(Settings):
    """How a test set is sent to what answers."""

    sampling: SamplingPart = SamplingPart()
    """How answers are drawn."""
    max_tokens_by_task: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Task -> its own `max_tokens`, such as `{KUAKE-IR: 16}`; other tasks keep `sampling.max_tokens`."""
    structured_choices: bool = False
    """Let rows of classification tasks be answered by one of their `answer_choices` and nothing else."""
    max_in_flight: How[int] = Field(default=256, ge=1)
    """Requests that are open at a time: more than the replicas hold, or they never scale up."""
    max_attempts: How[int] = Field(default=8, ge=1)
    """How often a row may fail, while others are answered, before it is put into quarantine."""
    request_timeout_s: How[float] = Field(default=300, gt=0)
    """How long one try may take."""
    service_timeout_s: How[float] = Field(default=600, gt=0)
    """How long nobody may be answered before the run ends; a replica that died is replaced in that time."""
    rows_per_shard: How[int] = Field(default=256, ge=1)
    """The most rows in one Parquet file of the ledger; one is written every second, or hundredth of the run."""
    num_workers: How[int] = Field(default=1, ge=1)
    """engine=local: the number of vLLM engines."""
    retry_quarantined: How[bool] = False
    """Predict the rows that an earlier run put into quarantine."""
