"""The benchmark's tasks: how an answer is read, and how a task is scored.

A family of tasks is one file with its parser and a sample row; `parsing` says which parser reads which
task in which vintage (`v1`: 16 tasks, `v2`: 18); `metrics`, `rouge` and `tree_distance` are the metrics.

    task = TASKS["v1"]["KUAKE-IR"]
    task.metric(["相关"], ["不相关"])[task.score_name]      # 0.0
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paddock.tasks.metrics import label_f1, set_f1
from paddock.tasks.parsing import PARSERS, Parser, dump_results, parse_answer, parse_records
from paddock.tasks.rouge import rouge_of_sections, rouge_of_texts
from paddock.tasks.tree_distance import tree_lenv_ratio

Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
"""(gold answers, predicted answers), row by row -> named numbers."""


@dataclass(frozen=True)
class Task:
    """One task of one vintage."""

    name: str
    parse: Parser
    metric: Metric
    score_name: str
    """The number of `metric` that counts."""
    official_name: str
    """Its key in the leaderboard's scoreJson."""
    is_label: bool = False
    """Whether an answer is one of the row's `answer_choices`."""


def _set(name: str, parse: Parser) -> Task:
    return Task(name, parse, set_f1, "f1", f"{name}-Micro-F1")


def _label(name: str, parse: Parser, average: Literal["macro", "weighted"], blank: str) -> Task:
    metric = functools.partial(label_f1, blank=blank, average=average)
    # The benchmark calls the weighted mean "micro", too.
    score_name, official = ("macro-f1", "Macro-F1") if average == "macro" else ("f1", "Micro-F1")
    return Task(name, parse, metric, score_name, f"{name}-{official}", is_label=True)


def _rouge(name: str, parse: Parser, metric: Metric) -> Task:
    return Task(name, parse, metric, "rougeL", f"{name}-RougeL")


def _tasks(parsers: Mapping[str, Parser], relations: str) -> dict[str, Task]:
    """The tasks in the order in which the benchmark adds up their scores."""
    tasks = [
        *(_set(name, parsers[name]) for name in ("CMeEE-V2", relations, "CHIP-CDN", "CHIP-CDEE")),
        *(_set(name, parsers[name]) for name in ("IMCS-V2-NER", "CHIP-MDCFNPC", "IMCS-V2-SR")),
        _label("IMCS-V2-DAC", parsers["IMCS-V2-DAC"], "macro", "非上述类型"),
        _rouge("IMCS-V2-MRG", parsers["IMCS-V2-MRG"], rouge_of_sections),
        _label("CHIP-CTC", parsers["CHIP-CTC"], "macro", "非上述类型"),
        _label("CHIP-STS", parsers["CHIP-STS"], "weighted", "是的"),
        _label("KUAKE-IR", parsers["KUAKE-IR"], "weighted", "相关"),
        _label("KUAKE-QIC", parsers["KUAKE-QIC"], "macro", "非上述类型"),
        _label("KUAKE-QQR", parsers["KUAKE-QQR"], "weighted", "完全一致"),
        _label("KUAKE-QTR", parsers["KUAKE-QTR"], "weighted", "完全不匹配或者没有参考价值"),
        _rouge("MedDG", parsers["MedDG"], rouge_of_texts),
    ]
    if "Text2DT" in parsers:
        tree = parsers["Text2DT"]
        tasks.append(Task("Text2DT", tree, tree_lenv_ratio, "tree_lenv_radio", "Text2DT-TreeLenvRatio"))
        tasks.append(_set("CMedCausal", parsers["CMedCausal"]))
    return {task.name: task for task in tasks}


TASKS: Mapping[str, Mapping[str, Task]] = {
    "v1": _tasks(PARSERS["v1"], "CMeIE"),
    "v2": _tasks(PARSERS["v2"], "CMeIE-V2"),
}

__all__ = ["PARSERS", "TASKS", "Metric", "Parser", "Task", "dump_results", "parse_answer", "parse_records"]
