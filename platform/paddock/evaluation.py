"""A file of predictions + a file of gold -> the directory of scores (`python -m jobs.score`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddock import __version__, ledger, manifest, storage
from paddock.config import ScoreConfig
from paddock.data import Row, place, read_rows
from paddock.errors import DataError
from paddock.report import Measured, Run, write_report
from paddock.resampling import bootstrap
from paddock.scoring import (
    ParsedPredictions,
    answers_of,
    lenient_results,
    parse_predictions,
    profile_of,
    score,
    task_of,
)
from paddock.tasks import dump_results


def score_files(config: ScoreConfig) -> dict[str, Any]:
    """Write `results.json`, `scores.json` and `report.html`; returns what scores.json says.

    Raises DataError, with file and line, where a file cannot be read, gold has an empty target, or the
    predictions are not the gold's rows in their order.
    """
    manifest.apart(config.output_dir, config.predictions, config.gold)
    predicted, gold = read_pair(config.predictions, config.gold, config.profile)
    inputs = {name: manifest.fingerprint(getattr(config, name)) for name in ("predictions", "gold")}
    with manifest.stage(
        config.output_dir, kind="scores", config=config.hashed(), inputs=inputs, overwrite=config.overwrite
    ) as stage:
        if stage.finished is None:
            beside = storage.parent(config.predictions)
            ours = storage.exists(storage.join(beside, "ledger.json"))
            kept = ledger.read_shards(storage.join(beside, "shards")) if ours else {}
            cut = {p.sample_id for p in kept.values() if p.finish_reason == "length"}
            parsed = parse_predictions(predicted, config.profile, truncated=cut if kept else None)
            scores = score(parsed.results, gold, config.profile)
            right, said = (answers_of(r) for r in (parse_predictions(gold, config.profile).results, parsed.results))
            interval = bootstrap(config.profile, right, said)["Overall"]
            lenient = _lenient(predicted, parsed, gold)
            run = Run("predictions", predicted, parsed, scores, measured=_measured(kept, len(gold)))
            record = {
                **scores.as_record(),
                "rows": len(gold),
                "inputs": {name: str(getattr(config, name)) for name in ("predictions", "gold")},
                "interval": {"low": interval.low, "high": interval.high},
                "lenient": {"score": lenient["Overall"], "tasks": lenient},
                "health": {name: vars(health) for name, health in parsed.health.items()},
                "parse_errors": parsed.errors,
            }
            results = dump_results(parsed.results)
            (stage.directory / "results.json").write_text(results, encoding="utf-8")
            (stage.directory / "scores.json").write_text(
                json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
            )
            write_report(
                stage.directory / "report.html",
                "PromptCBLUE scores",
                [run],
                gold,
                lenient=lenient,
                provenance={"profile": config.profile, **_provenance(config, inputs)},
            )
            stage.extra["score"] = scores.overall
    with storage.reading(storage.join(config.output_dir, "scores.json")) as stream:
        return dict(json.load(stream))


def _lenient(predicted: list[Row], parsed: ParsedPredictions, gold: list[Row]) -> dict[str, float]:
    """The scores, of 100, that the answers would have if format were forgiven."""
    meant = score(lenient_results(predicted, parsed, gold), gold, parsed.profile)
    return {**{name: task.score * 100 for name, task in meant.tasks.items()}, "Overall": meant.overall}


def _measured(kept: Mapping[int, ledger.Prediction], rows: int) -> list[Measured]:
    """What each row cost, where the predictions lie beside the ledger that they came from."""
    if kept.keys() != set(range(rows)):
        return []
    ordered = (kept[i] for i in range(rows))
    return [Measured(p.seconds, p.prompt_tokens, p.completion_tokens) for p in ordered if p.error is None]


def _provenance(config: ScoreConfig, inputs: dict[str, str]) -> dict[str, Any]:
    """What the scores were made from; where the predictions are a run's own, also what that was made from."""
    provenance: dict[str, Any] = {f"{name} (sha256)": value for name, value in inputs.items()}
    predicted = manifest.read(storage.parent(config.predictions))
    if predicted is not None:
        provenance |= {f"predicted from {name}": value for name, value in predicted.inputs.items()}
        provenance |= {"predicted with": predicted.config, "predicted by": predicted.created_by}
    return {**provenance, "scored by": f"paddock {__version__}"}


def read_pair(predictions: str | Path, gold: str | Path, profile: str | None) -> tuple[list[Row], list[Row]]:
    """Both files' rows, proven to be the same ones in the same order. Raises DataError with file and line."""
    right = read_rows(gold, unique_ids=True)
    for index, row in enumerate(right):
        try:
            task_of(row, profile) if profile else profile_of([row])
        except DataError as error:
            raise DataError(f"{place(gold, index)}: {error}") from None
        if not row.target.strip():
            raise DataError(
                f"{place(gold, index)}: the target of row {row.sample_id!r} is empty;"
                " gold needs the right answer in every row"
            )
    said = read_rows(predictions, unique_ids=True)
    for index, (a, b) in enumerate(zip(said, right, strict=False)):
        if (a.sample_id, a.task_dataset) != (b.sample_id, b.task_dataset):
            raise DataError(
                f"{place(predictions, index)}: row {a.sample_id!r} of {a.task_dataset!r}, where"
                f" {place(gold, index)} has row {b.sample_id!r} of {b.task_dataset!r};"
                " predictions keep the rows and the order of the gold file"
            )
    if len(said) < len(right):
        raise DataError(
            f"{place(predictions, len(said) - 1)}: the file ends after {len(said)} of the {len(right)} rows of"
            f" {gold}; predict every row"
        )
    if len(said) > len(right):
        raise DataError(
            f"{place(predictions, len(right))}: row {said[len(right)].sample_id!r} is not in {gold}, which has"
            f" {len(right)} rows; predictions hold the gold file's rows and no others"
        )
    return said, right
