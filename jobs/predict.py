"""A test set through a model, or the dev rows through many adapters; as a Ray job or on this machine.

    python -m jobs.predict model.path=DIR data.test=FILE output_dir=DIR
    python -m jobs.predict target_url=http://HOST:8000/v1 data.test=FILE output_dir=DIR
    python -m jobs.predict model.path=DIR 'adapters=runs/x/checkpoint-*' data.dev=FILE merge_best=DIR output_dir=DIR

Uses a running service if it serves that very model (by content), else starts its own; `engine=local` holds vLLM in
the run's own workers. Reads rows; writes the ledger (`shards/`, `quarantine.jsonl`), `test_predictions.json`,
`results.json` and `submission.zip`. Killed and started again, it predicts what is missing. A sweep writes one such
directory for each adapter, with its scores, and `sweep.json` and `report.html` beside them.
"""

from __future__ import annotations

import jobs
from paddock.config import PredictConfig
from paddock.predict import predict
from paddock.sweep import sweep


def main(config: PredictConfig) -> None:
    if not config.adapters:
        print(f"predicted: {predict(config)}")
        return
    record = sweep(config)
    low, high = record["interval"]["low"], record["interval"]["high"]
    print(
        f"best: {record['best']} with {record['score']:.2f} ({low:.2f} to {high:.2f}); {config.output_dir}/report.html"
    )


if __name__ == "__main__":
    jobs.run(PredictConfig, main)
