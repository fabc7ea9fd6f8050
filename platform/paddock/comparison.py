"""Two predictions of the same rows: the difference of their scores, how sure it is, and the rows that changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paddock import manifest, storage
from paddock.config import CompareConfig
from paddock.data import Row
from paddock.errors import ConfigError, OutputError
from paddock.evaluation import read_pair
from paddock.resampling import bootstrap, row_values
from paddock.scoring import answers_of, parse_predictions, profile_of
from paddock.submission import PREDICTIONS
from paddock.tasks import TASKS


def compare(config: CompareConfig) -> dict[str, Any]:
    """What changes from `a` to `b`, in points: by task and overall, with intervals, and row by row.

    `texts_differ` is the share of rows whose text is another, `changed` holds those whose answer is. Raises
    ConfigError where no gold is known, DataError where the two do not predict its rows.
    """
    files, golds = zip(*(_predictions(side) for side in (config.a, config.b)), strict=True)
    gold_file = config.gold or next(filter(None, golds), None)
    if gold_file is None:
        raise ConfigError(f"gold: neither {config.a} nor {config.b} says what it was scored against; give gold=FILE")
    sides = [read_pair(file, gold_file, config.profile) for file in files]
    gold = sides[0][1]
    profile = config.profile or profile_of(gold)
    right, *said = (answers_of(parse_predictions(rows, profile).results) for rows in (gold, *(s[0] for s in sides)))
    scores = [bootstrap(profile, right, side, draws=config.draws, seed=config.seed) for side in said]
    difference = bootstrap(profile, right, *said, draws=config.draws, seed=config.seed)
    texts = list(zip(*(side[0] for side in sides), strict=True))
    record = {
        "a": str(config.a),
        "b": str(config.b),
        "gold": str(gold_file),
        "profile": profile,
        "draws": config.draws,
        "tasks": {
            name: {"a": scores[0][name].value, "b": scores[1][name].value, "difference": asdict(interval)}
            for name, interval in difference.items()
        },
        "texts_differ": sum(a.target != b.target for a, b in texts) / len(texts),
        "changed": _changed(profile, gold, right, said, texts),
    }
    if config.output_dir is not None:
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        _write(config.output_dir, text)
    return record


def _changed(
    profile: str, gold: list[Row], right: dict[str, list[Any]], said: list[dict[str, list[Any]]], texts: list[Any]
) -> list[dict[str, Any]]:
    """The rows whose answer is another one, in the order of the file."""
    at: dict[str, int] = dict.fromkeys(right, 0)
    found = []
    for row, (a, b) in zip(gold, texts, strict=True):
        name, index = row.task_dataset, at[row.task_dataset]
        at[name] += 1
        answers = [side[name][index] for side in said]
        if answers[0] == answers[1]:
            continue
        before, after = (row_values(TASKS[profile][name], [right[name][index]], [answer])[0] for answer in answers)
        change = "better" if after > before else "worse" if after < before else "as wrong"
        found.append({"sample_id": row.sample_id, "task_dataset": name, "change": change, "a": a.target, "b": b.target,
                      "gold": row.target})  # fmt: skip
    return found


def _predictions(side: str) -> tuple[str | Path, str | None]:
    """The file of predictions that a side stands for, and the gold that it was scored against, where it is known."""
    if not storage.exists(side):
        raise OutputError(f"{side}: no such file or directory; give a directory of scores or predictions, or a file")
    for directory in (storage.join(side), storage.join(side, "scores")):
        if storage.exists(storage.join(directory, "scores.json")):
            with storage.reading(storage.join(directory, "scores.json")) as stream:
                record = json.load(stream)
            inputs = {name: record.get("inputs", {}).get(name) for name in ("predictions", "gold")}
            found = manifest.check(directory, "scores")
            for name, path in inputs.items():
                if path is None or not storage.exists(path) or manifest.fingerprint(path) != found.inputs.get(name):
                    raise OutputError(f"{directory}: its {name} ({path}) is gone or changed; score again")
            return str(inputs["predictions"]), str(inputs["gold"])
    file = storage.join(side, PREDICTIONS)
    return (file if storage.exists(file) else side), None


def _write(output_dir: str, text: str) -> None:
    place = storage.workplace(output_dir)
    place.mkdir(parents=True, exist_ok=True)
    (place / "comparison.json").write_text(text, encoding="utf-8")
    if storage.is_uri(output_dir):
        storage.upload(place / "comparison.json", storage.join(output_dir, "comparison.json"))
