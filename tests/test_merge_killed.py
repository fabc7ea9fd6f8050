"""kill -9 at random moments, then the same merge again: the output is that of one that was never interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from paddock import manifest
from tests.merge_lab import PROJECTIONS


def start(root: Path, base: Path, adapter: Path, out: Path) -> subprocess.Popen[bytes]:
    words = [f"base_model={base}", f"lora_model={adapter}", f"output_dir={out}", "max_shard_size=4MB", "dtype=float16"]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.merge", *words],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root / 'platform'}:{root}"},
        stdout=subprocess.PIPE,
    )


def content(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def unfinished_looks_unfinished(directory: Path) -> None:
    for file in directory.rglob(manifest.NAME):
        manifest.verify(file.parent)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_twenty_times(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, adapter, rng = tmp_path / "base", tmp_path / "adapter", random.Random(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(adapter)

    whole, place = tmp_path / "whole", tmp_path / "out" / "model"
    first = start(root, base, adapter, whole)
    began = _begun(tmp_path / ".whole.partial" / "work.sha256", first)
    assert first.wait() == 0
    working = time.monotonic() - began
    place.parent.mkdir()
    kept = 0
    for _ in range(20):
        running = start(root, base, adapter, place)
        _begun(place.parent / ".model.partial" / "work.sha256", running)
        time.sleep(rng.uniform(0, working))
        running.send_signal(signal.SIGKILL)
        said = running.communicate()[0]
        kept += b"are kept" in said
        unfinished_looks_unfinished(place.parent)
        if place.exists():  # it was quicker: begin anew
            assert content(place) == content(whole)
            subprocess.run(["rm", "-r", str(place)], check=True)
    assert kept  # runs did begin with what others had written
    assert start(root, base, adapter, place).wait() == 0
    assert content(place) == content(whole)
    assert [file.name for file in place.parent.iterdir() if file.suffix != ".lock"] == ["model"]


def _begun(file: Path, running: subprocess.Popen[bytes]) -> float:
    """Wait until a run has written a file, which an earlier one may have left; return when."""
    before = file.stat().st_mtime_ns if file.exists() else None
    while running.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
        time.sleep(0.005)
    return time.monotonic()
