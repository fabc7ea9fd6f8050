"""Causal triples: CMedCausal (v2).

    target           因果关系三元组如下：
                     头实体：流感；尾实体：发热
                     条件关系三元组如下：
                     头实体：免疫低下；尾三元组：头实体：流感；尾实体：肺炎；关系：因果关系
    answer           [{"predicate": "因果关系", "subject": "流感", "object": "发热"},
                      {"predicate": "条件关系", "subject": "免疫低下；尾三元组：", "object": {...}}]

Standard library only: this file becomes a part of the leaderboard's post_generate_process.py.
"""

from __future__ import annotations

from typing import Any


def parse_causality(text: str, choices: list[str] | None, problems: list[str]) -> list[dict[str, Any]]:
    """One triple a line; where a condition holds for a cause, the tail is a triple itself.

    As the benchmark does: a condition's subject keeps a trailing `；尾三元组：` (its gold answers do too).
    A line with a part missing, on which the benchmark's script dies, empties the whole answer.
    """
    triples: list[dict[str, Any]] = []
    relation = None
    for raw_line in text.split("\n"):
        line = raw_line.strip()
        if "因果关系三元组如下" in line:
            relation = "因果关系"
        elif "条件关系三元组" in line:
            relation = "条件关系"
        elif "上下位关系" in line:
            relation = "上下位关系"
        elif "给定的文本没有指定关系的三元组" in line:
            break
        elif line:
            try:
                tail = _nested_triple(line) if relation == "条件关系" else line.split("；尾实体：")[1]
                triples.append({"predicate": relation, "subject": _head(line), "object": tail})
            except (IndexError, ValueError):
                problems.append(f"not a triple: {line[:60]!r}")
                return []
    return triples


def _head(text: str) -> str:
    return text.split("头实体：")[1].split("；尾实体：", maxsplit=1)[0]


def _nested_triple(line: str) -> dict[str, str]:
    inner = line.split("；尾三元组：")[1]
    tail = inner.split("；尾实体：")[1].split("；关系：")[0]
    if inner.split("；关系：")[1] != "因果关系":
        raise ValueError(inner)
    return {"predicate": "因果关系", "subject": _head(inner), "object": tail}
