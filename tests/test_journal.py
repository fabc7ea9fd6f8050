"""metrics.jsonl: one curve over all attempts, and what else is told."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from paddock import journal
from paddock.errors import ConfigError
from paddock.journal import METRICS, Journal


def _lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]


def test_a_resumed_run_tells_one_curve(tmp_path: Path) -> None:
    first = Journal(str(tmp_path), 0, 10, ("tensorboard",))
    for step in (1, 2, 3):
        first.count(100)
        first.log(step, {"loss": float(step), "dev_loss_by_task": {"T": 1.0}})
    first.publish()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line

    second = Journal(str(tmp_path), 2, 10, ("tensorboard",))
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]
    second.count(100)
    second.log(3, {"loss": 3.5})
    second.close()
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.5)]
    seconds = [float(str(line["seconds"])) for line in _lines(tmp_path)]
    assert seconds == sorted(seconds)


def test_a_bar_is_told_instead_of_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bar:
        steps, text, closed = 0, "", False

        def update(self, n: int) -> None:
            self.steps += n

        def set_description(self, desc: str) -> None:
            self.text = desc

        def close(self) -> None:
            self.closed = True

    bar = Bar()
    told = Journal(str(tmp_path), 0, 10, (), bar)
    told.count(512)
    told.log(1, {"loss": 0.25})
    told.close()
    assert (bar.steps, bar.closed) == (1, True)
    assert "loss 0.25" in bar.text
    assert "tokens/s" in bar.text
    assert capsys.readouterr().out == ""


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.report_to: wandb is not installed"):
        journal.check_trackers(("tensorboard", "wandb"))


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_trackers_take_what_is_told(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip(tracker)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for a database otherwise
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = Journal(str(tmp_path / "run"), 0, 10, (tracker,))
    told.log(1, {"loss": 2.0, "dev_loss_by_task": {"CMeEE-V2": 1.0}})
    if tracker == "mlflow":
        run = library.MlflowClient().get_run(library.active_run().info.run_id)
        assert run.data.metrics["dev_loss_by_task/CMeEE-V2"] == 1.0
    told.close()
    if tracker == "wandb":
        (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
        until = time.monotonic() + 30  # W&B's own process writes it
        while b"dev_loss_by_task/CMeEE-V2" not in file.read_bytes():
            assert time.monotonic() < until
            time.sleep(0.1)
