"""Measure Paddock beside its peers, each pair in one run.

    python -m jobs.benchmark merge|predict|serve|train [output_dir=benchmarks] [key.sub=value ...]

Writes OUTPUT_DIR/NAME-MACHINE.json and its raw output, NAME-MACHINE.log.
"""

from __future__ import annotations

import sys
from pkgutil import resolve_name

import jobs
from paddock.benchmark import BenchmarkConfig
from paddock.errors import ConfigError

# Only the one that is asked for is imported: a host that trains need not have Ray, nor one that merges vLLM.
BENCHMARKS = {
    "merge": "paddock.benchmark.merge:merge",
    "predict": "paddock.benchmark.predict:run",
    "serve": "paddock.benchmark.serve:run",
    "train": "paddock.benchmark.train:train",
}


def main(config: BenchmarkConfig) -> None:
    raise ConfigError(f"name a benchmark: {', '.join(BENCHMARKS)}")


if __name__ == "__main__":
    asked = [name for name in sys.argv[1:2] if name in BENCHMARKS]
    jobs.run(BenchmarkConfig, main, **{name: resolve_name(BENCHMARKS[name]) for name in asked})
