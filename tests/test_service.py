"""Which running service answers as a configuration would."""

from __future__ import annotations

from typing import Any

import pytest

from paddock.service import find


@pytest.mark.parametrize("engine", [{}, {"dtype": "float32"}, {"max_model_len": 512, "gpu_memory_utilization": 0.5}])
def test_the_same_answers_are_asked_of_the_running_service(service: Any, engine: dict[str, Any]) -> None:
    assert find(service.config.model_copy(update={"engine": engine})) == service.app_name


@pytest.mark.parametrize(
    "engine", [{"dtype": "bfloat16"}, {"max_model_len": 4096}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}]
)
def test_another_engine_may_answer_otherwise(service: Any, engine: dict[str, Any]) -> None:
    assert find(service.config.model_copy(update={"engine": engine})) is None


def test_another_prompt_or_model_is_another_service(service: Any, assets: Any) -> None:
    prompt = service.config.prompt.model_copy(update={"template": "alpaca"})
    assert find(service.config.model_copy(update={"prompt": prompt})) is None
    assert find(service.config.model_copy(update={"model": str(assets / "base")})) is None
