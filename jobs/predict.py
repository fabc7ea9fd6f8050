"""A test set through a served model, as a Ray job or on this machine.

    python -m jobs.predict model.path=DIR data.test=FILE output_dir=DIR

Uses a running service if it serves that very model (by content), else starts its own. Reads rows; writes
the ledger (`shards/`, `quarantine.jsonl`), `test_predictions.json`, `results.json` and `submission.zip`.
"""

from __future__ import annotations

import jobs
from paddock.config import PredictConfig
from paddock.predict import predict


def main(config: PredictConfig) -> None:
    print(f"predicted: {predict(config)}")


if __name__ == "__main__":
    jobs.run(PredictConfig, main)
