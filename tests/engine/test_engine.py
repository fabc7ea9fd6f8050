"""What can be checked without starting vLLM; tests/deployments/test_llm.py starts it once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paddock import engine
from paddock.config import SamplingPart
from paddock.errors import ConfigError, ModelError, OutputError


def test_a_misspelt_engine_argument_is_answered_with_the_nearest() -> None:
    engine.check_engine_args({"max_model_len": 512, "gpu_memory_utilization": 0.5, "dtype": "float32"})
    with pytest.raises(ConfigError, match=r"serve\.engine\.max_model_length: .*did you mean 'max_model_len'"):
        engine.check_engine_args({"max_model_length": 512})


@pytest.mark.parametrize("key", ["model", "tokenizer", "served_model_name"])
def test_an_engine_argument_with_a_key_of_its_own_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"serve\.engine\.{key}: is set by the key"):
        engine.check_engine_args({key: "x"})


def test_the_presets_are_greedy_and_the_reference_endpoints_defaults() -> None:
    assert engine.sampling_params(SamplingPart()) == {"temperature": 0.0, "max_tokens": 512}
    assert engine.sampling_params(SamplingPart(preset="reference")) == {
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": 512,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.2,
        "temperature": 1e-6,
    }


def test_overrides_win_over_the_preset_and_pass_through_to_vllm() -> None:
    part = SamplingPart.model_validate({"max_tokens": 32, "stop": ["x"], "seed": 7})
    assert engine.sampling_params(part) == {"temperature": 0.0, "max_tokens": 32, "stop": ["x"], "seed": 7}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_token", 3, "did you mean 'max_tokens'"),
        ("n", 2, "no such sampling parameter"),
        ("temperature", -1, "non-negative"),
        ("max_tokens", "many", "Expected `int"),
    ],
)
def test_sampling_that_vllm_does_not_take_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.sampling_params(SamplingPart.model_validate({key: value}))


def test_the_reference_temperature_is_greedy() -> None:
    # vLLM by itself would raise it to 0.01 and draw.
    assert engine._vllm_sampling(engine.PRESETS["reference"]).temperature == 0.0


def test_what_is_no_model_directory_is_refused(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "none", "no such directory"),
        (tmp_path, r"no config\.json"),
        ("file:///not/there", "no such directory"),
    ]:
        with pytest.raises(ModelError, match=message):
            engine.check_model(path)


def test_a_foreign_model_is_taken_and_one_of_ours_must_be_whole(assets: Path, copy_of: Any) -> None:
    from paddock import manifest

    engine.check_model(assets / "base")
    ours = copy_of(assets / "base")
    manifest.commit(ours, "model", {}, {})
    engine.check_model(ours)
    (ours / "model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"model\.safetensors: is missing"):
        engine.check_model(ours)
