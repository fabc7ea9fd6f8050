"""What a run tells while it trains: lines, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import time

from tensorboardX import SummaryWriter

from paddock import storage


class Journal:
    """The story of one attempt at a run, told by rank 0."""

    def __init__(self, run: str, first_step: int, max_steps: int) -> None:
        self.run, self.first_step, self.max_steps = run, first_step, max_steps
        self.directory = storage.workplace(run)
        if storage.is_uri(run):
            storage.remove(self.directory)
            self.directory.mkdir(parents=True)
            earlier = storage.join(run, "metrics.jsonl")
            if storage.exists(earlier):
                with storage.reading(earlier) as stream:
                    (self.directory / "metrics.jsonl").write_bytes(stream.read())
        self.file = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(self.directory / "tensorboard"))
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def log(self, step: int, **metrics: float) -> None:
        elapsed = time.monotonic() - self.begun
        eta = elapsed / (step - self.first_step) * (self.max_steps - step)
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"step {step}/{self.max_steps}  {values}  {elapsed:.0f} s, {eta:.0f} s to go")
        self.file.write(json.dumps({"step": step, "seconds": round(elapsed, 3), **metrics}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)

    def publish(self) -> None:
        """Let the files be where the run is; an earlier attempt's TensorBoard events are another file."""
        if storage.is_uri(self.run):
            self.tensorboard.flush()
            storage.upload(self.directory, self.run)

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()
