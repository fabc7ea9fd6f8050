"""All checkpoints of a run on one base: scored, compared, and the best merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paddock import lora, manifest, storage, unmerged
from paddock.config import LoraPart, ModelConfig, PredictConfig, build
from paddock.data import Row, read_rows, write_records
from paddock.errors import ConfigError, DataError, ModelError, OutputError
from paddock.ledger import Ledger, Prediction, read_shards
from paddock.predict import ledger_key, predict, read_test
from paddock.sweep import expand, sweep

TASKS = ("KUAKE-IR", "CHIP-CDN", "MedDG")
FILES_OF_A_SWEEP = {"sweep-key.json", "sweep.json", "report.html", manifest.NAME}


def make_adapter(base: Path, directory: Path, seed: int, **part: Any) -> Path:
    """A small adapter that changes what the model says."""
    torch.manual_seed(seed)
    model = lora.attach(lora.load_base(ModelConfig(path=str(base), dtype="float32")), LoraPart(r=4, **part))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    lora.save(model, directory, base)
    return directory


@pytest.fixture(scope="module")
def run(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run's checkpoints; the last one cannot be served unmerged."""
    run = tmp_path_factory.mktemp("run")
    make_adapter(base_model, run / "checkpoint-2", 1)
    make_adapter(base_model, run / "checkpoint-10", 2)
    make_adapter(base_model, run / "whole-30", 3, modules_to_save=("lm_head",))
    return run


@pytest.fixture(scope="module")
def dev(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    rows = read_rows(assets / "data" / "dev.json")
    return [row for name in TASKS for row in [r for r in rows if r.task_dataset == name][:4]]


@pytest.fixture
def tree(base_model: Path, dev: list[Row], tmp_path: Path) -> dict[str, Any]:
    write_records(tmp_path / "dev.json", [row.as_record() for row in dev])
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(base_model), "dtype": "float32"},
        "data": {"dev": str(tmp_path / "dev.json")},
        "predict": {"sampling": {"max_tokens": 8}},
        "serve": {"engine": {"max_model_len": 512}, "ray_actor_options": {"num_cpus": 0.5}},
    }


def _config(tree: dict[str, Any], **more: Any) -> PredictConfig:
    return build(PredictConfig, {**tree, **more})


def test_a_sweep(ray_cluster: Any, tree: dict[str, Any], run: Path, tmp_path: Path, capsys: Any) -> None:
    config = _config(tree, adapters=f"{run}/checkpoint-*", merge_best=str(tmp_path / "best"))
    record = sweep(config)
    output = Path(config.output_dir)
    assert [point["name"] for point in record["curve"]] == ["checkpoint-2", "checkpoint-10"]
    assert record["best"] == max(record["curve"], key=lambda p: p["value"])["name"]
    assert record["interval"]["low"] <= record["score"] <= record["interval"]["high"]
    texts = {}
    for name in ("checkpoint-2", "checkpoint-10"):
        scores = json.loads((output / name / "scores" / "scores.json").read_text(encoding="utf-8"))
        assert scores["score"] in [point["value"] for point in record["curve"]]
        assert manifest.verify(output / name).inputs["adapter"] == manifest.fingerprint(run / name)
        texts[name] = [p.text for _, p in sorted(read_shards(output / name / "shards").items())]
    assert texts["checkpoint-2"] != texts["checkpoint-10"]
    assert manifest.verify(output).kind == "sweep"
    assert "checkpoint-10" in (output / "report.html").read_text(encoding="utf-8")
    assert manifest.verify(tmp_path / "best").kind == "model"

    # Again: nothing is asked. Another sampling: refused.
    made = (output / "checkpoint-2" / manifest.NAME).stat().st_mtime_ns
    assert sweep(config) == record
    assert (output / "checkpoint-2" / manifest.NAME).stat().st_mtime_ns == made
    with pytest.raises(OutputError, match="sweep of another sampling"):
        sweep(_config({**tree, "predict": {"sampling": {"max_tokens": 9}}}, adapters=f"{run}/checkpoint-*"))


def test_a_sweep_from_uris_to_a_uri(
    tree: dict[str, Any], run: Path, dev: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its rows are answered without an engine; the second adapter is the better one, and has to be merged."""
    monkeypatch.setenv("PADDOCK_CACHE", str(tmp_path / "cache"))
    uri, asked = f"file://{tmp_path}/out", list[str]()

    def answer(config: PredictConfig, make_client: Any = None) -> str | Path:
        assert config.model is not None
        asked.append(config.model.path)
        storage.fetch(config.model.path)  # as a replica does, wherever it is
        texts = ["x" if config.adapter else row.target for row in dev]
        rows = enumerate(zip(dev, texts, strict=True))
        Ledger(config.output_dir, ledger_key(config, read_test(config))).append(
            [Prediction(i, row.sample_id, text, "stop", 3, 4, 0.5, None) for i, (row, text) in rows]
        )
        return predict(config, make_client)

    monkeypatch.setattr("paddock.sweep.predict", answer)
    tree |= {"output_dir": f"{uri}/sweep/", "model": {"path": f"file://{tree['model']['path']}"}}
    names = ("checkpoint-2", "whole-30")
    config = _config(tree, adapters=",".join(f"file://{run}/{n}" for n in names), merge_best=f"{uri}/best")
    record = sweep(config)
    assert asked == [tree["model"]["path"], f"{uri}/sweep/.merged-whole-30"]
    assert record["best_adapter"] == f"file://{run}/whole-30"
    place = tmp_path / "out" / "sweep"
    assert {path.name for path in place.iterdir()} == {*names, *FILES_OF_A_SWEEP}
    assert manifest.verify(f"{uri}/sweep").files.keys() == FILES_OF_A_SWEEP - {manifest.NAME}
    assert json.loads((place / "sweep.json").read_text(encoding="utf-8")) == record
    assert "whole-30" in (place / "report.html").read_text(encoding="utf-8")
    assert manifest.verify(f"{uri}/best").kind == "model"

    # Elsewhere, where nothing is in the cache, nothing is asked again; and what was lost is.
    storage.remove(tmp_path / "cache")
    assert sweep(config) == record
    storage.remove(f"{uri}/sweep/checkpoint-2")
    storage.remove(f"{uri}/sweep/{manifest.NAME}")
    assert sweep(config) == record
    assert asked[2:] == [tree["model"]["path"]]
    with pytest.raises(OutputError, match="sweep of another sampling"):
        sweep(_config({**tree, "predict": {"sampling": {"max_tokens": 9}}}, adapters=f"file://{run}/checkpoint-2"))
    foreign = _config({**tree, "output_dir": f"{uri}/best"}, adapters=f"file://{run}/checkpoint-2")
    with pytest.raises(OutputError, match=r"holds files but no sweep-key\.json"):
        sweep(foreign)


@pytest.mark.slow
def test_merged_for_the_time_and_adapters_by_task(
    ray_cluster: Any, tree: dict[str, Any], run: Path, dev: list[Row], capsys: Any
) -> None:
    """An adapter says the same unmerged, merged, and as one of several, each for its task."""
    record = sweep(_config(tree, adapters=f"{run}/whole-30,{run}/checkpoint-2"))
    assert [bool(point["merged_because"]) for point in record["curve"]] == [True, False]
    assert "it trains lm_head whole; merged for the time" in capsys.readouterr().out
    output = Path(tree["output_dir"])
    assert not list(output.glob(".merged*"))

    alone = read_shards(output / "checkpoint-2" / "shards")
    data = {"test": tree["data"]["dev"]}
    by_task = {"KUAKE-IR": str(run / "checkpoint-2"), "MedDG": str(run / "checkpoint-10")}
    mixed = read_shards(
        Path(predict(_config(tree, data=data, adapter_by_task=by_task, output_dir=f"{output}-mixed"))) / "shards"
    )
    base = read_shards(Path(predict(_config(tree, data=data, output_dir=f"{output}-base"))) / "shards")
    for index, row in enumerate(dev):
        if row.task_dataset == "KUAKE-IR":
            assert mixed[index].text == alone[index].text
        elif row.task_dataset == "CHIP-CDN":
            assert mixed[index].text == base[index].text
    changed = [i for i, row in enumerate(dev) if row.task_dataset == "MedDG" and mixed[i].text != base[i].text]
    assert changed


def test_names_and_order(run: Path) -> None:
    assert list(expand((f"{run}/checkpoint-*",))) == ["checkpoint-2", "checkpoint-10"]
    assert expand((str(run / "whole-30"),)) == {"whole-30": str(run / "whole-30")}
    with pytest.raises(ConfigError, match="fits no directory"):
        expand((f"{run}/nothing-*",))


def test_what_can_be_served_unmerged(run: Path, base_model: Path, tmp_path: Path, copy_of: Any) -> None:
    assert unmerged.why_not(run / "checkpoint-2", base_model) is None
    assert unmerged.why_not(run / "whole-30", base_model) == "it trains lm_head whole"
    dora = make_adapter(base_model, tmp_path / "dora", 4, use_dora=True)
    assert unmerged.why_not(dora, base_model) == "it is a DoRA adapter"
    ranks = make_adapter(base_model, tmp_path / "ranks", 4, rank_pattern={"q_proj": 2})
    assert unmerged.why_not(ranks, base_model) == "its layers have ranks of their own"
    assert unmerged.engine_args([run / "checkpoint-2"])["max_lora_rank"] == 8
    assert unmerged.engine_args([run / "checkpoint-2"])["max_loras"] == 2
    assert unmerged.engine_args([]) == {}


def test_an_adapter_whose_vocabulary_grew_is_told_with_both_sizes(assets: Path) -> None:
    reason = unmerged.why_not(assets / "adapters" / "zh-llama", assets / "base")
    assert reason is not None


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"adapter": "{run}/whole-30", "data": {"test": "{dev}"}}, ModelError, "cannot be served unmerged: it trains"),
        ({"adapters": "{run}/none-*"}, ConfigError, "fits no directory"),
        ({"adapters": "{run}/checkpoint-2", "data": {}}, ConfigError, "data.dev: is required"),
        ({"adapters": "{run}/checkpoint-2", "target_url": "http://x"}, ConfigError, "leave target_url"),
        (
            {"adapters": "{run}/checkpoint-2", "data": {"dev": "{unanswered}"}},
            DataError,
            r"unanswered.json:1: the target",
        ),
    ],
)
def test_refusals_come_before_anything_starts(
    tree: dict[str, Any], run: Path, dev: list[Row], tmp_path: Path, more: Any, error: type[Exception], says: str
) -> None:
    write_records(tmp_path / "unanswered.json", [row.as_record("") for row in dev])
    text = json.dumps(more).replace("{run}", str(run)).replace("{dev}", tree["data"]["dev"])
    config = _config(tree, **json.loads(text.replace("{unanswered}", str(tmp_path / "unanswered.json"))))
    with pytest.raises(error, match=says):
        (sweep if config.adapters else predict)(config)
    assert not Path(config.output_dir).exists()
