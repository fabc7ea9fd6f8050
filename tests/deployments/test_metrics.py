"""One scrape has what vLLM and Serve count, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import ray

_EXPORTED = re.compile(r"^(ray_(?:vllm|serve)_\w+)\{([^}]*)\} (\S+)", re.MULTILINE)


def scrape() -> list[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of all that Ray exports of vLLM and Serve on this node."""
    (node,) = ray.nodes()
    text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=30).text
    return [(n, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(v)) for n, labels, v in _EXPORTED.findall(text)]


def test_one_scrape_counts_a_request_and_has_all_that_the_dashboard_asks_for(service: Any, root: Path) -> None:
    deadline = time.monotonic() + 90
    generated = 0.0
    while not generated and time.monotonic() < deadline:
        body = {"model": "base", "prompt": "发热", "max_tokens": 5, "ignore_eos": True}
        httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).raise_for_status()
        own = ("ray_vllm_generation_tokens_total", service.app_name)
        generated = sum(value for name, of, value in scrape() if (name, of.get("Application")) == own)
        time.sleep(1)
    assert generated

    dashboard = json.loads((root / "deployments" / "grafana" / "paddock.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    assert len(asked) > 10
    labels: dict[str, set[str]] = {}
    for name, given, _ in scrape():
        labels.setdefault(name, set()).update(given)
    for expression in asked:
        names = re.findall(r"ray_\w+", expression)
        grouped = [label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")]
        used = {*grouped, *re.findall(r"\{(\w+)=~", expression)}
        assert names
        for name in names:
            assert name in labels, f"{name} is not exported"
            assert used <= labels[name], f"{expression}: {used - labels[name]}"


def test_a_request_s_id_goes_from_its_caller_to_the_engine(service: Any) -> None:
    body = {"model": "base", "prompt": "发热", "max_tokens": 1}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, headers={"x-request-id": "visit-12"}, timeout=60)
    told = answer.headers["x-request-id"]
    assert told.startswith("visit-12")
    assert told in answer.json()["id"]  # vLLM's own id of the request
