"""Which adapter is best: each answers the dev rows, is scored, and stands on one curve.

    OUTPUT_DIR/checkpoint-100/            its predictions, and scores/ in them
    OUTPUT_DIR/sweep.json, report.html    the curve, with the best

All that vLLM can serve unmerged share one engine on one base. The others are merged into it, one at a time, and the
merged model goes again when it has answered. Cut short and started again, a sweep goes on where it was.

At a URI the adapters' directories go there by themselves; the sweep's own files are written on this machine first.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from paddock import cluster, manifest, storage, unmerged
from paddock.charts import Point
from paddock.clients import Client
from paddock.config import MergeConfig, PredictConfig, ScoreConfig
from paddock.data import Row, content_hash, read_rows
from paddock.errors import ConfigError, OutputError
from paddock.evaluation import score_files
from paddock.merge import merge
from paddock.predict import answering, ledger_key, predict
from paddock.report import Run, write_report
from paddock.scoring import parse_predictions, profile_of, score
from paddock.submission import PREDICTIONS

_KEY = "sweep-key.json"


def sweep(config: PredictConfig) -> dict[str, Any]:
    """Predict and score `data.dev` with every adapter; returns what sweep.json says.

    Raises a PaddockError before anything starts for what is wrong with rows, model or adapters.
    """
    gold_file, gold = _gold(config)
    found = expand(config.adapters)
    base = config.base().path
    output = storage.join(config.output_dir)
    manifest.apart(output, base, gold_file, *found.values())
    runs = {name: _run(config, name, adapter, gold_file) for name, adapter in found.items()}
    why = {name: unmerged.why_not(adapter, base) for name, adapter in found.items()}
    key = ledger_key(config.model_copy(update={"adapters": ()}), [replace(row, target="") for row in gold])
    key["data"] = content_hash(gold)
    with manifest.locked(output):
        _claim(output, {**key, "adapters": {name: manifest.fingerprint(path) for name, path in found.items()}}, config)
        storage.remove(storage.join(output, manifest.NAME))
        new = {n: config.predict.retry_quarantined or not _is_scored(run) for n, run in runs.items()}
        served = [found[name] for name, reason in why.items() if reason is None]
        # Their service ends before the first merged model needs its room.
        with ExitStack() as stack:
            client = functools.cache(functools.partial(_one_service, stack, config, served))
            for name, run in runs.items():
                if new[name] and why[name] is None:
                    print(f"{name}: unmerged", flush=True)
                    predict(run, client)
        for name, run in runs.items():
            if new[name] and why[name] is not None:
                print(f"{name}: {why[name]}; merged for the time", flush=True)
                _predict_merged(run, base, found[name])
        records = {n: _score(run, gold_file, profile_of(gold), overwrite=new[n]) for n, run in runs.items()}
        for name, scored in records.items():
            print(f"{name}: {scored['score']:.2f}", flush=True)
        record = _finish(config, gold, found, why, records)
    if config.merge_best is not None:
        best = found[record["best"]]
        merge(MergeConfig(base_model=base, lora_model=(best,), output_dir=config.merge_best))
    return record


def score_adapter(config: PredictConfig, gold_file: str) -> dict[str, Any]:
    """Let `config.adapter` answer rows, `config.data.test`, whose targets are in `gold_file`; returns what scores.json
    says, which is in OUTPUT_DIR/scores. An adapter that cannot be served unmerged is merged for the time."""
    adapter, base = config.adapter or "", config.base().path
    reason = unmerged.why_not(adapter, base)
    if reason is None:
        predict(config)
    else:
        print(f"{adapter}: {reason}; merged for the time", flush=True)
        _predict_merged(config, base, adapter)
    return _score(config, gold_file, profile_of(read_rows(gold_file)), overwrite=False)


def expand(adapters: tuple[str, ...]) -> dict[str, str]:
    """Name -> adapter directory, for directories and patterns, in the order of the numbers in their names.

    Raises ConfigError for a pattern that fits no adapter.
    """
    paths: list[str] = []
    for pattern in adapters:
        if not re.search(r"[*?\[]", pattern):
            paths.append(pattern)
            continue
        place, _, last = pattern.rstrip("/").rpartition("/")
        names = [name for name in storage.children(place) if fnmatch.fnmatchcase(name, last) and name[:1] != "."]
        fit = [f"{place}/{n}" for n in names if storage.exists(storage.join(place, n, "adapter_config.json"))]
        if not fit:
            raise ConfigError(f"adapters: {pattern}: fits no directory with an adapter_config.json; check the pattern")
        paths += sorted(fit, key=_natural)
    found: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        *_, parent, name = path.rstrip("/").split("/")
        name = name if name not in found else f"{parent}-{name}"
        if name in found:
            raise ConfigError(f"adapters: {path} and {found[name]} have one name; rename one")
        found[name] = path
    return found


def _natural(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _gold(config: PredictConfig) -> tuple[str, list[Row]]:
    """The rows to score on: `data.dev`, or `data.test` where only that is given and it has targets."""
    if config.target_url is not None or config.adapter is not None or config.adapter_by_task:
        raise ConfigError("adapters: a sweep tries each by itself; leave target_url, adapter and adapter_by_task out")
    if config.data.dev is not None and config.data.test is not None:
        raise ConfigError("data.test: a sweep scores data.dev; predict the test rows with adapter=BEST afterwards")
    file = config.data.dev or config.data.test
    if file is None:
        raise ConfigError("data.dev: is required; give the rows that adapters are scored on as data.dev=FILE")
    if config.data.format != "promptcblue":
        raise ConfigError(f"data.format: {config.data.format}: only the benchmark's rows can be scored")
    rows = read_rows(file, require_target=True, unique_ids=True)
    profile_of(rows)
    return file, rows


def _run(config: PredictConfig, name: str, adapter: str, gold_file: str) -> PredictConfig:
    data = config.data.model_copy(update={"dev": None, "test": gold_file})
    changed = {"adapters": (), "merge_best": None, "adapter": adapter, "data": data, "overwrite": False}
    return config.model_copy(update={**changed, "output_dir": str(storage.join(config.output_dir, name))})


def _claim(output: str | Path, key: dict[str, Any], config: PredictConfig) -> None:
    """Make the directory this sweep's. Raises OutputError where it is somebody else's; more adapters may come."""
    file = storage.join(output, _KEY)
    claimed = storage.exists(file)
    if not claimed and any(name[:1] != "." for name in storage.children(output)):
        raise OutputError(f"{output}: holds files but no {_KEY}; choose another output_dir")
    if config.overwrite:
        storage.remove(output)
    elif claimed:
        with storage.reading(file) as stream:
            before = json.load(stream)
        earlier, adapters = before.pop("adapters"), key["adapters"]
        changed = [name for name in before if before[name] != key.get(name)]
        changed += [name for name in earlier if name in adapters and earlier[name] != adapters[name]]
        if changed:
            raise OutputError(
                f"{output}: holds a sweep of another {', '.join(changed)}; choose another place or overwrite=true"
            )
        key = {**key, "adapters": {**earlier, **adapters}}
    storage.write_text(file, _pretty(key))


def _one_service(stack: ExitStack, config: PredictConfig, adapters: list[str]) -> Callable[[], Client]:
    """One engine with all adapters, started with the first row that needs it and stopped with the sweep."""
    started = cluster.connect()
    stack.callback(cluster.disconnect, started)
    arguments = {**unmerged.engine_args(adapters, by_turns=True), **config.serve.engine}
    serve = config.serve.model_copy(update={"engine": arguments})
    return stack.enter_context(answering(config.model_copy(update={"serve": serve})))


def _is_scored(run: PredictConfig) -> bool:
    """Whether nothing is to be done for an adapter; then neither is a service to be started."""
    scores = storage.join(run.output_dir, "scores")
    return manifest.read(run.output_dir) is not None and manifest.read(scores) is not None


def _predict_merged(run: PredictConfig, base: str, adapter: str) -> None:
    """By a merged model beside the output, where replicas on other nodes find it too."""
    place = storage.join(storage.parent(run.output_dir), f".merged-{Path(run.output_dir).name}")
    merge(MergeConfig(base_model=base, lora_model=(adapter,), output_dir=str(place), prove_prompts=0))
    model = run.base().model_copy(update={"path": str(place)})
    predict(run.model_copy(update={"model": model, "adapter": None}))
    storage.remove(place)


def _score(run: PredictConfig, gold_file: str, profile: Any, overwrite: bool) -> dict[str, Any]:
    predictions, output = f"{run.output_dir}/{PREDICTIONS}", f"{run.output_dir}/scores"
    return score_files(
        ScoreConfig(predictions=predictions, gold=gold_file, profile=profile, output_dir=output, overwrite=overwrite)
    )


def _finish(
    config: PredictConfig,
    gold: list[Row],
    found: dict[str, str],
    why: dict[str, str | None],
    records: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """sweep.json, the report, and the manifest that commits them."""
    output, profile = storage.join(config.output_dir), profile_of(gold)
    points = [Point(name, r["score"], r["interval"]["low"], r["interval"]["high"]) for name, r in records.items()]
    best = max(points, key=lambda point: point.value)
    record = {
        "best": best.name,
        "best_adapter": found[best.name],
        "score": best.value,
        "interval": {"low": best.low, "high": best.high},
        "curve": [{**vars(p), "adapter": found[p.name], "merged_because": why[p.name]} for p in points],
    }
    shown = []
    for name in dict.fromkeys([points[0].name, best.name]):
        rows = read_rows(storage.join(output, name, PREDICTIONS))
        parsed = parse_predictions(rows, profile)
        shown.append(Run(name, rows, parsed, score(parsed.results, gold, profile)))
    provenance = {"model": config.base().path, "best adapter": found[best.name], "configuration": config.hashed()}
    inputs = {name: manifest.fingerprint(path) for name, path in found.items()}
    with _written(output) as directory:
        storage.write_text(directory / "sweep.json", _pretty(record))
        title = f"Sweep: {Path(output).name}"
        write_report(directory / "report.html", title, shown, gold, curve=points, provenance=provenance)
        manifest.commit(directory, "sweep", config.hashed(), inputs, {"best": best.name, "score": best.value})
    return record


@contextmanager
def _written(output: str | Path) -> Iterator[Path]:
    """A directory on this machine, with the sweep's key in it, whose files go to where the sweep stands: the manifest
    last, and what is there already stays."""
    if not storage.is_uri(output):
        yield Path(output)
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        shutil.copyfile(storage.fetch(storage.join(output, _KEY)), directory / _KEY)
        yield directory
        storage.upload(directory, output, but=(manifest.NAME,))
        storage.upload(directory / manifest.NAME, storage.join(output, manifest.NAME))


def _pretty(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, indent=2) + "\n"
