"""Clinical findings as events: CHIP-CDEE.

    target           上述句子中的临床发现事件如下：
                     主体词：咳嗽；发生状态：否定；描述词：夜间，阵发；解剖部位：
    answer           [{"主体词": "咳嗽", "发生状态": "否定", "描述词": ["夜间", "阵发"], "解剖部位": []}]

Standard library only: this file becomes a part of the leaderboard's post_generate_process.py.
"""

from __future__ import annotations

from typing import Any

_FIELDS = ("主体词", "发生状态", "描述词", "解剖部位")
_LISTS = ("描述词", "解剖部位")


def parse_events(text: str, choices: list[str] | None, problems: list[str]) -> list[dict[str, Any]]:
    """One event a line after the first, each with all four fields.

    As the benchmark does: the first line is lost whatever it holds, a blank line is an event with
    nothing in it (so is what follows a trailing newline), the last of two equal fields counts, and a
    field that begins with a second name after its own fills both.
    """
    events = []
    for line in text.split("\n")[1:]:
        event: dict[str, Any] = {}
        for part in line.split("；"):
            field = part
            for name in _FIELDS:
                if field.startswith(f"{name}："):
                    field = field.replace(f"{name}：", "").strip()
                    event[name] = _listed(field) if name in _LISTS else field
        for name in _FIELDS:
            event.setdefault(name, [] if name in _LISTS else "")
        events.append(event)
    return events


def _listed(field: str) -> list[str]:
    return [word.strip() for word in field.split("，") if word.strip()]
