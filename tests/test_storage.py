"""What is at a URI is read and written like what is local. `file://` goes the way of every other scheme."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pyarrow import fs

from paddock import checkpoint, lora, manifest, predict, storage
from paddock.config import ConvertConfig, MergeConfig, ModelConfig, PredictConfig, ScoreConfig, build
from paddock.convert import convert
from paddock.data import read_rows
from paddock.engine import check_model
from paddock.errors import OutputError, PaddockError, StorageError
from paddock.evaluation import score_files
from paddock.ledger import Ledger, Prediction
from paddock.merge import merge

# Spaces and Chinese need quoting in a URI, and get it.
STORE = "the store 库"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PADDOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The directory that the tests' URIs lie in."""
    return tmp_path / STORE


@pytest.fixture
def uri(store: Path) -> str:
    return f"file://{store}"


def _stage(location: str, text: str = "hello", **changes: object) -> bool:
    """Write a stage; returns whether there was anything to do."""
    settings: dict[str, Any] = {"kind": "model", "config": {"seed": 1}, "inputs": {}, **changes}
    with manifest.stage(location, **settings) as work:
        if work.finished:
            return False
        (work.directory / "sub").mkdir()
        (work.directory / "sub" / "a.txt").write_text(text)
        (work.directory / "rows.json.gz").write_text("stays as it is")
    return True


def _tree(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def test_a_stage_goes_to_a_uri_and_comes_back(store: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _stage(f"{uri}/m/")
    assert _tree(store / "m").keys() == {"manifest.json", "sub/a.txt", "rows.json.gz"}
    assert manifest.verify(f"{uri}/m") == manifest.verify(store / "m")
    assert manifest.fingerprint(f"{uri}/m") == manifest.fingerprint(store / "m")
    copy = storage.fetch(f"{uri}/m")
    assert copy.name == "m"
    assert _tree(copy) == _tree(store / "m")
    assert manifest.main(["verify", f"{uri}/m"]) == 0
    assert not _stage(f"{uri}/m")
    assert f"{uri}/m: already made with this configuration" in capsys.readouterr().out
    with pytest.raises(OutputError, match="seed was 1 and is now 2"):
        _stage(f"{uri}/m", config={"seed": 2})


def test_what_was_there_before_is_gone_after_overwriting(store: Path, uri: str) -> None:
    _stage(f"{uri}/m")
    (store / "m" / "stale").write_text("x")
    assert _stage(f"{uri}/m", "other", overwrite=True)
    assert _tree(store / "m").keys() == {"manifest.json", "sub/a.txt", "rows.json.gz"}
    assert (store / "m" / "sub" / "a.txt").read_text() == "other"


@pytest.mark.parametrize("overwritten", [False, True])
def test_an_upload_that_was_cut_short_does_not_exist(
    store: Path, uri: str, overwritten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwritten:
        _stage(f"{uri}/m", "before")
    put = storage._put

    def die(filesystem: Any, source: Path, path: str) -> None:
        if path.endswith("/a.txt"):
            raise KeyboardInterrupt
        put(filesystem, source, path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_put", die)
        with pytest.raises(KeyboardInterrupt):
            _stage(f"{uri}/m", overwrite=overwritten)
    assert (store / "m" / "rows.json.gz").is_file()
    assert manifest.read(f"{uri}/m") is None
    for use in (storage.fetch, manifest.fingerprint, manifest.check):
        with pytest.raises(OutputError, match="did not finish; make it again"):
            use(f"{uri}/m")
    assert _stage(f"{uri}/m")
    assert manifest.verify(f"{uri}/m")
    assert not list(store.rglob(".*"))


def test_foreign_files_at_a_uri_are_not_overwritten(store: Path, uri: str) -> None:
    (store / "m").mkdir(parents=True)
    (store / "m" / "mine").write_text("x")
    with pytest.raises(OutputError, match="not a finished output"):
        _stage(f"{uri}/m")
    assert _tree(store / "m") == {"mine": b"x"}


def test_damage_is_noticed(store: Path, uri: str, cache: Path) -> None:
    _stage(f"{uri}/m")
    (store / "m" / "sub" / "a.txt").write_text("hellO")
    for use in (storage.fetch, manifest.verify):
        with pytest.raises(OutputError, match=rf"{uri}/m/sub/a\.txt: sha256"):
            use(f"{uri}/m")
    assert not [f for f in cache.rglob("*") if f.name != ".lock" and f.is_file()]
    (store / "m" / "sub" / "a.txt").unlink()
    for use in (storage.fetch, manifest.check):
        with pytest.raises(OutputError, match=rf"{uri}/m/sub/a\.txt: is missing"):
            use(f"{uri}/m")
    (store / "m" / "manifest.json").write_text("{}")
    for use in (storage.fetch, manifest.check):
        with pytest.raises(OutputError, match="not a manifest"):
            use(f"{uri}/m")


def test_a_copy_is_made_once_for_each_state(store: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    get = storage._get
    monkeypatch.setattr(storage, "_get", lambda f, path, target: (copied.append(path), get(f, path, target))[1])
    _stage(f"{uri}/ours")
    (store / "foreign").mkdir()
    (store / "foreign" / "f").write_text("1")
    for name, change in (("ours", lambda: _stage(f"{uri}/ours", "HELLO", overwrite=True)), ("foreign/f", None)):
        first = storage.fetch(f"{uri}/{name}")
        copied.clear()
        assert storage.fetch(f"{uri}/{name}") == first
        assert copied == []
        change() if change else (store / name).write_text("22")
        second = storage.fetch(f"{uri}/{name}")
        assert copied
        # Who reads the first one may go on.
        assert first.exists()
        assert first != second
    assert storage.fetch(f"{uri}/foreign", only=["other"]).is_dir()
    assert manifest.fingerprint(f"{uri}/foreign") == manifest.fingerprint(store / "foreign")


def test_a_local_path_is_itself(tmp_path: Path, cache: Path) -> None:
    assert storage.fetch(tmp_path / "x") == storage.workplace(str(tmp_path / "x")) == tmp_path / "x"
    assert storage.join(str(tmp_path), "a", "b") == tmp_path / "a" / "b"
    assert storage.join("s3://b/x/", "a", "b") == "s3://b/x/a/b"
    assert storage.parent("s3://b/x/") == "s3://b"
    assert not cache.exists()


@pytest.mark.parametrize("location", ["foo://b/x", "file:///not/there/x", "s3://b/x?region=y", "hdfs://nowhere:1/x"])
def test_what_cannot_be_read_is_told_in_one_line(location: str) -> None:
    for use in (storage.fetch, read_rows, manifest.fingerprint):
        with pytest.raises(StorageError) as told:
            use(location)
        assert str(told.value).startswith(f"{location}")
        assert "\n" not in str(told.value)


def test_what_cannot_be_written_is_told_in_one_line(store: Path, uri: str, tmp_path: Path) -> None:
    store.write_text("a file where the directory should be")
    for location in (f"{uri}/m", "foo://b/m"):
        with pytest.raises(StorageError) as told:
            _stage(location)
        assert "\n" not in str(told.value)
        assert str(told.value).startswith(location)


def test_removed_is_a_directory_without_its_manifest_first(
    store: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stage(f"{uri}/m")

    class Dying(fs.LocalFileSystem):  # type: ignore[misc]
        def delete_dir(self, path: str) -> None:
            raise KeyboardInterrupt

    @contextmanager
    def opened(location: str) -> Iterator[tuple[Any, str]]:
        yield Dying(), location.removeprefix("file://")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_opened", opened)
        with pytest.raises(KeyboardInterrupt):
            storage.remove(f"{uri}/m")
    assert (store / "m" / "sub" / "a.txt").is_file()
    assert manifest.read(f"{uri}/m") is None
    storage.remove(f"{uri}/m")
    storage.remove(f"{uri}/m")
    assert not (store / "m").exists()


def _write(run: str, step: int) -> None:
    place = checkpoint.write(
        run,
        step,
        config={"seed": 1},
        inputs={},
        save_adapter=lambda directory: (directory / "adapter_model.safetensors").write_bytes(bytes([step])),
        state={"step": step},
        metrics={},
    )
    publisher = checkpoint.Publisher(run, None)
    publisher.publish(place, before=lambda: None)
    publisher.close()
    assert not place.exists()


def test_the_last_good_checkpoint_of_a_run_at_a_uri(store: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"{uri}/run"
    assert checkpoint.find_last(run, {"seed": 1}, {}) is None
    for step in (1, 2, 10):
        _write(run, step)
    (store / "run" / "checkpoint-11").mkdir()
    assert checkpoint.steps(run) == [1, 2, 10]
    found = checkpoint.find_last(run, {"seed": 1}, {})
    assert found is not None
    assert found.name == "checkpoint-10"
    assert checkpoint.read_state(found) == {"step": 10}
    (store / "run" / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"\xff")
    found = checkpoint.find_last(run, {"seed": 1}, {})
    assert found is not None
    assert found.name == "checkpoint-2"
    assert "trying the checkpoint before it" in capsys.readouterr().out
    checkpoint.prune(run, 2)
    assert checkpoint.steps(run) == [2, 10]
    checkpoint.prune(run, 0)
    assert checkpoint.steps(run) == []


def test_a_ledger_at_a_uri_goes_on_where_it_was(store: Path, uri: str, cache: Path) -> None:
    def row(index: int) -> Prediction:
        return Prediction(index, f"id-{index}", "x", "stop", 3, 4, 0.5, None)

    Ledger(f"{uri}/p", {"model": "m"}).append([row(2), row(0)])
    assert (store / "p" / "shards" / "000000.parquet").is_file()
    # On another machine, whose cache is empty.
    storage.remove(cache)
    again = Ledger(f"{uri}/p", {"model": "m"})
    assert again.pending(4) == [1, 3]
    again.append([row(1), row(3)])
    again.write_quarantine()
    manifest.commit(again.directory, "predictions", {}, {})
    again.publish()
    assert _tree(store / "p") == _tree(again.directory)
    assert manifest.verify(f"{uri}/p").files.keys() == {
        "ledger.json",
        "quarantine.jsonl",
        "shards/000000.parquet",
        "shards/000001.parquet",
    }
    with pytest.raises(OutputError, match=f"{uri}/p: holds predictions of another model"):
        Ledger(f"{uri}/p", {"model": "n"})


@pytest.fixture
def remote(assets: Path, store: Path, uri: str) -> str:
    """The assets, behind a URI."""
    store.symlink_to(assets)
    return uri


def test_rows_are_read_and_scored(remote: str, assets: Path, tmp_path: Path) -> None:
    assert read_rows(f"{remote}/data/test.json") == read_rows(assets / "data" / "test.json")
    out = f"file://{tmp_path}/scores"
    test = f"{remote}/data/test.json"
    record = score_files(build(ScoreConfig, {"predictions": test, "gold": test, "output_dir": out}))
    assert record == json.loads((tmp_path / "scores" / "scores.json").read_text(encoding="utf-8"))
    with pytest.raises(PaddockError, match=rf"{remote}/base/config\.json:1: "):
        read_rows(f"{remote}/base/config.json")


def test_a_model_is_merged_and_converted_from_uri_to_uri(remote: str, assets: Path, tmp_path: Path) -> None:
    def merged(root: str, place: str) -> str | Path:
        adapters = tuple(f"{root}/adapters/{name}" for name in ("zh-llama", "zh-alpaca"))
        return merge(MergeConfig(base_model=f"{root}/base", lora_model=adapters, output_dir=place, num_workers=2))

    out = f"file://{tmp_path}/out"
    assert merged(remote, f"{out}/merged") == f"{out}/merged"
    local = merged(str(assets), str(tmp_path / "local"))
    assert manifest.read(f"{out}/merged") == manifest.read(local)
    check_model(f"{out}/merged")
    lora.check_base(f"{out}/merged")
    model = ModelConfig(path=f"{out}/merged")
    assert lora.load_base(model).config.vocab_size == len(lora.load_tokenizer(model.path))
    there = convert(ConvertConfig(input_dir=f"{out}/merged", output_dir=f"{out}/meta", output_type="pth"))
    back = convert(ConvertConfig(input_dir=str(there), output_dir=f"{out}/back"))
    shards = (storage.fetch(f"{place}/model.safetensors").read_bytes() for place in (back, f"{out}/merged"))
    assert next(shards) == next(shards)


def test_predictions_are_finished_at_a_uri(
    remote: str, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"file://{tmp_path}/out"
    tree = {"output_dir": out, "data": {"test": f"{remote}/data/test.json"}, "model": {"path": f"file://{base_model}"}}
    config = build(PredictConfig, tree)
    rows = predict.read_test(config)
    # A run that was cut short when every row was answered needs no service to go on.
    Ledger(out, predict.ledger_key(config, rows)).append(
        [Prediction(i, row.sample_id, "x", "stop", 3, 4, 0.5, None) for i, row in enumerate(rows)]
    )
    assert predict.predict(config) == out
    assert manifest.verify(out).extra == {"rows": len(rows), "predicted": len(rows), "quarantined": 0}
    assert len(read_rows(f"{out}/test_predictions.json")) == len(rows)
    assert (tmp_path / "out" / "submission.zip").is_file()
    assert predict.predict(config) == out
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_at_a_uri(remote: str, base_model: Path, job: Any, tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "run"
    words = (
        f"model.path=file://{base_model} data.train={remote}/data/train.json data.dev={remote}/data/dev.json lora.r=2"
    )
    words += " train.max_steps=2 train.save_steps=1 train.eval_steps=2 train.logging_steps=1 scaling.num_workers=1"
    words += f" train.max_seq_length=512 output_dir=file://{run}"

    def train() -> bytes:
        done = job(
            "jobs.train", *words.replace(STORE, quote(STORE)).split(), PADDOCK_CACHE=str(cache), RAY_ADDRESS="local"
        )
        assert f"trained: file://{run}/checkpoint-2" in done.stdout, done.stderr
        return (run / "checkpoint-2" / "adapter_model.safetensors").read_bytes()

    weights = train()
    # It loses its last checkpoint, and goes on to the same end on a machine that has nothing of it.
    storage.remove(f"file://{run}/checkpoint-2")
    storage.remove(cache)
    assert train() == weights
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert (run / "ray_train").is_dir()
