"""The answer that was meant: what a strict reading loses to format.

The benchmark's parsers take a text by the letter. Here the usual slips are undone first: half-width punctuation,
space around lines, a missing first line, a label with words around it. It tells how many points better
format would bring; it is never the score.
"""

from __future__ import annotations

import re
from typing import Any

from paddock.tasks import TASKS, parse_answer

# Tasks whose first line is dropped unread, and how a line begins that should not have been.
_CONTENT = {
    "CHIP-CDEE": re.compile("主体词：|发生状态：|描述词：|解剖部位："),
    "IMCS-V2-MRG": re.compile("(主诉|现病史|辅助检查|既往史|诊断|建议)："),
    "CHIP-MDCFNPC": re.compile("[^：]+：[^：]+$"),
    "IMCS-V2-SR": re.compile("[^：]+：[^：]+$"),
}
_ENDS = " 。．.，,；;：:！!\"'“”"


def lenient_answer(profile: str, task: str, text: str, choices: list[str] | None) -> Any:
    """What a text answers when its slips are forgiven."""
    if TASKS[profile][task].is_label:
        text = _label(text, choices or [])
    elif task != "MedDG":
        for half, full in (":：", ",，", ";；"):
            if task != "Text2DT":  # there they are Python's
                text = text.replace(half, full)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if task in _CONTENT and lines and _CONTENT[task].match(lines[0]):
            lines.insert(0, "")
        if task == "CHIP-CDN":
            lines = [line.strip(_ENDS) for line in lines]
        text = "\n".join(lines)
        # A report is stripped before its first line is dropped, which must not be the one that was put in.
        text = f"：{text}" if text.startswith("\n") else text
    return parse_answer(profile, task, text, choices)[0]


def _label(text: str, choices: list[str]) -> str:
    """The one choice that a text names, or the text."""
    text = text.strip(_ENDS + "\n")
    if text in choices:
        return text
    named = [choice for choice in choices if choice in text]
    # 不相关 names 相关 too.
    named = [c for c in dict.fromkeys(named) if not any(c != other and c in other for other in named)]
    return named[0] if len(named) == 1 else text
