"""Merge LoRA adapters into a base model, in order, and prove the result.

    python -m jobs.merge base_model=DIR lora_model=A,B output_dir=DIR
    python -m jobs.merge plan base_model=DIR lora_model=A,B output_dir=DIR       # every tensor, nothing written
    python -m jobs.merge base_model=DIR lora_model=RUN/checkpoint-800 output_type=pth output_dir=DIR
    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
        python -m jobs.merge base_model=/DIR lora_model=/A,/B output_dir=/DIR num_workers=4

Reads a Hugging Face directory and PEFT adapter directories (a checkpoint of jobs.train is one); writes a
Hugging Face directory, or Meta's layout with output_type=pth. Without lora_model it copies the base, in
another dtype or shard size if asked.
"""

from __future__ import annotations

import jobs
from paddock.config import MergeConfig
from paddock.merge import merge, plan_text


def main(config: MergeConfig) -> None:
    print(f"merged: {merge(config)}")


def plan(config: MergeConfig) -> None:
    print(plan_text(config))


if __name__ == "__main__":
    jobs.run(MergeConfig, main, plan=plan)
