"""Base + adapters, in order -> one model directory, tensor by tensor, proven equal.

The plan comes first and refuses whatever would be lost or not fit; then the shards are written, each
tensor computed in float64 through all adapters and rounded once; then the written model is compared with
what PEFT makes of base and adapters. Only then is the directory committed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from paddock import hub, manifest, published, storage
from paddock.config import MergeConfig
from paddock.convert import write_meta
from paddock.errors import ModelError, OutputError
from paddock.lora import TOKENIZER_FILES
from paddock.merge_operations import MergedModel
from paddock.merge_plan import Plan, make_plan
from paddock.models_of_2023 import Tokens, put_right, special_tokens
from paddock.proof import prove
from paddock.shard_tasks import write_shards
from paddock.shards import plan_shards, write_index
from paddock.weights import read_object, write_object

Inputs = dict[str, manifest.Input]
# What a file says about the machine it was made on.
_LOCAL_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file")


def merge(config: MergeConfig) -> str | Path:
    """Merge as configured; return where the model stands.

    Raises ModelError where base and adapters do not fit together or the result is not what PEFT computes,
    OutputError where the place is taken or the disk is too small.
    """
    manifest.apart(config.output_dir, config.base_model, *config.lora_model)
    with ThreadPoolExecutor(1) as pool:
        # Hashing 13 GB takes 9 s of a core: that goes on while shards are written.
        inputs = pool.submit(_inputs, config)
        return _merge(config, plan_of(config), inputs, pool.submit(lambda: _hashes(inputs.result())))


def _merge(config: MergeConfig, plan: Plan, inputs: Future[Inputs], hashes: Future[dict[str, str]]) -> str | Path:
    shards = plan_shards(plan.infos, config.max_shard_size)
    meta = config.output_type == "pth"
    with manifest.stage(
        config.output_dir,
        kind="meta" if meta else "model",
        config=config.hashed(),
        inputs=hashes,
        overwrite=config.overwrite,
        resume=True,
    ) as stage:
        if stage.finished:
            return stage.place
        _say(plan.notes)
        # Meta's layout is made from Hugging Face's, which goes when it is done.
        directory = stage.notes / "huggingface" if meta else stage.directory
        directory.mkdir(parents=True, exist_ok=True)
        _check_disk(directory, plan.bytes, config.output_dir)
        here = any(storage.is_uri(path) for path in (config.base_model, *config.lora_model, config.output_dir))
        source = MergedModel(plan.outputs, plan.sources)
        written = write_shards(source, shards, plan.infos, directory, stage.notes, config, what="merge", here=here)
        write_index(directory, shards, plan.infos)
        _write_files(plan, directory)
        if config.prove_prompts:
            stage.extra["merged_vs_adapter"] = _proven(plan, directory, config)
        norms = {name: norm for done in written.values() for name, norm in done.said.items()}
        stage.extra["delta_norms"] = {name: norms[name] for name in plan.outputs if name in norms}
        files = {name: {path: file.sha256 for path, file in it.files.items()} for name, it in inputs.result().items()}
        stage.extra["input_files"] = files
        for place, sums in zip((plan.base, *(step.adapter for step in plan.steps)), files.values(), strict=True):
            _say(f"{hub.name(place)}: {line}" for line in published.recognised(hub.name(place), sums))
        if meta:
            stage.extra.update(write_meta(directory, stage.directory, stage.notes / "rotary"))
        else:
            stage.hashes.update({name: manifest.FileEntry(done.bytes, done.sha256) for name, done in written.items()})
        _write_card(stage.directory, plan, stage.extra.get("merged_vs_adapter"))
    return stage.place


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"merge: {line}", flush=True)


def plan_text(config: MergeConfig) -> str:
    """What `merge` would do, for a person: nothing is written."""
    plan = plan_of(config)
    shards = plan_shards(plan.infos, config.max_shard_size)
    steps = [f"adapter {n}: {step.adapter} ({step.rows} rows)" for n, step in enumerate(plan.steps, 1)]
    lines = [
        f"base: {plan.base}",
        *steps,
        f"tokenizer: {plan.tokenizer or 'none'}",
        *(f"note: {note}" for note in plan.notes),
        f"output: {config.output_dir}, {len(plan.outputs)} tensors, {plan.bytes / 2**20:,.1f} MiB",
    ]
    for file, names in shards.items():
        lines += [f"{file}:", *(f"  {plan.outputs[name]}" for name in names)]
    return "\n".join(lines)


def plan_of(config: MergeConfig) -> Plan:
    """The plan of a configured merge (see `paddock.merge_plan.make_plan`)."""
    dtype = getattr(torch, config.dtype) if config.dtype else None
    base, *adapters = [storage.fetch(hub.local(place)) for place in (config.base_model, *config.lora_model)]
    return make_plan(base, adapters, dtype)


def _inputs(config: MergeConfig) -> Inputs:
    inputs = {"base_model": manifest.look(hub.local(config.base_model), beside=True)}
    for number, directory in enumerate(config.lora_model):
        inputs[f"lora_model.{number}"] = manifest.look(hub.local(directory))
    return inputs


def _hashes(inputs: Inputs) -> dict[str, str]:
    return {name: found.hash for name, found in inputs.items()}


def _check_disk(directory: Path, size: int, output_dir: str) -> None:
    """Raise OutputError where the disk has no room for the weights; what a killed run left counts as room."""
    there = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    free = shutil.disk_usage(directory).free + there
    if size > free:
        raise OutputError(
            f"{output_dir}: the weights take {size / 2**30:,.1f} GiB, its disk has {free / 2**30:,.1f} GiB free; make"
            " room or choose another output_dir"
        )


def _proven(plan: Plan, directory: Path, config: MergeConfig) -> dict[str, float | int]:
    started = time.monotonic()
    result = prove(plan, directory, config.prove_prompts)
    agreement = result["top1_agreement"]
    print(
        f"merge: proven on {result['prompts']} prompts in {time.monotonic() - started:.1f} s: top-1 agreement"
        f" {agreement:.4f}, largest logit difference {result['max_abs_logit_diff']:.2g}",
        flush=True,
    )
    if not agreement >= config.min_top1_agreement:
        raise ModelError(
            f"merge: the merged model agrees with base + adapters on {agreement:.4f} of the positions,"
            f" min_top1_agreement is {config.min_top1_agreement}; merge in a wider dtype, or look at the adapters"
        )
    return result


def _write_files(plan: Plan, directory: Path) -> None:
    """Everything beside the weights: configuration, tokenizer, generation config."""
    tokens = special_tokens(plan.tokenizer)
    values = dict(plan.base_config)
    values["vocab_size"], values["tie_word_embeddings"] = plan.rows, plan.tied
    values.pop("torch_dtype", None)
    dtypes = [info.dtype for info in plan.infos.values() if info.dtype.is_floating_point]
    values["dtype"] = str(max(dtypes, key=dtypes.count)).removeprefix("torch.")
    _write_object(directory / "config.json", values, tokens)
    if plan.tokenizer is not None:
        for name in TOKENIZER_FILES:
            _copy(plan.tokenizer / name, directory / name, tokens)
    for source in (plan.base, *(step.adapter for step in plan.steps)):
        _copy(source / "generation_config.json", directory / "generation_config.json", tokens)


def _copy(source: Path, target: Path, tokens: Tokens) -> None:
    """Copy a file as it is where nothing in it has to change."""
    if not source.is_file():
        return
    if source.suffix == ".json" and source.name != "tokenizer.json":
        values = read_object(source)
        if any(key in values for key in _LOCAL_KEYS) or put_right(source.name, values, tokens)[1]:
            _write_object(target, values, tokens)
            return
    shutil.copyfile(source, target)


def _write_object(target: Path, values: dict[str, Any], tokens: Tokens) -> None:
    """Write a JSON file, put right, without the paths that transformers used to leave in it."""
    right, notes = put_right(target.name, values, tokens)
    _say(notes)
    write_object(target, {key: value for key, value in right.items() if key not in _LOCAL_KEYS})


def _write_card(directory: Path, plan: Plan, proof: dict[str, float | int] | None) -> None:
    """README.md, the model card."""
    adapters = [f"{n}. `{hub.name(step.adapter)}`, {step.rows} rows" for n, step in enumerate(plan.steps, 1)]
    if proof is None:
        said = "It was not compared with base + adapters."
    else:
        said = (
            f"On {proof['prompts']} prompts, in float32, its most likely token agrees with base + adapters at"
            f" {proof['top1_agreement']:.2%} of the positions; logits differ by at most"
            f" {proof['max_abs_logit_diff']:.2g}."
        )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {hub.name(plan.base)} with {len(plan.steps)} merged LoRA adapters",
        "",
        f"Base: `{hub.name(plan.base)}`. Adapters, in the order they were applied:",
        "",
        *(adapters or ["(none)"]),
        "",
        f"The vocabulary has {plan.rows} rows. Sums were float64 and rounded once.",
        said,
        "",
        "`manifest.json` holds the hashes of inputs and outputs.",
        "",
    ]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")
