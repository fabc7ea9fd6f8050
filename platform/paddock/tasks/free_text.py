"""Text that is compared as text: MedDG (a reply) and IMCS-V2-MRG (a report in sections).

    MedDG target         多喝水，注意休息。
    MedDG answer         "多喝水，注意休息。"

    IMCS-V2-MRG target   上述问诊对话的诊疗报告如下：
                         主诉：咳嗽两天。
                         诊断：上呼吸道感染。
    IMCS-V2-MRG answer   {"主诉": "咳嗽两天。", "诊断": "上呼吸道感染。"}

Standard library only: this file becomes a part of the leaderboard's post_generate_process.py.
"""

from __future__ import annotations


def parse_reply(text: str, choices: list[str] | None, problems: list[str]) -> str:
    """The text without the space around it."""
    return text.strip()


def parse_report(text: str, choices: list[str] | None, problems: list[str]) -> dict[str, str]:
    """Section name -> its line.

    As the benchmark does: the first line is lost even where it begins a section, the last of two equal
    sections counts, of a line that repeats its own name the part after the last, and what a section says
    in further lines is lost.
    """
    lines = text.strip().split("\n")[1:]
    report = {}
    for name in ("主诉", "现病史", "辅助检查", "既往史", "诊断", "建议"):
        for line in lines:
            if line.startswith(f"{name}："):
                report[name] = line.strip().split(f"{name}：")[-1].strip()
    return report
