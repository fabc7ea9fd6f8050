"""What can be checked without starting vLLM; tests/deployments/test_llm.py starts it once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from paddock import engine, prompts
from paddock.config import SamplingPart
from paddock.errors import ConfigError, ModelError, OutputError, ServiceError

TEMPLATE = prompts.load_template("promptcblue")
ALPACA = prompts.load_template("alpaca")


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


def test_an_instruction_needs_a_slot_and_a_request_some_text() -> None:
    assert engine.request_row(ALPACA, "译", "发热").instruction == "译"
    with pytest.raises(ValueError, match="no slot for an instruction"):
        engine.request_row(TEMPLATE, "译", "发热")
    with pytest.raises(ValueError, match="empty"):
        engine.request_row(TEMPLATE, " ", "\n")
    with pytest.raises(ValueError, match="surrogate"):
        engine.request_row(TEMPLATE, "", "\ud800")


def test_a_chat_of_one_turn_is_the_row_that_it_was_trained_as() -> None:
    user = {"role": "user", "content": [{"type": "text", "text": "发"}, {"type": "text", "text": "热"}]}
    assert engine._chat_row(TEMPLATE, [user]).input == "发热"
    row = engine._chat_row(ALPACA, [{"role": "system", "content": "译"}, user])
    assert (row.instruction, row.input) == ("译", "发热")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": None}],
    ],
)
def test_any_other_conversation_is_refused(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="messages: "):
        engine._chat_row(TEMPLATE, messages)


def test_a_vllm_that_would_read_control_tokens_from_text_is_refused(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "base")

    class Renderer(SimpleNamespace):
        """A later vLLM's, which no longer calls what we replace."""

        def render_cmpl(self, given: list[dict[str, str]]) -> list[dict[str, list[int]]]:
            return [{"prompt_token_ids": tokenizer(p["prompt"])["input_ids"]} for p in given]

    with pytest.raises(ServiceError, match="control tokens"):
        engine._take_over_text(Renderer(get_tokenizer=lambda: tokenizer), TEMPLATE)
