"""What a training run would do, without doing it: `python -m jobs.train plan ...`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from paddock import lora, packing
from paddock.config import TrainConfig
from paddock.data import read_rows
from paddock.prompts import load_template
from paddock.train import check, run_config

# The benchmark's rule: PEFT modules together have at most this share of the backbone's parameters.
_BENCHMARK_SHARE = 0.01


def plan_text(config: TrainConfig) -> str:
    """Rows, tokens, blocks, steps and parameters, for a person. Nothing is written, no GPU and no Ray are needed.

    Raises what `train` would raise for the configuration and its inputs.
    """
    check(config)
    tokenizer, template = lora.load_tokenizer(config.model.path), load_template(config.prompt.template)
    rows = read_rows(config.data.train or "", config.data.format, require_target=True)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "train.parquet"
        report = packing.pack(tokenizer, template, rows, config.train.max_seq_length, file)
    batch = run_config(config)["train"]["global_batch_size"]
    trainable, total = lora.check_targets(config.model, config.lora)
    share = trainable / (total - trainable)
    lines = [
        f"model        {config.model.path}",
        f"rows         {report.rows} of {len(rows)}, {report.tokens} tokens,"
        f" {report.supervised_tokens / report.tokens:.1%} of them supervised",
        f"truncated    {_by_task(report.truncated)}",
        f"dropped      {_by_task(report.dropped)}",
        f"blocks       {report.blocks} of {config.train.max_seq_length} tokens, fill {report.fill:.1%}",
        f"steps        {config.train.max_steps} of {batch} blocks on {config.scaling.num_workers} worker(s),"
        f" {config.train.max_steps * batch / report.blocks:.1f} epochs",
        f"parameters   {trainable:,} trainable, {share:.2%} of the backbone's {total - trainable:,}",
    ]
    if share > _BENCHMARK_SHARE:
        lines.append(
            f"warning: PromptCBLUE allows {_BENCHMARK_SHARE:.0%} of the backbone; lower lora.r or modules_to_save"
        )
    return "\n".join(lines)


def _by_task(counts: dict[str, int]) -> str:
    return ", ".join(f"{task} {count}" for task, count in sorted(counts.items())) or "none"
