"""Convert Meta's LLaMA weights to a Hugging Face directory, or back.

    python -m jobs.convert input_dir=META output_dir=HF
    python -m jobs.convert input_dir=HF output_dir=META output_type=pth
    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
        python -m jobs.convert input_dir=/META output_dir=/HF

Reads consolidated.*.pth and params.json, with tokenizer.model beside them or one directory up, and writes
safetensors, configuration and tokenizer; with output_type=pth the other way round.
"""

from __future__ import annotations

import jobs
from paddock.config import ConvertConfig
from paddock.convert import convert


def main(config: ConvertConfig) -> None:
    print(f"converted: {convert(config)}")


if __name__ == "__main__":
    jobs.run(ConvertConfig, main)
