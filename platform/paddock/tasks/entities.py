"""Entities by type: CMeEE-V2 and IMCS-V2-NER.

    answer_choices   ["疾病", "药物"]
    target           上述句子中的实体包含：
                     疾病实体：流感，肺炎
                     药物实体：奥司他韦
    answer           [{"entity": "流感", "type": "疾病"}, {"entity": "肺炎", "type": "疾病"}, ...]

Standard library only: this file becomes a part of the leaderboard's post_generate_process.py.
"""

from __future__ import annotations


def parse_entities(text: str, choices: list[str] | None, problems: list[str]) -> list[dict[str, str]]:
    """What each line of a known type lists, in the order of the types.

    As the benchmark does: a half-width comma does not part two entities, a half-width colon leaves
    the line's prefix in the first one, and a line counts for every type that it starts with.
    """
    if choices is None:
        problems.append("answer_choices is null; entities need their list of types")
        return []
    entities = []
    for choice in choices:
        for line in text.split("\n"):
            if line.startswith(f"{choice}实体"):
                mentions = line.replace(f"{choice}实体：", "").split("，")
                entities += [{"entity": m.strip(), "type": choice} for m in mentions if m.strip()]
    return entities
