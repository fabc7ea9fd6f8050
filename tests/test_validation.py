"""Generation scores of checkpoints: taken while training goes on, and what is kept because of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddock import checkpoint, cluster, validation
from paddock.config import TrainConfig, build
from paddock.config_parts import ValidationPart
from paddock.data import Row, read_rows, write_records
from paddock.dataset import load_rows
from paddock.errors import ConfigError, ModelError, OutputError, ResourceError
from paddock.trainer import _Refusal, train


def _checkpoint(run: Path, step: int) -> None:
    checkpoint.write(run, step, config={}, inputs={}, save_adapter=lambda _: None, state={}, metrics={})


def _scored(run: Path, step: int, score: float) -> None:
    file = Path(checkpoint.score_file(run, step))
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"step": step, "score": score}))


def test_the_best_by_score_and_what_waits_for_one_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        _checkpoint(tmp_path, step)
    for step, score in ((1, 20.0), (2, 50.0), (3, 50.0)):
        _scored(tmp_path, step, score)
    assert checkpoint.best(tmp_path, "score") == 2
    checkpoint.prune(tmp_path, 1, best_by="score", scored=True)
    assert checkpoint.steps(tmp_path) == [2, 4, 5]  # 4 may still be better
    _scored(tmp_path, 4, 10.0)
    checkpoint.prune(tmp_path, 1, best_by="score", scored=True)
    assert checkpoint.steps(tmp_path) == [2, 5]
    assert checkpoint.scores(tmp_path) == {2: 50.0}
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.best(tmp_path, "score") is None


def test_what_cannot_be_scored_is_refused_before_anything_starts(train_tree: dict[str, Any], ray_cluster: Any) -> None:
    dev = [Row(input="a", target="b", task_dataset="CMeEE-V2", sample_id="1")]

    def refuses(match: str, rows: list[Row] = dev, **keys: Any) -> None:
        train_tree["train"] |= {"predict_with_generate": True, **keys}
        with pytest.raises(ConfigError, match=match):
            validation.check(build(TrainConfig, train_tree), rows)

    refuses("score needs train.predict_with_generate", keep_best="score", predict_with_generate=False)
    refuses("needs dev rows", [])
    refuses("two dev rows have the sample_id '1'", dev * 2)
    train_tree["data"]["format"] = "alpaca"
    refuses("only the benchmark's rows can be scored")
    train_tree["data"]["format"] = "promptcblue"
    train_tree["validation"] = {"resources": {"CPU": 64}}
    with pytest.raises(ResourceError, match="64 CPU"):
        train(build(TrainConfig, train_tree))


def test_a_refusal_ends_the_scoring_too(ray_cluster: Any) -> None:
    with pytest.raises(ModelError, match="no number"):
        _Refusal("a-flag").after_exception(None, {0: ModelError("no number")})
    assert cluster.Watch("a-flag").stops()


def test_a_score_counts_only_for_what_it_was_taken_with(
    train_tree: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OutputError("asked again")

    config = build(TrainConfig, train_tree | {"train": train_tree["train"] | {"predict_with_generate": True}})
    run = Path(config.output_dir)
    _checkpoint(run, 2)
    _scored(run, 2, 7.0)
    said = {"step": 2, "score": 7.0, "key": validation.key(config, load_rows(config).dev)}
    Path(checkpoint.score_file(run, 2)).write_text(json.dumps(said))
    monkeypatch.setattr("paddock.sweep.score_adapter", refuse)
    monkeypatch.setattr(validation.cluster, "has_gpus", lambda: False)
    assert validation.score(config, 2) == said
    other = config.model_copy(update={"validation": ValidationPart(engine={"max_model_len": 99})})
    with pytest.raises(OutputError, match="asked again"):
        validation.score(other, 2)
    # One that cannot be scored holds nobody up.
    validation.score_missing(other)
    assert "warning: asked again; it has no score" in capsys.readouterr().out


@pytest.mark.slow
def test_checkpoints_are_scored_beside_the_training(
    train_tree: dict[str, Any], ray_cluster: Any, assets: Path, tmp_path: Path
) -> None:
    rows = read_rows(assets / "data" / "dev.json")[:4]
    write_records(tmp_path / "dev.json", [row.as_record() for row in rows])
    train_tree["data"]["dev"] = str(tmp_path / "dev.json")
    train_tree["lora"] = {"r": 2}
    train_tree["scaling"]["num_workers"] = 1
    train_tree["train"] |= {"predict_with_generate": True, "keep_best": "score", "save_total_limit": 1}
    train_tree["validation"] = {
        "engine": {"max_model_len": 512},
        "sampling": {"max_tokens": 16},
        "resources": {"CPU": 0.5},
    }
    config = build(TrainConfig, train_tree)
    run = Path(config.output_dir)
    train(config)
    best = checkpoint.best(run, "score")
    assert checkpoint.steps(run) == sorted({best, 4})
    for step in (2, 4):
        said = json.loads((run / "scores" / f"checkpoint-{step}.json").read_text())
        assert said["step"] == step
        assert 0 <= said["interval"]["low"] <= said["score"] <= said["interval"]["high"] <= 100
        assert said["score_by_task"].keys() == {row.task_dataset for row in rows}
        (answered,) = (run / "scores").glob(f"checkpoint-{step}-*/test_predictions.json")
        answers = read_rows(answered)
        assert [row.sample_id for row in answers] == [row.sample_id for row in rows]
    # One that has none is scored by the same command.
    (run / "scores" / "checkpoint-4.json").unlink()
    train(config)
    assert checkpoint.scores(run).keys() == {best, 4}
