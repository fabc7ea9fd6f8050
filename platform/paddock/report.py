"""Scores of one or more runs -> one HTML file that opens from disk: no network, no script.

    write_report(path, "Demo", [Run("base", ...), Run("tuned", ...)], gold)

Every text that comes from a row or a model is escaped by the template engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from paddock.data import Row
from paddock.scoring import ParsedPredictions, Scores, parse_predictions
from paddock.tasks import TASKS

EXAMPLES_PER_TASK = 3
ERRORS_SHOWN = 50


@dataclass(frozen=True)
class Run:
    """What one model made of the rows. All runs of a report predict the same rows in the same order."""

    name: str
    rows: Sequence[Row]
    """Each with what the model said as its `target`."""
    parsed: ParsedPredictions
    scores: Scores | None = None
    """None where there is no gold."""


def write_report(
    path: str | Path,
    title: str,
    runs: Sequence[Run],
    gold: Sequence[Row] = (),
    *,
    provenance: Mapping[str, object] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> None:
    """Write the report of one run, or of several side by side; the last one is compared with the first.

    `gold` are the same rows with the right target, in the same order, shown beside the examples.
    `provenance` is what tells the runs' origin (hashes, versions), `seconds` the time of each stage.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        scores=_score_rows(runs),
        missing=next((run.scores.tasks_missing for run in runs if run.scores), []),
        health=[(run.name, name, health) for run in runs for name, health in run.parsed.health.items()],
        errors=[(run.name, error) for run in runs for error in run.parsed.errors[:ERRORS_SHOWN]],
        error_count=sum(len(run.parsed.errors) for run in runs),
        examples=_examples(runs, gold),
        provenance={name: _plain(value) for name, value in (provenance or {}).items()},
        seconds=seconds or {},
    )
    Path(path).write_text(text, encoding="utf-8")


def _score_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The lines of the table: each task, then the mean; scores from 0 to 100."""
    scores = [run.scores for run in runs if run.scores is not None]
    if not scores:
        return []
    lines = [
        {
            "name": name,
            "metric": task.metric,
            "rows": task.rows,
            "scores": [s.tasks[name].score * 100 for s in scores],
        }
        for name, task in scores[0].tasks.items()
    ]
    count = sum(task.rows for task in scores[0].tasks.values())
    lines.append({"name": "Overall", "metric": "mean", "rows": count, "scores": [s.overall for s in scores]})
    return lines


def _examples(runs: Sequence[Run], gold: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Task -> a few rows; with gold, first those that the last run got wrong."""
    if not runs:
        return {}
    last = runs[-1]
    profile = last.parsed.profile
    right = _answers(parse_predictions(gold, profile)) if gold else {}
    said = _answers(last.parsed)
    order = sorted(
        range(len(last.rows)),
        key=lambda i: said.get(_key(last.rows[i])) == right.get(_key(last.rows[i])) if gold else False,
    )
    chosen: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS[profile]}
    for index in order:
        row = last.rows[index]
        examples = chosen[row.task_dataset]
        if len(examples) < EXAMPLES_PER_TASK:
            examples.append(
                {
                    "sample_id": row.sample_id,
                    "input": row.input,
                    "gold": gold[index].target if gold else None,
                    "said": [(run.name, run.rows[index].target) for run in runs],
                }
            )
    return {name: examples for name, examples in chosen.items() if examples}


def _answers(parsed: ParsedPredictions) -> dict[tuple[str, str], Any]:
    return {(name, item["sample_id"]): item["answer"] for name, items in parsed.results.items() for item in items}


def _key(row: Row) -> tuple[str, str]:
    return row.task_dataset, row.sample_id


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
