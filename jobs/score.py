"""Score predictions against gold, as the benchmark does; no model is needed.

    python -m jobs.score predictions=FILE gold=FILE profile=v1 output_dir=DIR

Writes results.json, scores.json and report.html.
"""

from __future__ import annotations

import jobs
from paddock.config import ScoreConfig
from paddock.evaluation import score_files


def main(config: ScoreConfig) -> None:
    """Write the scores, and tell each task's."""
    record = score_files(config)
    for name, task in record["tasks"].items():
        print(f"{name:14} {task['metric']:16} {task['score'] * 100:7.2f}  {task['rows']:6} rows")
    print(f"{'Overall':14} {'mean':16} {record['score']:7.2f}  {record['rows']:6} rows")
    if record["tasks_missing"]:
        print(f"no gold rows of {', '.join(record['tasks_missing'])}: not comparable with the leaderboard")
    if record["parse_errors"]:
        print(f"{len(record['parse_errors'])} answers could not be read; scores.json says which")
    print(f"report: {config.output_dir}/report.html")


if __name__ == "__main__":
    jobs.run(ScoreConfig, main)
