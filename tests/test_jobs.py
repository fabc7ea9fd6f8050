"""The jobs as a user runs them: from the shell, submitted to a cluster, served."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from paddock import manifest


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`python -m ...` in this process, which has imported everything: (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", list(words))
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(words[0], run_name="__main__")
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["jobs.train", "model.pth=x", "output_dir=y"], "model.pth: unknown key; did you mean 'path'?"),
        (["jobs.train", "--config", "nothing.yaml"], "nothing.yaml: no such file"),
        (["jobs.train", "stray"], "'stray': not understood"),
        (["jobs.merge", "base_model=/nowhere", "output_dir={tmp}/m"], "/nowhere: no such directory"),
        (["jobs.convert", "input_dir=/nowhere", "output_dir={tmp}/m"], "/nowhere"),
        (
            ["jobs.predict", "model.path=/nowhere", "output_dir={tmp}/m", "data.test={tmp}/bad.json"],
            "bad.json:2: not JSON",
        ),
        (
            ["jobs.score", "predictions={tmp}/bad.json", "gold={tmp}/bad.json", "output_dir={tmp}/m"],
            "bad.json:2: not JSON",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    run_here: Any, tmp_path: Path, words: list[str], says: str
) -> None:
    row = {
        "input": "x",
        "target": "y",
        "answer_choices": None,
        "task_type": "",
        "task_dataset": "MedDG",
        "sample_id": "1",
    }
    (tmp_path / "bad.json").write_text(json.dumps(row) + "\n{nope\n")
    code, _, told = run_here(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert code == 2, told
    (line,) = told.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert [p.name for p in tmp_path.iterdir()] == ["bad.json"]


@pytest.mark.parametrize("name", ["train", "merge", "convert", "predict", "score", "demo"])
def test_help_tells_every_key(run_here: Any, name: str) -> None:
    code, said, _ = run_here(f"jobs.{name}", "--help")
    assert code == 0
    assert "output_dir (required)" in said


def test_a_job_in_a_process_of_its_own_tells_one_line(job: Any) -> None:
    done = job("jobs.train", "model.pth=x", "output_dir=y")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: model.pth: unknown key; did you mean 'path'?")
    assert len(done.stderr.splitlines()) == 1


def test_assets_come_out_byte_identical(job: Any, tmp_path: Path) -> None:
    for name in ("one", "another-name"):
        assert job("jobs.demo", "assets", f"output_dir={tmp_path / name}").returncode == 0
    one, another = manifest.verify(tmp_path / "one"), manifest.verify(tmp_path / "another-name")
    assert one == another
    assert (tmp_path / "one" / manifest.NAME).read_bytes() == (tmp_path / "another-name" / manifest.NAME).read_bytes()


class TestSubmitted:
    """`ray job submit`, with what the README says."""

    def _submit(self, root: Path, cluster: Any, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", "."]
        command += ["--runtime-env", "jobs/runtime_env.yaml", "--", "python", "-m", *words]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500, check=False)

    def test_train_merge_and_predict_write_where_storage_path_says(
        self, root: Path, ray_cluster: Any, service: Any, tmp_path: Path, assets: Path
    ) -> None:
        storage = f"storage_path={tmp_path}"
        train = ["train.max_steps=2", "train.max_seq_length=256", "lora.r=2", "scaling.resources_per_worker={CPU: 0.5}"]
        done = self._submit(root, ray_cluster, "jobs.train", "--config", "jobs/configs/demo.yaml", storage, *train)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        run = tmp_path / "runs" / "demo"
        assert manifest.verify(run / "checkpoint-2").kind == "checkpoint"
        assert manifest.verify(run / "assets").kind == "assets"

        words = ["base_model=runs/demo/models/base", "lora_model=runs/demo/checkpoint-2", "output_dir=models/tuned"]
        done = self._submit(root, ray_cluster, "jobs.merge", storage, *words)
        assert done.returncode == 0, done.stdout[-3000:]
        assert manifest.verify(tmp_path / "models" / "tuned").extra["merged_vs_adapter"]["top1_agreement"] >= 0.99

        words = [
            f"data.test={assets / 'data' / 'dev.json'}",
            "output_dir=predictions/base",
            "predict.sampling.max_tokens=4",
        ]
        words += ["model.path=runs/demo/models/base", "model.dtype=float32"]
        done = self._submit(root, ray_cluster, "jobs.predict", storage, *words)
        assert done.returncode == 0, done.stdout[-3000:]
        assert "using the running service" in done.stdout
        assert manifest.verify(tmp_path / "predictions" / "base").extra["quarantined"] == 0

    def test_a_relative_path_without_storage_path_is_refused(self, root: Path, ray_cluster: Any) -> None:
        done = self._submit(root, ray_cluster, "jobs.merge", "base_model=/x", "output_dir=models/tuned")
        assert done.returncode != 0
        assert "output_dir: 'models/tuned' is relative" in done.stdout
        assert "exit code 2" in done.stdout + done.stderr


@pytest.mark.parametrize("way", ["deployments:app", pytest.param("serve.yaml", marks=pytest.mark.slow)])
def test_serve_run_serves_a_model_directory(root: Path, base_model: Path, tmp_path: Path, way: str) -> None:
    words = [way, f"model={base_model}", "engine.max_model_len=256", "ray_actor_options.num_cpus=0.5"]
    if way == "serve.yaml":
        tree = yaml.safe_load((root / "deployments" / way).read_text(encoding="utf-8"))
        tree["applications"][0]["args"]["model"] = str(base_model)
        (tmp_path / way).write_text(yaml.safe_dump(tree))
        words = [str(tmp_path / way)]
    # A Ray of its own: `serve run` takes its cluster's Serve down when it ends.
    env = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": f"{root / 'platform'}:{root}"}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        ["serve", "run", *words], cwd=root, env=env, stdout=log, stderr=log, start_new_session=True
    )
    try:
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                if httpx.get("http://127.0.0.1:8000/is_ready", timeout=5).text == "true":
                    break
            except httpx.HTTPError:
                pass
            time.sleep(1)
        body = {"input": "感冒吃什么药？", "parameters": {"max_tokens": 4}}
        answer = httpx.post("http://127.0.0.1:8000/generate", json=body, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["num_output_tokens_cf"] == 4
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            raise
