"""What a run tells while it trains: a progress bar or lines, `metrics.jsonl`, and trackers.

`metrics.jsonl` holds one curve over all attempts, a line a step. A resumed run takes back what an earlier
attempt told of steps that no checkpoint kept, and tells them again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from paddock import storage
from paddock.errors import ConfigError

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class Bar(Protocol):
    """A tqdm."""

    def update(self, n: int) -> Any: ...
    def set_description(self, desc: str) -> Any: ...
    def close(self) -> Any: ...


class Journal:
    """The story of one attempt at a run, told by rank 0. Of a run at a URI, `publish` copies it there.

    first_step: the steps that are already done. bar: counts steps and is told the rest, instead of lines.
    """

    def __init__(
        self, run: str, first_step: int, max_steps: int, report_to: Sequence[str] = (), bar: Bar | None = None
    ) -> None:
        self.run, self.first_step, self.max_steps, self.bar = run, first_step, max_steps, bar
        self.directory = storage.workplace(run)
        self.directory.mkdir(parents=True, exist_ok=True)
        if storage.is_uri(run):
            storage.remove(self.directory / TENSORBOARD)
            _fetch(storage.join(run, METRICS), self.directory / METRICS)
        self.seconds_before = _take_back(self.directory / METRICS, first_step)
        self.file = (self.directory / METRICS).open("a", encoding="utf-8")
        self.trackers = [_TRACKERS[name](self, first_step) for name in report_to]
        self.begun = self.logged = time.monotonic()
        self.tokens = 0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def count(self, tokens: int) -> None:
        """A step is done, in which the model saw so many tokens, padding apart."""
        self.tokens += tokens
        if self.bar:
            self.bar.update(1)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Tell what is known after a step, once a step: numbers, or numbers by name (the dev loss by task)."""
        now = time.monotonic()
        rate = round(self.tokens / max(now - self.logged, 1e-6), 1)
        elapsed = now - self.begun
        self.logged, self.tokens = now, 0
        seconds = round(self.seconds_before + elapsed, 3)
        record = {"step": step, "seconds": seconds, "tokens_per_s": rate, **metrics}
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()
        for tracker in self.trackers:
            tracker.log(step, {"tokens_per_s": rate, **_flat(metrics)})
        told = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not isinstance(value, dict))
        told = f"{told}  {rate:,.0f} tokens/s"
        if self.bar:
            self.bar.set_description(told)
        else:
            to_go = elapsed / max(step - self.first_step, 1) * (self.max_steps - step)
            self.say(f"step {step}/{self.max_steps}  {told}  {elapsed:.0f} s, {to_go:.0f} s to go")

    def publish(self) -> None:
        """Let what was told outlive this machine."""
        self.file.flush()
        os.fsync(self.file.fileno())
        for tracker in self.trackers:
            tracker.flush()
        if storage.is_uri(self.run):
            for name in (METRICS, TENSORBOARD):
                if (self.directory / name).exists():
                    storage.upload(self.directory / name, storage.join(self.run, name))

    def close(self) -> None:
        self.publish()
        self.file.close()
        for tracker in self.trackers:
            tracker.close()
        if self.bar:
            self.bar.close()


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose library is not installed."""
    for name in report_to:
        if name in ("mlflow", "wandb") and importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.report_to: {name} is not installed; pip install {name}, or leave it out")


def _fetch(source: str | Path, target: Path) -> None:
    """Copy a file here; where there is none, there is none here either."""
    storage.remove(target)
    if storage.exists(source):
        with storage.reading(source) as stream:
            target.write_bytes(stream.read())


def _take_back(file: Path, step: int) -> float:
    """Cut a curve after a step; returns the seconds that it took until there.

    A line that a killed process left unfinished is the last one, and is told again.
    """
    if not file.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
            seconds = record["seconds"]
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(file)
    return float(seconds)


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


class _TensorBoard:
    def __init__(self, journal: Journal, first_step: int) -> None:
        # What an earlier attempt told of later steps disappears from the plots.
        directory = str(journal.directory / TENSORBOARD)
        self.writer = SummaryWriter(directory, purge_step=first_step + 1 if first_step else None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _MLflow:
    """Where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say; attempts at a run are one run there."""

    def __init__(self, journal: Journal, first_step: int) -> None:
        import mlflow

        self.mlflow = mlflow
        name = Path(journal.run).name
        known = mlflow.search_runs(filter_string=f"tags.paddock_run = '{journal.run}'", output_format="list")
        mlflow.start_run(run_id=known[0].info.run_id if known and first_step else None, run_name=name)
        mlflow.set_tag("paddock_run", journal.run)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.mlflow.log_metrics(metrics, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.mlflow.end_run()


class _WandB:
    """As the WANDB_ variables say; attempts at a run are one run there."""

    def __init__(self, journal: Journal, first_step: int) -> None:
        import wandb

        name = Path(journal.run).name
        self.run = wandb.init(
            id=storage.digest(journal.run),
            name=name,
            dir=str(journal.directory),
            resume="allow" if first_step else None,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _WandB}
