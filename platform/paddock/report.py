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

from paddock import charts
from paddock.baselines import CHATGLM_LORA, OVERALL
from paddock.data import Row
from paddock.resampling import row_values
from paddock.scoring import ParsedPredictions, Scores, answers_of, parse_predictions
from paddock.tasks import TASKS

EXAMPLES_PER_TASK = 3
ERRORS_SHOWN = 50


@dataclass(frozen=True)
class Measured:
    """What one row cost."""

    seconds: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Run:
    """What one model made of the rows. All runs of a report predict the same rows in the same order."""

    name: str
    rows: Sequence[Row]
    """Each with what the model said as its `target`."""
    parsed: ParsedPredictions
    scores: Scores | None = None
    """None where there is no gold."""
    measured: Sequence[Measured] = ()
    """One for each row, where the run kept them."""


def write_report(
    path: str | Path,
    title: str,
    runs: Sequence[Run],
    gold: Sequence[Row] = (),
    *,
    provenance: Mapping[str, object] | None = None,
    seconds: Mapping[str, float] | None = None,
    curve: Sequence[charts.Point] = (),
    lenient: Mapping[str, float] | None = None,
) -> None:
    """Write the report of one run, or of several side by side; the last one is compared with the first.

    `gold` are the same rows with the right target, in the same order, shown beside the examples.
    `curve` are the overall scores of several checkpoints, `lenient` the last run's scores by task and `Overall`
    where format is forgiven, of 100. `provenance` is what tells the runs' origin (hashes, versions), `seconds` the
    time of each stage.
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
        scores=_score_rows(runs, lenient or {}),
        baselines=OVERALL if runs and runs[0].parsed.profile == "v1" else {},
        curve=charts.curve(curve, "overall score"),
        curve_points=curve,
        plots=[(run.name, name, plot) for run in runs for name, plot in _plots(run.measured)],
        missing=next((run.scores.tasks_missing for run in runs if run.scores), []),
        health=[(run.name, name, health) for run in runs for name, health in run.parsed.health.items()],
        errors=[(run.name, error) for run in runs for error in run.parsed.errors[:ERRORS_SHOWN]],
        error_count=sum(len(run.parsed.errors) for run in runs),
        examples=_examples(runs, gold),
        provenance={name: _plain(value) for name, value in (provenance or {}).items()},
        seconds=seconds or {},
    )
    Path(path).write_text(text, encoding="utf-8")


def _plots(measured: Sequence[Measured]) -> list[tuple[str, str]]:
    """Lengths and latencies, where they are known."""
    columns: dict[str, tuple[Sequence[float], str]] = {
        "Prompt length": ([m.prompt_tokens for m in measured], "tokens"),
        "Answer length": ([m.completion_tokens for m in measured], "tokens"),
        "Time to answer": ([m.seconds for m in measured], "seconds"),
    }
    return [(name, charts.histogram(values, unit)) for name, (values, unit) in columns.items() if any(values)]


def _score_rows(runs: Sequence[Run], lenient: Mapping[str, float]) -> list[dict[str, Any]]:
    """The lines of the table: each task, then the mean; scores from 0 to 100."""
    scores = [run.scores for run in runs if run.scores is not None]
    if not scores:
        return []
    lines: list[dict[str, Any]] = [
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
    for line in lines:
        line["published"] = CHATGLM_LORA.get(line["name"])
        line["lost"] = lenient[line["name"]] - line["scores"][-1] if line["name"] in lenient else None
    return lines


def _examples(runs: Sequence[Run], gold: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Task -> a few rows; with gold, those that the last run answered worst."""
    if not runs:
        return {}
    last = runs[-1]
    profile = last.parsed.profile
    places: dict[str, list[int]] = {name: [] for name in TASKS[profile]}
    for index, row in enumerate(last.rows):
        places[row.task_dataset].append(index)
    right = answers_of(parse_predictions(gold, profile).results) if gold else {}
    said = answers_of(last.parsed.results)
    examples = {}
    for name, indices in places.items():
        values = row_values(TASKS[profile][name], right[name], said[name]) if gold else [0.0] * len(indices)
        worst = sorted(zip(values, indices, strict=True))[:EXAMPLES_PER_TASK]
        examples[name] = [
            {
                "sample_id": last.rows[i].sample_id,
                "input": last.rows[i].input,
                "value": value if gold else None,
                "gold": gold[i].target if gold else None,
                "said": [(run.name, run.rows[i].target) for run in runs],
            }
            for value, i in worst
        ]
    return {name: rows for name, rows in examples.items() if rows}


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
