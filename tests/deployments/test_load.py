"""Clients that never stop, while replicas are killed, scaled and given another model: no answer is wrong, none is lost.

PADDOCK_LOAD_SECONDS=600 makes it ten minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from paddock import prompts
from paddock.data import Row, read_rows

TEMPLATE = prompts.load_template("promptcblue")
CLIENTS = 64
SECONDS = float(os.environ.get("PADDOCK_LOAD_SECONDS", "180"))
TOKENS = 16
GREEDY = {"max_tokens": TOKENS, "temperature": 0.0}
OVER_HTTP = {**GREEDY, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def answers(model: Path, rows: list[Row]) -> list[str | None]:
    """What a model says to each row, by transformers alone; None where it is in two minds: sums in another order may
    then differ, and likewise two ways to decode what is no text."""
    tokenizer, said = AutoTokenizer.from_pretrained(model), list[str | None]()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for row in rows:
        ids = torch.tensor([prompts.prompt_ids(tokenizer, TEMPLATE, row)])
        made = network.generate(
            ids, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        best = torch.stack(made.logits)[:, 0].topk(2).values
        text = tokenizer.decode(made.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        text = prompts.answer(text)
        said.append(text if (best[:, 0] - best[:, 1]).min() > 0.01 and "\ufffd" not in text else None)
    return said


@dataclass
class Load:
    """64 clients, what they may be told, and what they were told."""

    url: str
    rows: list[Row]
    right: list[set[str]]
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    slowest: float = 0
    stop: bool = False

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=CLIENTS * 2, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as client:
            await asyncio.gather(*(self._client(client, random.Random(number)) for number in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, choose: random.Random) -> None:
        while not self.stop:
            number, how = choose.randrange(len(self.rows)), choose.choice(["unary", "stream", "generate"])
            begun = time.monotonic()
            while (wait := await self._ask(client, number, how)) is not None:
                await asyncio.sleep(wait)
            self.slowest = max(self.slowest, time.monotonic() - begun)

    async def _ask(self, client: httpx.AsyncClient, number: int, how: str) -> float | None:
        """One request: None when it has ended, or in how many seconds to repeat it."""
        row, right, text = self.rows[number], self.right[number], ""
        path, body = "/v1/completions", {"prompt": TEMPLATE.render(row), "stream": how == "stream", **GREEDY}
        if how == "generate":
            path, body = "/generate", {"input": row.input, "parameters": OVER_HTTP}
        try:
            async with client.stream("POST", path, json=body) as response:
                if response.status_code == 429:
                    told = json.loads(await response.aread())
                    assert told["error"]["code"] == 429 if how != "generate" else told["error"], told
                    self.ended["429, repeated"] += 1
                    return float(response.headers["retry-after"])
                if response.status_code != 200:
                    self.lost.append(f"{how}: {response.status_code} {(await response.aread())[:200]!r}")
                    return None
                if how == "stream":
                    ending = await self._read(response)
                    if ending is None:
                        self.ended["stream cut, and told so"] += 1
                        return None
                    text = ending
                else:
                    told = json.loads(await response.aread())
                    text = told["generated_text"] if how == "generate" else told["choices"][0]["text"]
        except httpx.HTTPError as error:
            self.lost.append(f"{how}: {error!r}")
            return None
        if (text if how == "generate" else prompts.answer(text)) in right:
            self.ended["right"] += 1
        else:
            self.wrong.append(f"{how}: {text!r} is none of {right}")
        return None

    async def _read(self, response: httpx.Response) -> str | None:
        """A stream's text, None where it was cut after its first event: its replica was killed."""
        text, events = "", 0
        try:
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return text
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event and events:
                        return None
                    text += event["choices"][0]["text"]
                    events += 1
        except httpx.RemoteProtocolError:
            if events:
                return None
            raise
        raise httpx.RemoteProtocolError(f"the stream ended without an end after {events} events")


@dataclass
class Operator:
    """Who deploys and kills."""

    dashboard: str
    port: int
    place: Path
    did: list[str] = field(default_factory=list)

    def tell(self, what: str) -> None:
        self.did.append(what)
        print(f"[{time.strftime('%X')}] {what}", flush=True)

    async def deploy(self, model: Path, replicas: int) -> None:
        """`serve deploy`, until what it says is so."""
        args = {
            "model": str(model),
            "served_model_name": "tiny",
            # A KV cache for 16 requests, not the gigabyte of the default: four replicas stand side by side here.
            "engine": {"dtype": "float32", "max_model_len": 512, "num_gpu_blocks_override": 64},
            "autoscaling": {"min_replicas": replicas, "max_replicas": replicas, "target_ongoing_requests": 16},
            "max_ongoing_requests": 16,
            "max_queued_requests": 24,
            "ray_actor_options": {"num_cpus": 0.1},
        }
        app = {"name": "load", "route_prefix": "/load", "import_path": "deployments:app", "args": args}
        http = {"host": "127.0.0.1", "port": self.port}
        file = self.place / "serve.yaml"
        file.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}), encoding="utf-8")
        command = [Path(sys.executable).with_name("serve"), "deploy", file, "-a", self.dashboard]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        await asyncio.sleep(2)
        await self.settled(replicas)
        self.tell(f"deployed {model.name} with {replicas} replicas")

    async def settled(self, replicas: int) -> None:
        begun = time.monotonic()
        while time.monotonic() - begun < 400:
            app = serve.status().applications["load"]
            states = app.deployments["LLM"].replica_states if "LLM" in app.deployments else {}
            assert app.status != "DEPLOY_FAILED", app
            if app.status == "RUNNING" and states == {"RUNNING": replicas}:
                return
            await asyncio.sleep(1)
        raise AssertionError(f"not {replicas} replicas after 400 s: {serve.status()}")

    def replicas(self) -> dict[str, int]:
        """Id -> process of those that serve."""
        details = httpx.get(f"{self.dashboard}/api/serve/applications/").json()
        deployment = details["applications"]["load"]["deployments"]["LLM"]
        return {r["replica_id"]: r["pid"] for r in deployment["replicas"] if r["state"] == "RUNNING"}

    async def kill(self, engine: bool) -> None:
        """kill -9 of a replica, or of its engine, and the time until it is replaced."""
        before, begun = self.replicas(), time.monotonic()
        victim = random.choice(list(before))
        process = psutil.Process(before[victim])
        if engine:
            (process,) = [child for child in process.children() if "EngineCore" in " ".join(child.cmdline())]
        process.send_signal(signal.SIGKILL)
        while victim in self.replicas():
            await asyncio.sleep(0.5)
        await self.settled(len(before))
        what = "an engine" if engine else "a replica"
        self.tell(f"killed {what} of {len(before)}, replaced after {time.monotonic() - begun:.0f} s")


@pytest.fixture
def operator(ray_cluster: Any, http_port: int, tmp_path: Path) -> Iterator[Operator]:
    yield Operator(ray_cluster.dashboard, http_port, tmp_path)
    with contextlib.suppress(Exception):
        serve.delete("load")


def another(model: Path, place: Path) -> Path:
    """A model that says something else."""
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        network.lm_head.weight += torch.randn_like(network.lm_head.weight) * network.lm_head.weight.std() * 2
    network.save_pretrained(place)
    AutoTokenizer.from_pretrained(model).save_pretrained(place)
    return place


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 1500)
def test_no_answer_is_wrong_and_none_is_lost(operator: Operator, assets: Path, tmp_path: Path) -> None:
    one, two = assets / "base", another(assets / "base", tmp_path / "two")
    rows = read_rows(assets / "data" / "test.json")[:40]
    known = [
        (r, a, b) for r, a, b in zip(rows, answers(one, rows), answers(two, rows), strict=True) if a and b and a != b
    ]
    rows, before, after = (list(column) for column in zip(*known, strict=True))
    assert len(rows) >= 10
    assert len(set(before)) >= 3
    load = Load(f"http://127.0.0.1:{operator.port}/load", rows, [{text} for text in before])

    async def scenario() -> None:
        await operator.deploy(one, 1)
        clients = asyncio.ensure_future(load.run())
        begun = time.monotonic()
        try:
            await asyncio.sleep(10)
            await operator.kill(engine=False)
            await operator.deploy(one, 3)
            await operator.kill(engine=False)
            await operator.kill(engine=True)
            load.right = [{a, b} for a, b in zip(before, after, strict=True)]
            await operator.deploy(two, 3)
            await asyncio.sleep(5)  # what was asked of the old one has been answered
            load.right = [{text} for text in after]
            while time.monotonic() - begun < SECONDS - 60:
                await operator.kill(engine=random.random() < 0.5)
            await operator.deploy(two, 1)
            await asyncio.sleep(max(10, SECONDS - (time.monotonic() - begun)))
        finally:
            load.stop = True
            await clients
            seconds = time.monotonic() - begun
            rate = load.ended["right"] / seconds
            print(
                f"{seconds:.0f} s, {CLIENTS} clients: {dict(load.ended)}, {rate:.1f} right answers/s, the slowest"
                f" after {load.slowest:.0f} s; {len(load.wrong)} wrong, {len(load.lost)} lost",
                flush=True,
            )
            print(Counter(load.lost).most_common(10), load.wrong[:5], flush=True)

    asyncio.run(scenario())
    assert load.wrong == []
    assert load.lost == []
    assert load.ended["right"] > SECONDS
