"""Measure Paddock beside its peers, each pair in one run.

    python -m jobs.benchmark NAME [output_dir=benchmarks] [key.sub=value ...]

Writes OUTPUT_DIR/NAME-MACHINE.json and its raw output, NAME-MACHINE.log.
"""

from __future__ import annotations

import jobs
from paddock.benchmark import BenchmarkConfig
from paddock.benchmark.train import train
from paddock.errors import ConfigError

COMMANDS = {"train": train}


def main(config: BenchmarkConfig) -> None:
    raise ConfigError(f"name a benchmark: {', '.join(COMMANDS)}")


if __name__ == "__main__":
    jobs.run(BenchmarkConfig, main, **COMMANDS)
