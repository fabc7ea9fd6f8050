"""`python -m jobs.merge` and `python -m jobs.convert`, from the command line's words to the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import jobs
import jobs.convert
import jobs.merge
from paddock import manifest
from paddock.config import ConvertConfig, MergeConfig

RUN: dict[str, Callable[[], None]] = {
    "convert": lambda: jobs.run(ConvertConfig, jobs.convert.main),
    "merge": lambda: jobs.run(MergeConfig, jobs.merge.main, plan=jobs.merge.plan),
}


def exit_code(monkeypatch: pytest.MonkeyPatch, job: str, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [job, *words])
    with pytest.raises(SystemExit) as left:
        RUN[job]()
    assert isinstance(left.value.code, int)
    return left.value.code


def test_convert_plan_merge(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, merged = tmp_path / "hf", tmp_path / "merged"
    assert exit_code(monkeypatch, "convert", f"input_dir={assets}/base_meta", f"output_dir={hf}") == 0
    words = [f"base_model={hf}", f"lora_model={assets}/adapters/zh-llama", f"output_dir={merged}"]
    assert exit_code(monkeypatch, "merge", "plan", *words) == 0
    assert "model.layers.3.mlp.down_proj.weight" in capsys.readouterr().out
    assert not merged.exists()
    assert exit_code(monkeypatch, "merge", *words) == 0
    assert manifest.verify(merged).extra["merged_vs_adapter"]["top1_agreement"] == 1


def test_mistake_is_one_line_and_exit_code_2(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"base_model={assets}/data", f"output_dir={tmp_path}/out"]
    assert exit_code(monkeypatch, "merge", *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no config.json" in error
    assert exit_code(monkeypatch, "convert", f"input_dir={assets}/data", f"output_dir={tmp_path}/out") == 2
    assert "no consolidated" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
