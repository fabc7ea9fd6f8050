"""Everything in one run: what `make demo` does, stage by stage, with the time that each takes.

assets -> base -> train -> merge -> serve + predict + HTTP (tuned) -> serve + predict (base) -> score
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
from ray import serve

from paddock import cluster, engine, manifest, prompts, service, storage
from paddock.config import DemoConfig, MergeConfig, PredictConfig, TrainConfig
from paddock.data import Row, read_rows
from paddock.demo.prepare import ensure
from paddock.errors import ConfigError
from paddock.ledger import Ledger
from paddock.merge import merge
from paddock.ports import free_port
from paddock.predict import ledger_key, predict, read_test
from paddock.report import Run, write_report
from paddock.scoring import parse_predictions, profile_of, score
from paddock.submission import ARCHIVE, PREDICTIONS, RESULTS
from paddock.trainer import check, check_config, train

_HOST = "127.0.0.1"


@dataclass
class Summary:
    """What `summary.json` says."""

    rows: int = 0
    predicted: int = 0
    quarantined: int = 0
    base_score: float | None = None
    """Of 100: the model before tuning, served alike. Null where the test rows have no gold."""
    tuned_score: float | None = None
    checkpoint: str = ""
    served_equals_handle: bool = False
    """Whether `/generate` and `/v1/completions` gave the very texts that the handle gave."""
    merged_vs_adapter: dict[str, float] = field(default_factory=dict)
    """The checkpoint on its base, by PEFT, against the model merged from both."""
    report: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tell that a stage begins, and keep how long it took."""
        print(f"\n== {name}", flush=True)
        begun = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begun, 1)


def run(config: DemoConfig) -> Summary:
    """Train, merge, serve, predict and score; write `summary.json` and `report.html` into `output_dir`."""
    if storage.is_uri(config.output_dir):
        raise ConfigError(f"output_dir: {config.output_dir}: the demo writes to a local directory; its jobs take URIs")
    output = Path(config.output_dir)
    summary = Summary(report=str(output / "report.html"))
    if config.data.format != "promptcblue":
        raise ConfigError(f"data.format: {config.data.format}: the demo scores the benchmark's rows; use promptcblue")
    with summary.stage("assets"):
        check_config(config)
        ensure(config)
        check(config)
        gold = _gold(config)
    started = cluster.connect()
    try:
        # What is asked for after the training is refused before it.
        service.application(_predict_config(config, "base", config.model.path).service())
        if not started and serve.status().applications:
            raise ConfigError("Serve already runs applications on this cluster; start the demo with RAY_ADDRESS=local")
        with summary.stage("train"):
            summary.checkpoint = str(train(_train_config(config)))
        with summary.stage("merge"):
            tuned = merge(_tuned(config, summary.checkpoint))
            proof = manifest.check(tuned, "model").extra["merged_vs_adapter"]
            summary.merged_vs_adapter = {name: proof[name] for name in ("max_abs_logit_diff", "top1_agreement")}
        http = {"host": _HOST, "port": free_port()}
        runs = [_predict(config, "tuned", str(tuned), gold, http, summary)]
        if gold:
            runs.insert(0, _predict(config, "base", config.model.path, gold, http, summary))
    finally:
        cluster.disconnect(started)
    with summary.stage("report"):
        # The submission stands beside the summary, where one looks first.
        for name in (PREDICTIONS, RESULTS, ARCHIVE):
            shutil.copyfile(output / "predictions" / "tuned" / name, output / name)
        write_report(
            summary.report,
            f"Paddock: {output.name}",
            runs,
            gold,
            provenance=_provenance(config, tuned),
            seconds=summary.seconds,
        )
    if gold:
        base_scores, tuned_scores = (run.scores for run in runs)
        summary.base_score = base_scores.overall if base_scores else None
        summary.tuned_score = tuned_scores.overall if tuned_scores else None
    (output / "summary.json").write_text(
        json.dumps(asdict(summary), ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    print(_table(summary, output), flush=True)
    return summary


def _gold(config: DemoConfig) -> list[Row]:
    """The test rows with their targets, which only scoring reads; none where they have none."""
    predicting = _predict_config(config, "base", config.model.path)
    ledger_key(predicting, read_test(predicting))
    rows = read_rows(config.data.test or "", config.data.format, unique_ids=True)
    return rows if all(row.target.strip() for row in rows) else []


def _train_config(config: DemoConfig) -> TrainConfig:
    """What `jobs.train` would read: how the result is predicted later is no part of the run."""
    return TrainConfig(**{name: getattr(config, name) for name in TrainConfig.model_fields})


def _tuned(config: DemoConfig, checkpoint: str) -> MergeConfig:
    return MergeConfig(
        base_model=config.model.path,
        lora_model=(checkpoint,),
        output_dir=f"{config.output_dir}/models/tuned",
        overwrite=config.overwrite,
    )


def _predict_config(config: DemoConfig, name: str, model: str) -> PredictConfig:
    return PredictConfig(
        data=config.data,
        prompt=config.prompt,
        model=config.model.model_copy(update={"path": model}),
        serve=config.serve,
        predict=config.predict,
        output_dir=f"{config.output_dir}/predictions/{name}",
        overwrite=config.overwrite,
    )


def _predict(config: DemoConfig, name: str, model: str, gold: list[Row], http: dict[str, Any], summary: Summary) -> Run:
    """Serve a model, predict the test rows through its handle, and some of the tuned one's over HTTP."""
    predicting = _predict_config(config, name, model)
    with summary.stage(f"serve {name}"):
        service.start(predicting.service(), name, http_options=http)
    try:
        with summary.stage(f"predict {name}"):
            directory = predict(predicting)
        rows = read_test(predicting)
        predictions = Ledger(directory, ledger_key(predicting, rows)).predictions()
        texts = [prompts.answer(predictions[i].text) for i in range(len(rows))]
        if name == "tuned":
            summary.rows = len(rows)
            summary.quarantined = sum(p.error is not None for p in predictions.values())
            summary.predicted = summary.rows - summary.quarantined
            with summary.stage("http"):
                asked = list(zip(rows, texts, strict=True))[: config.http_rows]
                summary.served_equals_handle = _same_over_http(predicting, f"http://{_HOST}:{http['port']}", asked)
    finally:
        serve.delete(name)  # the next model gets the cores and the route
    said = [replace(row, target=text) for row, text in zip(rows, texts, strict=True)]
    profile = profile_of(rows)
    cut = {p.sample_id for p in predictions.values() if p.finish_reason == "length"}
    parsed = parse_predictions(said, profile, truncated=cut)
    return Run(name, said, parsed, score(parsed.results, gold, profile) if gold else None)


def _same_over_http(config: PredictConfig, url: str, asked: list[tuple[Row, str]]) -> bool:
    """Ask `/generate` and `/v1/completions` for some rows; whether both said what the handle said."""
    template = prompts.load_template(config.prompt.template)
    # What a request leaves out is the endpoint's default, and theirs differ.
    off = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    sampling: dict[str, Any] = {**off, **engine.sampling_params(config.predict.sampling)}
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    same = True
    for row, text in asked:
        body = {"instruction": row.instruction, "input": row.input, "parameters": sampling}
        answer = httpx.post(f"{url}/generate", json=body, timeout=300).raise_for_status().json()["generated_text"]
        # vLLM's parameters are more than the client knows.
        completion = client.completions.create(model=model, prompt=template.render(row), extra_body=sampling)
        completed = prompts.answer(completion.choices[0].text)
        print(f"{row.sample_id} ({row.task_dataset}): {text[:60]!r}", flush=True)
        if not answer == completed == text:
            print(f"  differs: /generate {answer[:60]!r}, /v1/completions {completed[:60]!r}", flush=True)
            same = False
    return same


def _provenance(config: DemoConfig, tuned: str | Path) -> dict[str, object]:
    merged = manifest.check(tuned, "model")
    return {
        "created by": merged.created_by,
        "model": merged.hash,
        "training rows": config.data.train,
        "test rows": config.data.test,
        **{f"made from {name}": value for name, value in merged.inputs.items()},
    }


def _table(summary: Summary, output: Path) -> str:
    """The last thing that a user reads: scores and times."""

    def points(value: float | None) -> str:
        return "no gold" if value is None else f"{value:.2f}"

    lines = [
        "",
        f"rows              {summary.rows} ({summary.predicted} predicted, {summary.quarantined} in quarantine)",
        f"base score        {points(summary.base_score)}",
        f"tuned score       {points(summary.tuned_score)}",
        f"HTTP = handle     {'yes' if summary.served_equals_handle else 'NO'}",
        f"merged = adapter  top-1 {summary.merged_vs_adapter['top1_agreement']:.4f},"
        f" max logit difference {summary.merged_vs_adapter['max_abs_logit_diff']:.2g}",
        "",
        *(f"{name:<18}{seconds:>7.1f} s" for name, seconds in summary.seconds.items()),
        f"{'total':<18}{sum(summary.seconds.values()):>7.1f} s",
        "",
        f"report   {summary.report}",
        f"summary  {output / 'summary.json'}",
    ]
    return "\n".join(lines)
