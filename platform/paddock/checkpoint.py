"""Checkpoints of a run: a plain PEFT adapter directory with its tokenizer, plus `trainer_state/`.

    RUN/checkpoint-800/adapter_model.safetensors ...      loads with PeftModel.from_pretrained, serves in vLLM
    RUN/checkpoint-800/trainer_state/state.pt             optimizer, scheduler, RNGs, step
    RUN/checkpoint-800/manifest.json                      the commit: without it the checkpoint does not exist

The position in the data is the step itself: see `packing.step_blocks`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paddock import manifest, storage
from paddock.errors import OutputError

STATE = Path("trainer_state") / "state.pt"


def path(run: str | Path, step: int) -> str | Path:
    """Where the checkpoint after `step` optimizer steps stands."""
    return storage.join(run, f"checkpoint-{step}")


def write(
    run: str | Path,
    step: int,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    save_adapter: Callable[[Path], None],
    state: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> str | Path:
    """Write a checkpoint, as one step, and return where it stands.

    `save_adapter` writes the PEFT directory into the path it is given. A damaged directory in the
    checkpoint's place is replaced; `config` and `inputs` were compared when the run started.
    """
    place = path(run, step)
    storage.remove(place)
    with manifest.stage(place, kind="checkpoint", config=config, inputs=inputs, overwrite=True) as work:
        save_adapter(work.directory)
        (work.directory / STATE).parent.mkdir()
        torch.save(dict(state), work.directory / STATE)
        work.extra |= {"step": step, "metrics": dict(metrics)}
    return place


def read_state(directory: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint: plain values and tensors, nothing is unpickled."""
    state: dict[str, Any] = torch.load(directory / STATE, map_location="cpu", weights_only=True)
    return state


def steps(run: str | Path) -> list[int]:
    """The steps whose checkpoint has a manifest, oldest first."""
    found = (name.removeprefix("checkpoint-") for name in storage.children(run) if name.startswith("checkpoint-"))
    numbers = (int(step) for step in found if step.isdigit())
    return sorted(step for step in numbers if storage.exists(storage.join(path(run, step), manifest.NAME)))


def find_last(run: str | Path, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Path | None:
    """The newest checkpoint whose files are as its manifest says; a damaged one is passed over, aloud.

    The path is local: of a run at a URI it is a copy, whose name is the checkpoint's.

    Raises OutputError where the run was made by another configuration.
    """
    for step in reversed(steps(run)):
        try:
            directory = storage.fetch(path(run, step))
            found = manifest.verify(directory)
        except OutputError as error:
            print(f"warning: {error}; trying the checkpoint before it", flush=True)
            continue
        changed = manifest.difference(found, config, inputs)
        if changed is not None:
            raise OutputError(
                f"{run}: its checkpoints were made with another configuration: {changed};"
                " choose another output_dir or overwrite=true"
            )
        return directory
    return None


def prune(run: str | Path, keep: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`."""
    if keep is not None:
        found = steps(run)
        for step in found[: max(len(found) - keep, 0)]:
            storage.remove(path(run, step))


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this process."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
