"""Base + adapters, in order -> one model directory, tensor by tensor, proven equal.

The plan comes first and refuses whatever would be lost or not fit; then the shards are written, each
tensor computed in float32 through all adapters and rounded once; then the written model is compared with
what PEFT makes of base and adapters. Only then is the directory committed.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from paddock import manifest, storage
from paddock.config import MergeConfig
from paddock.convert import write_meta
from paddock.errors import ModelError
from paddock.lora import TOKENIZER_FILES
from paddock.merge_operations import OutputTensor, write_merged_shard
from paddock.merge_plan import Plan, make_plan
from paddock.proof import check_memory, prove
from paddock.weights import plan_shards, read_object, write_index, write_object

# What a file says about the machine it was made on.
_LOCAL_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file")


def merge(config: MergeConfig) -> str | Path:
    """Merge as configured; return where the model stands.

    Raises ModelError where base and adapters do not fit together or the result is not what PEFT computes,
    OutputError where the place is taken.
    """
    manifest.apart(config.output_dir, config.base_model, *config.lora_model)
    plan = _plan(config)
    shards = plan_shards(plan.infos, config.max_shard_size)
    if config.prove_prompts:
        check_memory(plan)
    with manifest.stage(
        config.output_dir,
        kind="meta" if config.output_type == "pth" else "model",
        config=config.hashed(),
        inputs=_inputs(config),
        overwrite=config.overwrite,
    ) as stage:
        if stage.finished:
            return stage.place
        for note in plan.notes:
            print(f"merge: {note}", flush=True)
        meta = config.output_type == "pth"
        directory = stage.directory / ".huggingface" if meta else stage.directory
        directory.mkdir(exist_ok=True)
        started = time.monotonic()
        norms = _write_shards(plan, shards, directory, _num_workers(config))
        write_index(directory, shards, plan.infos)
        _write_files(plan, directory)
        seconds = time.monotonic() - started
        print(f"merge: wrote {len(shards)} shards, {plan.bytes / 2**20:,.1f} MiB in {seconds:.1f} s", flush=True)
        if config.prove_prompts:
            stage.extra["merged_vs_adapter"] = _proven(plan, directory, config)
        stage.extra["delta_norms"] = norms
        if meta:
            stage.extra.update(write_meta(directory, stage.directory))
            shutil.rmtree(directory)
        _write_card(stage.directory, plan, stage.extra.get("merged_vs_adapter"))
    return stage.place


def plan_text(config: MergeConfig) -> str:
    """What `merge` would do, for a person: nothing is written."""
    plan = _plan(config)
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


def _plan(config: MergeConfig) -> Plan:
    dtype = getattr(torch, config.dtype) if config.dtype else None
    return make_plan(storage.fetch(config.base_model), [storage.fetch(d) for d in config.lora_model], dtype)


def _inputs(config: MergeConfig) -> dict[str, str]:
    inputs = {"base_model": manifest.fingerprint(config.base_model)}
    for number, directory in enumerate(config.lora_model):
        inputs[f"lora_model.{number}"] = manifest.fingerprint(directory)
    return inputs


def _num_workers(config: MergeConfig) -> int:
    """Other nodes see neither the local copy of what is at a URI nor what is on its way there."""
    here = any(storage.is_uri(path) for path in (config.base_model, *config.lora_model, config.output_dir))
    if here and config.num_workers > 1:
        print("merge: num_workers is for paths that all nodes share; with a URI one process writes", flush=True)
    return 1 if here else config.num_workers


def _write_shards(plan: Plan, shards: dict[str, list[str]], directory: Path, num_workers: int) -> dict[str, float]:
    work = [(directory / file, [plan.outputs[name] for name in names]) for file, names in shards.items()]
    if min(num_workers, len(work)) <= 1:
        found = [write_merged_shard(file, outputs, plan.sources) for file, outputs in work]
    else:
        found = _with_ray(plan, work, num_workers)
    norms = {name: norm for part in found for name, norm in part.items()}
    return {name: norms[name] for name in plan.outputs if name in norms}


def _with_ray(plan: Plan, work: list[tuple[Path, list[OutputTensor]]], num_workers: int) -> list[dict[str, float]]:
    """One Ray task per shard, `num_workers` at a time. The output directory is one that all nodes share."""
    import ray

    from paddock import cluster

    started = cluster.connect()
    try:
        cluster.require([{"CPU": 1}], "merge")
        sources = ray.put(plan.sources)
        task = ray.remote(num_cpus=1)(write_merged_shard)
        waiting: list[Any] = []
        found: list[Any] = []
        for file, outputs in work:
            if len(waiting) == num_workers:
                _, waiting = ray.wait(waiting)
            reference = task.remote(file, outputs, sources)
            found.append(reference)
            waiting.append(reference)
        return [ray.get(reference) for reference in found]
    except ray.exceptions.RayTaskError as error:
        # The others end before the directory that they write into goes.
        ray.wait(found, num_returns=len(found))
        raise error.cause from None
    finally:
        cluster.disconnect(started)


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
    values = {key: value for key, value in plan.base_config.items() if key not in _LOCAL_KEYS}
    values["vocab_size"], values["tie_word_embeddings"] = plan.rows, plan.tied
    values.pop("torch_dtype", None)
    dtypes = [info.dtype for info in plan.infos.values() if info.dtype.is_floating_point]
    values["dtype"] = str(max(dtypes, key=dtypes.count)).removeprefix("torch.")
    write_object(directory / "config.json", values)
    if plan.tokenizer is not None:
        for name in TOKENIZER_FILES:
            _copy(plan.tokenizer / name, directory / name)
    for source in (plan.base, *(step.adapter for step in plan.steps)):
        _copy(source / "generation_config.json", directory / "generation_config.json")


def _copy(source: Path, target: Path) -> None:
    """Copy a file as it is, or without the paths that transformers used to leave in its JSON."""
    if not source.is_file():
        return
    if source.suffix == ".json" and source.name != "tokenizer.json":
        values = read_object(source)
        if any(key in values for key in _LOCAL_KEYS):
            write_object(target, {key: value for key, value in values.items() if key not in _LOCAL_KEYS})
            return
    shutil.copyfile(source, target)


def _write_card(directory: Path, plan: Plan, proof: dict[str, float | int] | None) -> None:
    """README.md, the model card."""
    adapters = [f"{n}. `{step.adapter.name}`, {step.rows} rows" for n, step in enumerate(plan.steps, 1)]
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
        f"# {plan.base.name} with {len(plan.steps)} merged LoRA adapters",
        "",
        f"Base: `{plan.base.name}`. Adapters, in the order they were applied:",
        "",
        *(adapters or ["(none)"]),
        "",
        f"The vocabulary has {plan.rows} rows. Products were accumulated in float32 and rounded once.",
        said,
        "",
        "`manifest.json` holds the hashes of inputs and outputs.",
        "",
    ]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")
