"""Which parser reads which task, and a whole file of predictions -> results.json.

Standard library only: with the parsers it becomes the leaderboard's post_generate_process.py, so that
there is one implementation of what an answer says. The benchmark has two vintages of that script:
`v1` (May 2023, 16 tasks) and `v2` (18 tasks); both are followed, quirk by quirk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from paddock.tasks.causality import parse_causality
from paddock.tasks.decision_trees import parse_tree
from paddock.tasks.entities import parse_entities
from paddock.tasks.events import parse_events
from paddock.tasks.findings import parse_findings_v1, parse_findings_v2, parse_symptoms
from paddock.tasks.free_text import parse_reply, parse_report
from paddock.tasks.labels import parse_label, parse_same_meaning
from paddock.tasks.relations import parse_relations
from paddock.tasks.terms import parse_terms

# (generated text, answer_choices, problems to add to) -> the structured answer
Parser = Callable[[str, list[str] | None, list[str]], Any]


def _parsers(relations: str, findings: Parser) -> dict[str, Parser]:
    """The tasks of both vintages, in the order of results.json."""
    return {
        "CMeEE-V2": parse_entities,
        relations: parse_relations,
        "CHIP-CDN": parse_terms,
        "CHIP-CDEE": parse_events,
        "CHIP-STS": parse_same_meaning,
        "CHIP-CTC": parse_label,
        "CHIP-MDCFNPC": findings,
        "KUAKE-IR": parse_label,
        "KUAKE-QIC": parse_label,
        "KUAKE-QQR": parse_label,
        "KUAKE-QTR": parse_label,
        "MedDG": parse_reply,
        "IMCS-V2-MRG": parse_report,
        "IMCS-V2-NER": parse_entities,
        "IMCS-V2-DAC": parse_label,
        "IMCS-V2-SR": parse_symptoms,
    }


PARSERS: Mapping[str, Mapping[str, Parser]] = {
    "v1": _parsers("CMeIE", parse_findings_v1),
    "v2": {
        **_parsers("CMeIE-V2", parse_findings_v2),
        "Text2DT": parse_tree,
        "CMedCausal": parse_causality,
    },
}


def parse_answer(profile: str, task: str, text: str, choices: list[str] | None) -> tuple[Any, list[str]]:
    """What a generated text answers, and what could not be read in it. Raises KeyError for another task."""
    if profile == "v1":
        for half, full in (":：", ",，", ";；"):
            text = text.replace(half, full, 100)
    problems: list[str] = []
    return PARSERS[profile][task](text, choices, problems), problems


def parse_records(
    records: Iterable[Mapping[str, Any]], profile: str
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, str]]]:
    """Rows with a generated `target` -> results.json, and what could not be read.

    The results hold every task of the profile, and of each task its rows in the order of the file.
    Raises KeyError for a row of another task.
    """
    results: dict[str, list[dict[str, Any]]] = {task: [] for task in PARSERS[profile]}
    errors = []
    for record in records:
        sample_id, task = record["sample_id"], record["task_dataset"]
        answer, problems = parse_answer(profile, task, record["target"], record["answer_choices"])
        results[task].append({"sample_id": sample_id, "answer": answer})
        errors += [{"sample_id": sample_id, "task_dataset": task, "problem": what} for what in problems]
    return results, errors


def dump_results(results: Mapping[str, Any]) -> str:
    """The text of results.json, as the benchmark writes it."""
    return json.dumps(results, ensure_ascii=False, indent=2)


def convert_file(predictions: str, results: str, profile: str) -> None:
    """`test_predictions.json` -> `results.json`; problems are told on stderr."""
    with Path(predictions).open(encoding="utf-8") as lines:
        found, errors = parse_records((json.loads(line) for line in lines if line.strip()), profile)
    Path(results).write_text(dump_results(found), encoding="utf-8", newline="\n")
    for error in errors:
        print(f"{error['sample_id']} ({error['task_dataset']}): {error['problem']}", file=sys.stderr)
