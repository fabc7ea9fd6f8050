"""The configuration tree: one root model a job, built from the parts in `config_parts`.

    load(TrainConfig, "jobs/configs/demo.yaml", ["train.learning_rate=1e-4"])

An unknown key is an error that names the nearest known one. Relative paths are resolved here, once:
against the working directory, or, under `ray job submit`, where the working directory is a copy that
vanishes, against `storage_path`. `${output_dir}` in a path stands for the run's own directory.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from paddock.config_parts import (
    DataConfig,
    How,
    Location,
    LoraPart,
    ModelConfig,
    ModelLocation,
    Paths,
    PredictPart,
    PromptConfig,
    SamplingPart,
    ScalingPart,
    ServePart,
    Settings,
    ShardPart,
    Split,
    TrainPart,
    ValidationPart,
    is_hashed,
)
from paddock.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: 1e-4 is a number; 2026-11-24, 0123, 12:30, no and on are text."""


_Loader.yaml_implicit_resolvers = {}
_NUMBER = r"[-+]?(?:0|[1-9][0-9]*)"
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|True|false|False", list("tTfF")),
    ("int", _NUMBER, list("-+0123456789")),
    ("float", rf"{_NUMBER}(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9]+|[-+]?\.inf", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


class JobConfig(Settings):
    """What every job has: one place to write to."""

    output_dir: Location
    """The directory that the job writes; all its paths lie under it."""
    storage_path: How[str | None] = None
    """Where relative paths of a submitted job lie: a directory that all nodes share, or a URI."""
    overwrite: How[bool] = False
    """Replace an output that another configuration made, instead of refusing it."""

    def hashed(self) -> dict[str, Any]:
        """The part of the configuration that can change the result (see `config_parts.is_hashed`)."""
        return _hashed(self)


class TrainConfig(JobConfig):
    """LoRA fine-tuning: `python -m jobs.train`."""

    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    model: ModelConfig
    lora: LoraPart = LoraPart()
    train: TrainPart = TrainPart()
    scaling: ScalingPart = ScalingPart()
    validation: How[ValidationPart] = ValidationPart()
    demo_assets: Location | None = None
    """Where the embedded default (tiny base, adapters, rows) is made when a path below it is missing."""


class MergeConfig(JobConfig, ShardPart):
    """Base + adapters, in order -> one model: `python -m jobs.merge`."""

    base_model: ModelLocation
    """A Hugging Face directory, or a model on the hub (`ORG/NAME`)."""
    lora_model: Annotated[tuple[ModelLocation, ...], Split] = ()
    """PEFT adapters, directories or on the hub, in the order they apply: `lora_model=A,B`."""
    output_type: Literal["huggingface", "pth"] = "huggingface"
    """The layout that is written: Hugging Face safetensors, or Meta's consolidated `.pth`."""
    max_shard_size: str = "2GB"
    """The most that one safetensors file holds."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What the merged weights are rounded to; null keeps the base's own."""
    prove_prompts: How[int] = 8
    """Number of prompts on which base + adapters and the merged model are compared; 0 skips the proof."""
    min_top1_agreement: How[float] = 0.9
    """The share of positions with the same most likely token below which the merge fails."""


class ConvertConfig(JobConfig, ShardPart):
    """Meta's `.pth` layout <-> a Hugging Face directory: `python -m jobs.convert`."""

    input_dir: Location
    """The directory to convert."""
    output_type: Literal["huggingface", "pth"] = "huggingface"
    """The layout that is written."""
    max_shard_size: str = "2GB"
    """The most that one safetensors file holds."""
    max_position_embeddings: int | None = None
    """The context length of the model, which Meta's files do not say; null infers it (see paddock.convert)."""


class ServeConfig(ServePart):
    """`serve run deployments:app model=DIR`: a model directory behind HTTP."""

    model: Location
    """The model directory that is served."""
    prompt: PromptConfig = PromptConfig()


class PredictConfig(JobConfig):
    """A test set through a model: `python -m jobs.predict`."""

    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    model: ModelConfig | None = None
    """The model that answers; with `target_url` it is whatever answers there."""
    adapter: Location | None = None
    """A PEFT adapter on the model, served unmerged."""
    adapter_by_task: dict[str, Location] = Field(default_factory=dict)
    """Task -> the adapter for its rows, such as `{CMeEE-V2: runs/a/checkpoint-800}`; other rows take `adapter`."""
    adapters: Annotated[tuple[Location, ...], Split] = ()
    """A sweep: adapters, or patterns such as runs/x/checkpoint-*, each scored on the gold rows of `data.dev`."""
    merge_best: Location | None = None
    """Where the sweep's best adapter is merged into the model."""
    target_url: str | None = None
    """An endpoint to ask over HTTP, an OpenAI-compatible one or a reference /generate, instead of serving a model."""
    engine: How[Literal["serve", "local"]] = "serve"
    """serve: a Serve application answers. local: the workers of the run hold vLLM themselves."""
    serve: How[ServePart] = ServePart()
    predict: PredictPart = PredictPart()

    def base(self) -> ModelConfig:
        """The model that answers. Raises ConfigError where none is named."""
        if self.model is None:
            raise ConfigError("model.path: is required; give a model directory as model.path=DIR, or target_url=URL")
        return self.model

    def service(self) -> ServeConfig:
        """The service that answers this run, when it has to be started."""
        serve, model = self.serve.model_dump(), self.base()
        if model.dtype is not None:
            serve["engine"] = {"dtype": model.dtype, **serve["engine"]}
        return ServeConfig(model=model.path, prompt=self.prompt, **serve)


class ScoreConfig(JobConfig):
    """Predictions + gold -> scores: `python -m jobs.score`."""

    predictions: Location
    """A `test_predictions.json`, or any file of rows whose `target` is what a model said."""
    gold: Location
    """The same rows with the right `target`."""
    profile: Literal["v1", "v2"] = "v1"
    """The benchmark's vintage: v1 has 16 tasks, v2 has 18."""


class CompareConfig(Settings):
    """The scores of two predictions of the same rows: `python -m jobs.score compare A B`."""

    positional: ClassVar[tuple[str, ...]] = ("a", "b")

    a: Location
    """What is compared with: a directory of scores or of predictions, or a file of predictions."""
    b: Location
    """What is compared."""
    gold: Location | None = None
    """The rows with the right `target`; null takes the file that `a` or `b` was scored against."""
    profile: Literal["v1", "v2"] | None = None
    """The benchmark's vintage; null takes the one that has every row's task."""
    draws: int = Field(default=2000, ge=100)
    """Sets of rows that the bootstrap draws."""
    seed: int = 0
    """Seeds what is drawn."""
    output_dir: Location | None = None
    """Where comparison.json is written, with every row that changed; null only tells."""
    storage_path: str | None = None
    """Where relative paths of a submitted job lie."""


class DemoConfig(TrainConfig):
    """Everything in one run: `python -m jobs.demo`. The defaults are for a tiny model on two cores."""

    serve: How[ServePart] = ServePart(
        engine={"max_model_len": 4096},
        # The second replica is for a load that stays: it takes half a minute of both cores to start.
        autoscaling={"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 64, "upscale_delay_s": 60},
        ray_actor_options={"num_cpus": 0.5},
    )
    # The shortest answer is a token and its newline; so small a model learns that EOS comes after a newline, and a
    # prompt ends in one.
    predict: PredictPart = PredictPart(sampling=SamplingPart.model_validate({"max_tokens": 160, "min_tokens": 2}))
    http_rows: How[int] = 8
    """The number of test rows that are also asked over HTTP."""


Config = TypeVar("Config", bound=Settings)


def load(cls: type[Config], config_file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, lay `key.sub=value` overrides over it, and check the whole.

    Raises ConfigError, in one line, for everything that is wrong with it.
    """
    tree: dict[str, Any] = {} if config_file is None else _read_yaml(Path(config_file))
    for override in overrides:
        _apply(tree, override)
    return build(cls, tree, here=any(o.startswith("storage_path=") for o in overrides))


def build(cls: type[Config], tree: dict[str, Any], *, here: bool = False) -> Config:
    """Check a tree of plain values as `cls`.

    A file's `storage_path` is meant for the cluster that the job is submitted to; given on the command
    line (`here`) it is meant for this run, wherever it runs.
    """
    storage_path = tree.get("storage_path")
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    root = None if storage_path is None else os.path.expanduser(str(storage_path))
    if not submitted and not here:
        root = os.getcwd()
    paths = Paths(root=root, output_dir=tree.get("output_dir"))
    try:
        return cls.model_validate(_over_defaults(cls, tree), context=paths)
    except ValidationError as error:
        # A misspelt key first: it is why another one is missing.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ConfigError("; ".join(_explain(cls, dict(e)) for e in errors)) from None


def describe(cls: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[str]:
    """One line a key: its path, its default (the one in `defaults`, where given), what it means: a job's `--help`."""
    for name, field in cls.model_fields.items():
        part = _part(field.annotation)
        default = field.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        if part is not None:
            yield from describe(part, f"{prefix}{name}.", default if isinstance(default, part) else None)
        else:
            told = "(required)" if defaults is None and field.is_required() else f"= {default!r}"
            yield f"  {prefix}{name} {told}\n      {field.description or ''}"


def nearest(key: str, known: Sequence[str]) -> str:
    """The end of an error line: `; did you mean 'x'?`, or what is known."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"--config {file}: no such file; jobs/configs/ holds the ones that come with Paddock")
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a configuration is a mapping of keys, this is {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r}: an override is key.sub=value")
    *parents, key = path.split(".")
    branch = tree
    for parent in parents:
        below = branch.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{path}: {parent!r} is a value, not a group of keys")
        branch = below
    try:
        branch[key] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        branch[key] = text


def _over_defaults(cls: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """A tree laid over the defaults, so that a key given below one (`autoscaling.max_replicas`) leaves its siblings."""
    merged = dict(tree)
    for name, field in cls.model_fields.items():
        if isinstance(tree.get(name), dict):
            default = field.get_default(call_default_factory=True)
            default = default.model_dump() if isinstance(default, BaseModel) else default
            merged[name] = _deep_merge(default, tree[name]) if isinstance(default, dict) else tree[name]
            part = _part(field.annotation)
            if part is not None:
                merged[name] = _over_defaults(part, merged[name])
    return merged


def _deep_merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _deep_merge(below[key], above[key])
    return merged


def _part(annotation: Any) -> type[BaseModel] | None:
    """The settings model that an annotation holds, if it does (`X`, `X | None`)."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _explain(cls: type[BaseModel], error: dict[str, Any]) -> str:
    where = ".".join(str(step) for step in error["loc"])
    if error["type"] == "missing":
        return f"{where}: is required; give it as {where}=..."
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]} (found {error['input']!r})"
    model: type[BaseModel] = cls
    for step in error["loc"][:-1]:
        field = model.model_fields.get(str(step))
        model = (field and _part(field.annotation)) or model
    return f"{where}: unknown key{nearest(str(error['loc'][-1]), list(model.model_fields))}"


def _hashed(settings: BaseModel) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if is_hashed(field):
            tree[name] = _hashed(value) if isinstance(value, BaseModel) else value
    tree.update(settings.model_extra or {})
    return typing.cast(dict[str, Any], json.loads(json.dumps(tree, default=list)))


__all__ = [
    "CompareConfig",
    "ConvertConfig",
    "DataConfig",
    "DemoConfig",
    "LoraPart",
    "MergeConfig",
    "ModelConfig",
    "PredictConfig",
    "PredictPart",
    "PromptConfig",
    "SamplingPart",
    "ScalingPart",
    "ScoreConfig",
    "ServeConfig",
    "ServePart",
    "TrainConfig",
    "TrainPart",
    "build",
    "describe",
    "load",
    "nearest",
]
