"""Standard terms for a finding: CHIP-CDN.

    answer_choices   ["胃恶性肿瘤", "腺癌", "胃息肉"]
    target           胃恶性肿瘤，腺癌
    answer           [{"entity": "胃恶性肿瘤", "type": "normalization"}, {"entity": "腺癌", ...}]

Standard library only: this file becomes a part of the leaderboard's post_generate_process.py.
"""

from __future__ import annotations


def parse_terms(text: str, choices: list[str] | None, problems: list[str]) -> list[dict[str, str]]:
    """The choices that the last line names, sorted (the benchmark leaves their order to chance).

    As the benchmark does: only the last line counts, so a trailing newline loses every term.
    """
    terms = {w.strip() for w in text.rsplit("\n", maxsplit=1)[-1].split("，") if w.strip()}
    if choices is None and terms:
        problems.append("answer_choices is null; terms need the list they are chosen from")
    return [{"entity": w, "type": "normalization"} for w in sorted(terms.intersection(choices or ()))]
