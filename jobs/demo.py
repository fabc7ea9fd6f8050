"""Everything in one run, on a tiny model, on this machine.

    python -m jobs.demo --config jobs/configs/demo.yaml
    python -m jobs.demo assets output_dir=DIR             only the ingredients: base, adapters, rows

base + two adapters -> merged model -> LoRA training -> checkpoint -> merge -> vLLM on Ray Serve -> predictions
-> scores. Writes OUTPUT_DIR/summary.json and OUTPUT_DIR/report.html.
"""

from __future__ import annotations

import jobs
from paddock.config import DemoConfig, JobConfig
from paddock.demo.prepare import write_assets
from paddock.pipeline import run


def main(config: DemoConfig) -> None:
    run(config)


def assets(config: JobConfig) -> None:
    write_assets(config.output_dir, overwrite=config.overwrite)


if __name__ == "__main__":
    jobs.run(DemoConfig, main, assets=assets)
