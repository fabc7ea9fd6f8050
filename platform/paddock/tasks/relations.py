"""Relations between entities: CMeIE (v1) and CMeIE-V2 (v2).

    answer_choices   ["病因", "并发症"]
    target           具有病因关系的头尾实体对如下：头实体为流感，尾实体为流感病毒。
                     具有并发症关系的头尾实体对如下：头实体为流感，尾实体为肺炎。头实体为流感，尾实体为中耳炎。
    answer           [{"predicate": "病因", "subject": "流感", "object": "流感病毒"}, ...]

Standard library only: this file becomes a part of the leaderboard's post_generate_process.py.
"""

from __future__ import annotations


def parse_relations(text: str, choices: list[str] | None, problems: list[str]) -> list[dict[str, str]]:
    """One triple for each sentence with a head and a tail.

    As the benchmark does: a line's first two characters are dropped unseen, the predicate is not looked
    up among the choices, and without its marker the rest of the whole line is the predicate.
    """
    if choices is None:
        problems.append("answer_choices is null; relations need their list of types")
        return []
    triples = []
    for line in text.split("\n"):
        predicate = line.split("关系的头尾实体对")[0][2:].strip()
        for sentence in line.replace(f"具有{predicate}关系的头尾实体对如下：", "").split("。"):
            parts = sentence.split("，尾实体为")
            if len(parts) >= 2:
                subject = parts[0].replace("头实体为", "").strip()
                tail = parts[1].replace("尾实体为", "").strip()
                triples.append({"predicate": predicate, "subject": subject, "object": tail})
    return triples
