"""One label: CHIP-STS, CHIP-CTC, KUAKE-IR, KUAKE-QIC, KUAKE-QQR, KUAKE-QTR and IMCS-V2-DAC.

    answer_choices   ["相关", "不相关"]
    target           不相关
    answer           "不相关"

Standard library only: this file becomes a part of the leaderboard's post_generate_process.py.
"""

from __future__ import annotations


def parse_label(text: str, choices: list[str] | None, problems: list[str]) -> str:
    """The text without the space around it. As the benchmark does, an invented label stays, and is wrong."""
    return text.strip()


def parse_same_meaning(text: str, choices: list[str] | None, problems: list[str]) -> str:
    """CHIP-STS, whose inputs ask for 是的 / 不是 or for 相同 / 不同; its gold labels are the former."""
    return {"相同": "是的", "不同": "不是"}.get(text.strip(), text.strip())
