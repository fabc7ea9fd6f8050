"""Score predictions against gold, as the benchmark does; no model is needed.

    python -m jobs.score predictions=FILE gold=FILE profile=v1 output_dir=DIR
    python -m jobs.score compare A B [gold=FILE] [output_dir=DIR]

The first writes results.json, scores.json and report.html. The second tells what changes from A to B, directories
of scores or predictions, with 95 % intervals of a paired bootstrap, and which rows changed.
"""

from __future__ import annotations

from collections import Counter

import jobs
from paddock.comparison import compare
from paddock.config import CompareConfig, ScoreConfig
from paddock.evaluation import score_files

# What is told where it is true of most rows.
WARNED = {
    "empty_texts": "texts are empty: the model said nothing, or was not asked",
    "truncated": "texts ended at max_tokens: the model does not stop",
    "out_of_list": "answers are no label of their row's answer_choices",
}
# Rows that are told on the terminal.
SHOWN = 20


def main(config: ScoreConfig) -> None:
    """Write the scores, and tell each task's."""
    record = score_files(config)
    for name, task in record["tasks"].items():
        print(f"{name:14} {task['metric']:16} {task['score'] * 100:7.2f}  {task['rows']:6} rows")
    print(f"{'Overall':14} {'mean':16} {record['score']:7.2f}  {record['rows']:6} rows")
    lost = record["lenient"]["score"] - record["score"]
    if lost >= 0.005:
        print(f"{lost:.2f} points were lost to format: read leniently, the score is {record['lenient']['score']:.2f}")
    for key, what in WARNED.items():
        count = sum(health[key] or 0 for health in record["health"].values())
        if 2 * count > record["rows"]:
            print(f"warning: {count} of {record['rows']} {what}")
    if record["tasks_missing"]:
        print(f"no gold rows of {', '.join(record['tasks_missing'])}: not comparable with the leaderboard")
    if record["parse_errors"]:
        print(f"{len(record['parse_errors'])} answers could not be read; scores.json says which")
    print(f"report: {config.output_dir}/report.html")


def compare_scores(config: CompareConfig) -> None:
    """Tell the differences, and some of the rows."""
    record = compare(config)
    print(f"{'':14} {'A':>7} {'B':>7} {'B - A':>8}   95 % interval")
    for name, task in record["tasks"].items():
        by = task["difference"]
        sure = "" if by["low"] <= 0 <= by["high"] else "  *"
        interval = f"{by['low']:+.2f} .. {by['high']:+.2f}{sure}"
        print(f"{name:14} {task['a']:7.2f} {task['b']:7.2f} {by['value']:+8.2f}   {interval}")
    changed = Counter(row["change"] for row in record["changed"])
    told = ", ".join(f"{number} {change}" for change, number in sorted(changed.items())) or "none"
    print(f"{record['texts_differ']:.2%} of the texts differ; rows whose answer changed: {told}")
    for row in record["changed"][:SHOWN]:
        print(f"  {row['sample_id']} ({row['task_dataset']}, {row['change']}): {row['a'][:60]!r} -> {row['b'][:60]!r}")
    if len(record["changed"]) > SHOWN:
        print(f"  ... and {len(record['changed']) - SHOWN} more; output_dir=DIR writes them all")


if __name__ == "__main__":
    jobs.run(ScoreConfig, main, compare=compare_scores)
