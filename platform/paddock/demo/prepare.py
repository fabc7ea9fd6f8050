"""Make the embedded default where a configuration points at it and it is not there yet."""

from __future__ import annotations

import os
from pathlib import Path

from paddock import manifest, storage
from paddock.config import MergeConfig, TrainConfig
from paddock.demo import make_assets
from paddock.merge import merge

SEED = 0
ADAPTERS = ("adapters/zh-llama", "adapters/zh-alpaca")


def write_assets(directory: str | Path, *, overwrite: bool = False) -> None:
    """Base, adapters and rows, as one stage; does nothing where they stand already."""
    with manifest.stage(directory, kind="assets", config={"seed": SEED}, inputs={}, overwrite=overwrite) as work:
        if not work.finished:
            make_assets(work.directory, SEED)


def ensure(config: TrainConfig) -> None:
    """Make the assets, and the base model merged from them, where `demo_assets` names them and they are missing."""
    if config.demo_assets is None:
        return
    makes_base = _is_below(config.model.path, config.output_dir) and not storage.exists(config.model.path)
    wanted = [config.data.train, config.data.dev, config.data.test, *(_base_inputs(config) if makes_base else ())]
    below = [path for path in wanted if path is not None and _is_below(path, config.demo_assets)]
    if any(not storage.exists(path) for path in below):
        write_assets(config.demo_assets)
    if makes_base:
        merge(base_config(config))


def base_config(config: TrainConfig) -> MergeConfig:
    """The merge that makes the demo's base: the tiny LLaMA and its two adapters, in order."""
    base, *adapters = _base_inputs(config)
    return MergeConfig(base_model=base, lora_model=tuple(adapters), output_dir=config.model.path)


def _base_inputs(config: TrainConfig) -> list[str]:
    return [f"{config.demo_assets}/{name}" for name in ("base", *ADAPTERS)]


def _is_below(path: str, directory: str) -> bool:
    return os.path.commonpath([os.path.abspath(path), os.path.abspath(directory)]) == os.path.abspath(directory)
