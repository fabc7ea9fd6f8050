"""LoRA fine-tuning across Ray Train workers.

    python -m jobs.train --config jobs/configs/demo.yaml
    python -m jobs.train --config jobs/configs/demo.yaml model.path=DIR data.train=FILE data.dev=FILE output_dir=DIR
    python -m jobs.train plan --config ...               what would be done; nothing is written
    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
        python -m jobs.train --config jobs/configs/demo.yaml

Reads a Hugging Face model directory and rows; writes OUTPUT_DIR/run.json, packed, checkpoint-N, metrics.jsonl and
tensorboard. Whatever ended a run, the same command goes on from its last checkpoint, on any number of workers, and
ends where it would have ended.
"""

from __future__ import annotations

import jobs
from paddock.config import TrainConfig
from paddock.demo.prepare import ensure
from paddock.train_plan import plan_text
from paddock.trainer import check_config, train


def main(config: TrainConfig) -> None:
    check_config(config)
    ensure(config)
    print(f"trained: {train(config)}")


def plan(config: TrainConfig) -> None:
    print(plan_text(config))


if __name__ == "__main__":
    jobs.run(TrainConfig, main, plan=plan)
