"""Checkpoints of a run: a plain PEFT adapter directory with its tokenizer, plus `trainer_state/`.

    RUN/checkpoint-800/adapter_model.safetensors ...      loads with PeftModel.from_pretrained, serves in vLLM
    RUN/checkpoint-800/trainer_state/state.pt             trained parameters, optimizer, scheduler, step
    RUN/checkpoint-800/manifest.json                      the commit: without it the checkpoint does not exist

The step is the cursor: which blocks come next (`packing.step_blocks`) and the state of every random number
generator (`seed_micro_batch`) follow from it, for any number of workers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import set_seed

from paddock import manifest, storage
from paddock.errors import OutputError

STATE = Path("trainer_state") / "state.pt"
SCORES = "scores"
# A worker whose driver was killed lives on for as long as Ray needs to see it, which is seconds.
_ORPHAN_S = 120


def path(run: str | Path, step: int) -> str | Path:
    """Where the checkpoint after `step` optimizer steps stands."""
    return storage.join(run, f"checkpoint-{step}")


def step_of(directory: Path) -> int:
    """The steps that a checkpoint directory holds."""
    return int(directory.name.removeprefix("checkpoint-"))


def write(
    run: str | Path,
    step: int,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    save_adapter: Callable[[Path], None],
    state: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Path:
    """Write a checkpoint, as one step, into the run's directory on this machine; returns where it stands.

    `save_adapter` writes the PEFT directory into the path it is given. A damaged directory in the
    checkpoint's place is replaced; `config` and `inputs` were compared when the run started.
    """
    place = storage.workplace(run) / f"checkpoint-{step}"
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
        refuse_other(run, found, config, inputs)
        return directory
    return None


def refuse_other(
    run: str | Path, found: manifest.Manifest, config: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
    """Raise OutputError, naming the first difference, where a run was made by another configuration or base."""
    changed = manifest.difference(found, config, inputs)
    if changed is not None:
        raise OutputError(
            f"{run}: its checkpoints were made with another configuration: {changed};"
            " choose another output_dir or overwrite=true"
        )


def best(run: str | Path, by: str) -> int | None:
    """The step of the checkpoint with the lowest dev loss, or the highest score, the earlier of equals; None where
    none has it."""
    if by == "score":
        found = scores(run)
        return min(found, key=lambda step: (-found[step], step)) if found else None
    losses: dict[int, float] = {}
    for step in steps(run):
        about = manifest.read(path(run, step))
        if about is not None and by in about.extra.get("metrics", {}):
            losses[step] = about.extra["metrics"][by]
    return min(losses, key=lambda step: (losses[step], step)) if losses else None


def score_file(run: str | Path, step: int) -> str | Path:
    """Where it is said what a checkpoint's answers are worth (see `paddock.validation`)."""
    return storage.join(run, SCORES, f"checkpoint-{step}.json")


def read_score(run: str | Path, step: int) -> dict[str, Any] | None:
    """What is said there, or None."""
    if not storage.exists(score_file(run, step)):
        return None
    with storage.reading(score_file(run, step)) as stream:
        return dict(json.load(stream))


def scores(run: str | Path) -> dict[int, float]:
    """The scores of the checkpoints that have one, by step."""
    found = {step: read_score(run, step) for step in steps(run)}
    return {step: float(said["score"]) for step, said in found.items() if said is not None}


def prune(run: str | Path, keep: int | None, *, best_by: str | None = None, scored: bool = False) -> None:
    """Remove the oldest checkpoints beyond `keep`, but not the best one, nor, where they are `scored`, one that is
    still to be."""
    if keep is None:
        return
    found = steps(run)
    spared = {best(run, best_by)} if best_by else set()
    spared |= set(found) - scores(run).keys() if scored else set()
    for step in found[: max(len(found) - keep, 0)]:
        if step not in spared:
            storage.remove(path(run, step))


@contextmanager
def writing(run: str | Path) -> Iterator[None]:
    """Be the one process that writes a run's checkpoints and metrics.

    An earlier attempt's worker may outlive its killed driver for a moment, so this waits for it. The lock
    is the process's own: it is free as soon as that is dead, whatever file is left behind. What such a
    process left half-written is removed. Raises OutputError where it does not end.
    """
    place = storage.workplace(run)
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / ".writer.lock")
    try:
        lock.acquire(timeout=_ORPHAN_S)
    except Timeout:
        raise OutputError(
            f"{run}: a worker of an earlier attempt has been writing here for {_ORPHAN_S} s; end that process first"
        ) from None
    try:
        for left in (*place.glob(".checkpoint-*.partial"), *place.glob(".checkpoint-*.lock")):
            storage.remove(left)
        yield
    finally:
        lock.release()


class Publisher:
    """Lets checkpoints be where their run is, and removes what they replace (see `prune`).

    To a URI they are copied while the training goes on. One copy is under way at a time: the next one waits
    for it, so that checkpoints appear in their order.
    """

    def __init__(self, run: str | Path, keep: int | None, best_by: str | None = None, *, scored: bool = False) -> None:
        self.run, self.prune = run, partial(prune, run, keep, best_by=best_by, scored=scored)
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def publish(self, place: Path, *, before: Callable[[], None]) -> None:
        """Let the checkpoint at `place` exist, after a call (the metrics up to it have to be there first).

        Raises what an earlier copy raised: StorageError where the store refuses.
        """
        self.wait()
        before()
        if storage.is_uri(self.run):
            self._last = self._pool.submit(self._copy, place)
        else:
            self.prune()

    def wait(self) -> None:
        """Return when every checkpoint is where the run is."""
        if self._last is not None:
            self._last.result()
            self._last = None

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()

    def _copy(self, place: Path) -> None:
        storage.publish(place, storage.join(self.run, place.name))
        shutil.rmtree(place)
        self.prune()


def seed_micro_batch(seed: int, step: int, index: int) -> None:
    """Set every random number generator to what it is before a micro-batch, on whichever worker that runs."""
    set_seed((seed * 1_000_003 + step * 1_009 + index) % 2**32)
