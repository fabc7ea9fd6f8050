"""The same rows by handle, over HTTP and by an engine of the run's own: the same texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddock import clients
from paddock.clients import Endpoint, find_endpoint
from paddock.config import PredictConfig, build
from paddock.data import Row, read_rows, write_records
from paddock.errors import ConfigError, ServiceError
from paddock.ledger import read_shards
from paddock.predict import predict
from paddock.scoring import parse_predictions


@pytest.fixture(scope="module")
def rows(assets: Path) -> list[Row]:
    return read_rows(assets / "data" / "test.json")[:16]


@pytest.fixture
def tree(rows: list[Row], base_model: Path, tmp_path: Path) -> dict[str, Any]:
    write_records(tmp_path / "test.json", [row.as_record() for row in rows])
    return {
        "output_dir": str(tmp_path / "out"),
        "data": {"test": str(tmp_path / "test.json")},
        "predict": {"sampling": {"max_tokens": 8}},
    }


def _texts(tree: dict[str, Any], **more: Any) -> list[str]:
    output = Path(predict(build(PredictConfig, {**tree, **more})))
    lines = (output / "test_predictions.json").read_text(encoding="utf-8").splitlines()
    return [str(json.loads(line)["target"]) for line in lines]


@pytest.fixture
def by_handle(service: Any, tree: dict[str, Any], base_model: Path, tmp_path: Path) -> list[str]:
    return _texts(tree, model={"path": str(base_model), "dtype": "float32"}, output_dir=str(tmp_path / "handle"))


def test_over_http_the_texts_are_the_same(
    service: Any, tree: dict[str, Any], by_handle: list[str], tmp_path: Path
) -> None:
    """No model directory is needed. Chat is one of the endpoints because the service renders it as a row."""
    for number, path in enumerate(("", "/v1/chat/completions", "/generate")):
        output = str(tmp_path / str(number))
        assert _texts(tree, target_url=f"{service.url}{path}", output_dir=output) == by_handle, path
    kept = read_shards(tmp_path / "0" / "shards")
    assert all(p.prompt_tokens > 5 and p.completion_tokens > 0 and p.finish_reason for p in kept.values())


@pytest.mark.slow
def test_an_engine_of_its_own_says_the_same(
    ray_cluster: Any, tree: dict[str, Any], by_handle: list[str], base_model: Path
) -> None:
    serve = {"engine": {"max_model_len": 512}, "ray_actor_options": {"num_cpus": 0.5}}
    model = {"path": str(base_model), "dtype": "float32"}
    assert _texts(tree, engine="local", model=model, serve=serve) == by_handle


def test_other_formats_are_predicted_too(
    service: Any, tree: dict[str, Any], rows: list[Row], by_handle: list[str], base_model: Path, tmp_path: Path
) -> None:
    model = {"path": str(base_model), "dtype": "float32"}
    for name, record in (
        ("messages", lambda row: {"messages": [{"role": "user", "content": row.input}]}),
        ("alpaca", lambda row: {"instruction": "", "input": row.input}),
    ):
        write_records(tmp_path / f"{name}.json", [record(row) for row in rows])
        data = {"test": str(tmp_path / f"{name}.json"), "format": name}
        assert _texts(tree, model=model, data=data, output_dir=str(tmp_path / name)) == by_handle


def test_structured_choices_keep_labels_in_their_list(
    service: Any, tree: dict[str, Any], assets: Path, base_model: Path, tmp_path: Path
) -> None:
    labels = [r for r in read_rows(assets / "data" / "test.json") if r.task_dataset in ("KUAKE-IR", "IMCS-V2-DAC")]
    others = [r for r in read_rows(assets / "data" / "test.json") if r.task_dataset == "MedDG"][:2]
    write_records(tmp_path / "labels.json", [row.as_record() for row in [*labels, *others]])
    options = {"structured_choices": True, "max_tokens_by_task": {"MedDG": 3}, "sampling": {"max_tokens": 24}}
    said = _texts(
        tree, model={"path": str(base_model), "dtype": "float32"}, data={"test": str(tmp_path / "labels.json")},
        predict=options,
    )  # fmt: skip
    for row, text in zip(labels, said, strict=False):
        assert row.answer_choices is not None
        assert text in row.answer_choices
    parsed = parse_predictions([Row(r.input, t, r.answer_choices, "", r.task_dataset, r.sample_id)
                                for r, t in zip([*labels, *others], said, strict=True)], "v1")  # fmt: skip
    assert sum(health.out_of_list for health in parsed.health.values()) == 0
    kept = read_shards(Path(tree["output_dir"]) / "shards")
    assert [kept[len(labels) + i].completion_tokens for i in range(2)] == [3, 3]
    config = json.loads((Path(tree["output_dir"]) / "manifest.json").read_text(encoding="utf-8"))["config"]
    assert config["predict"]["structured_choices"] is True
    assert config["predict"]["max_tokens_by_task"] == {"MedDG": 3}


@pytest.mark.parametrize(
    ("url", "kind", "path"),
    [("", "completions", "/v1/completions"), ("/v1", "completions", "/v1/completions"),
     ("/v1/completions/", "completions", "/v1/completions"), ("/generate", "generate", "/generate"),
     ("/v1/chat/completions", "chat", "/v1/chat/completions")],
)  # fmt: skip
def test_what_a_url_names(service: Any, url: str, kind: str, path: str) -> None:
    found = find_endpoint(service.url + url)
    assert (found.kind, found.url) == (kind, service.url + path)


def test_a_host_without_v1_is_asked_for_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_get", lambda url: (404, "not found"))
    assert find_endpoint("http://host:1").url == "http://host:1/generate"


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("127.0.0.1:8000", ConfigError, "is no URL"),
        ("http://127.0.0.1:9", ServiceError, "nobody answers"),
    ],
)
def test_a_url_where_nobody_is(tree: dict[str, Any], url: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        predict(build(PredictConfig, {**tree, "target_url": url}))
    assert not Path(tree["output_dir"]).exists()


def test_a_model_that_is_not_served_is_named(service: Any) -> None:
    with pytest.raises(ServiceError, match="no 'other'"):
        find_endpoint(service.url, "other")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, ValueError), (422, ValueError), (401, ServiceError), (404, ServiceError), (429, clients.BusyError),
     (503, clients.BusyError), (500, RuntimeError)],
)  # fmt: skip
def test_what_a_status_means(status: int, kind: type[Exception]) -> None:
    error = clients._refusal(Endpoint("http://x/v1/completions", "completions", "m"), status, '{"error": "why"}')
    assert type(error) is kind
    assert "why" in str(error)
