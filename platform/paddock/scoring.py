"""Predicted rows + gold rows -> scores, as the benchmark computes them.

    parsed = parse_predictions(predicted_rows, "v1")
    scores = score(parsed.results, gold_rows, "v1")
    scores.overall                                  # 0 to 100; a perfect prediction has 99.99999994
    scores.official()                               # what the leaderboard's evaluate.py writes

The benchmark scores all tasks of its vintage or none. Here a file may hold rows of some tasks only: the
overall score is then the mean over these, and `tasks_scored` and `tasks_missing` say which they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paddock.data import Row
from paddock.errors import DataError
from paddock.lenient import lenient_answer
from paddock.resampling import row_values
from paddock.tasks import TASKS, Task, parse_answer, parse_records


@dataclass(frozen=True)
class Health:
    """How well one task's texts could be read."""

    rows: int
    empty_texts: int
    """Rows to which the model said nothing."""
    empty_answers: int
    """Rows in whose text no answer was found; for some of them that is right."""
    out_of_list: int
    """Rows whose label is none of their `answer_choices`."""
    problems: int
    """Rows on which the benchmark's own parser would have died."""
    truncated: int | None
    """Rows that ended at `max_tokens`; None where that is not known."""


@dataclass(frozen=True)
class ParsedPredictions:
    """What the texts of a file say."""

    profile: str
    results: dict[str, list[dict[str, Any]]]
    """results.json: task -> [{"sample_id", "answer"}] in the order of the file, with every task of the profile."""
    errors: list[dict[str, str]]
    """{"sample_id", "task_dataset", "problem"}: answers that are empty because the text could not be read."""
    health: dict[str, Health]
    """By task, those that have rows."""


@dataclass(frozen=True)
class TaskScore:
    """One task's result."""

    score: float
    """The number that counts: 1 is perfect."""
    metric: str
    """The name of that number."""
    numbers: dict[str, float]
    """All numbers that the metric gives, that one among them."""
    rows: int


@dataclass(frozen=True)
class Scores:
    """The result of a file."""

    profile: str
    tasks: dict[str, TaskScore]
    gold_errors: list[dict[str, str]]
    """Gold answers that could not be read; they count as empty."""

    @property
    def overall(self) -> float:
        """The plain mean over the tasks that were scored, times 100."""
        return sum(task.score for task in self.tasks.values()) / len(self.tasks) * 100

    @property
    def tasks_scored(self) -> list[str]:
        return list(self.tasks)

    @property
    def tasks_missing(self) -> list[str]:
        """Tasks of the profile without a gold row. Empty where the score is the benchmark's own."""
        return [name for name in TASKS[self.profile] if name not in self.tasks]

    def official(self) -> dict[str, Any]:
        """The leaderboard's output: every number times 100."""
        tasks = TASKS[self.profile]
        numbers = {tasks[name].official_name: task.score * 100 for name, task in self.tasks.items()}
        return {"success": True, "score": self.overall, "scoreJson": {**numbers, "score": self.overall}}

    def as_record(self) -> dict[str, Any]:
        """scores.json: the leaderboard's output, and what stands behind it."""
        return {
            **self.official(),
            "profile": self.profile,
            "tasks_scored": self.tasks_scored,
            "tasks_missing": self.tasks_missing,
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "gold_errors": self.gold_errors,
        }


def task_of(row: Row, profile: str) -> Task:
    """The task that a row belongs to. Raises DataError where the profile has none of that name."""
    task = TASKS[profile].get(row.task_dataset)
    if task is None:
        others = [name for name, tasks in TASKS.items() if row.task_dataset in tasks]
        hint = f"it is one of profile {others[0]}" if others else f"known are {', '.join(TASKS[profile])}"
        raise DataError(
            f"row {row.sample_id!r}: task_dataset {row.task_dataset!r} is no task of profile {profile}; {hint}"
        )
    return task


def profile_of(rows: Sequence[Row]) -> str:
    """The vintage that has every row's task; `v1` where both have.

    Raises DataError where neither has.
    """
    names = {row.task_dataset for row in rows}
    for profile, tasks in TASKS.items():
        if names <= tasks.keys():
            return profile
    foreign = sorted(names - {name for tasks in TASKS.values() for name in tasks})
    if foreign:
        raise DataError(f"task_dataset {foreign[0]!r} is no task of the benchmark, so there is no way to score it")
    raise DataError(f"the rows mix tasks of v1 and v2 ({', '.join(sorted(names))}); split the file")


def parse_predictions(
    rows: Sequence[Row], profile: str, *, truncated: Collection[str] | None = None
) -> ParsedPredictions:
    """Read every row's `target` as an answer.

    `truncated` holds the sample_ids of texts that ended at `max_tokens`, where that is known.
    Raises DataError for a row of another profile's task.
    """
    for row in rows:
        task_of(row, profile)
    results, errors = parse_records([row.as_record() for row in rows], profile)
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.task_dataset, []).append(row)
    health = {
        name: _health(
            TASKS[profile][name],
            profile,
            by_task[name],
            answers=results[name],
            errors=errors,
            truncated=truncated,
        )
        for name in results
        if name in by_task
    }
    return ParsedPredictions(profile, results, errors, health)


def score(results: dict[str, list[dict[str, Any]]], gold: Sequence[Row], profile: str) -> Scores:
    """Score answers (`ParsedPredictions.results`) against gold rows.

    Raises DataError where there is no gold, a gold target is empty, or the answers are not those of the gold
    rows, in their order within each task.
    """
    if not gold:
        raise DataError("gold: there are no rows to score against")
    for row in gold:
        if not row.target.strip():
            raise DataError(f"gold: row {row.sample_id!r} has an empty target, so it cannot be scored")
    right = parse_predictions(gold, profile)
    scored: dict[str, TaskScore] = {}
    for name, task in TASKS[profile].items():
        gold_answers, answers = right.results[name], results.get(name, [])
        _check_same_rows(name, gold_answers, answers)
        if gold_answers:
            numbers = task.metric([g["answer"] for g in gold_answers], [a["answer"] for a in answers])
            scored[name] = TaskScore(numbers[task.score_name], task.score_name, numbers, len(gold_answers))
    return Scores(profile, scored, right.errors)


def lenient_results(
    rows: Sequence[Row], parsed: ParsedPredictions, gold: Sequence[Row]
) -> dict[str, list[dict[str, Any]]]:
    """`parsed.results` with each answer replaced by what was meant (see `paddock.lenient`), where that is better."""
    right = parse_predictions(gold, parsed.profile).results
    texts: dict[str, list[Row]] = {}
    for row in rows:
        texts.setdefault(row.task_dataset, []).append(row)
    results = {}
    for name, items in parsed.results.items():
        task, own = TASKS[parsed.profile][name], texts.get(name, [])
        meant = [
            lenient_answer(parsed.profile, name, r.target, list(r.answer_choices) if r.answer_choices else None)
            for r in own
        ]
        said = [item["answer"] for item in items]
        differ = [i for i, (a, b) in enumerate(zip(said, meant, strict=True)) if a != b]
        wanted = [right[name][i]["answer"] for i in differ]
        values = (row_values(task, wanted, [side[i] for i in differ]) for side in (said, meant))
        better = {i for i, before, after in zip(differ, *values, strict=True) if after > before}
        results[name] = [{**item, "answer": meant[i]} if i in better else item for i, item in enumerate(items)]
    return results


def answers_of(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """Results without their ids: task -> answers, row by row."""
    return {name: [item["answer"] for item in items] for name, items in results.items()}


def _check_same_rows(name: str, gold: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    for position, (right, said) in enumerate(zip(gold, answers, strict=False), 1):
        if right["sample_id"] != said["sample_id"]:
            raise DataError(
                f"{name}: answer {position} is of row {said['sample_id']!r}, gold has {right['sample_id']!r} there;"
                " keep the rows and their order"
            )
    if len(gold) != len(answers):
        raise DataError(f"{name}: {len(answers)} answers for {len(gold)} gold rows; predict every row once")


def _health(
    task: Task,
    profile: str,
    rows: Sequence[Row],
    *,
    answers: Sequence[dict[str, Any]],
    errors: Sequence[dict[str, str]],
    truncated: Collection[str] | None,
) -> Health:
    nothing, _ = parse_answer(profile, task.name, "", [])
    said = [item["answer"] for item in answers]
    return Health(
        rows=len(rows),
        empty_texts=sum(not row.target.strip() for row in rows),
        empty_answers=sum(answer == nothing for answer in said),
        out_of_list=sum(_is_invented(task, profile, a, r) for a, r in zip(said, rows, strict=True)),
        problems=len({e["sample_id"] for e in errors if e["task_dataset"] == task.name}),
        truncated=None if truncated is None else sum(row.sample_id in truncated for row in rows),
    )


def _is_invented(task: Task, profile: str, answer: Any, row: Row) -> bool:
    """Whether a label is none of its row's choices, which are read as an answer is (相同 means 是的)."""
    if not task.is_label or not answer or not row.answer_choices or answer in row.answer_choices:
        return False
    return all(parse_answer(profile, task.name, choice, None)[0] != answer for choice in row.answer_choices)
