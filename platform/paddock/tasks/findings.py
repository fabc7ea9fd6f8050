"""Findings and what holds for each: CHIP-MDCFNPC and IMCS-V2-SR.

    answer_choices   ["患有该症状", "没有患有该症状", "无法根据上下文确定病人是否患有该症状"]
    target           当前对话中的症状及其阴阳性判断为：
                     咳嗽：患有该症状
                     发热：没有患有该症状
    answer           [{"entity": "咳嗽", "attr": "患有该症状"}, {"entity": "发热", "attr": "没有患有该症状"}]

Standard library only: this file becomes a part of the leaderboard's post_generate_process.py.
"""

from __future__ import annotations


def parse_symptoms(text: str, choices: list[str] | None, problems: list[str]) -> list[dict[str, str]]:
    """IMCS-V2-SR."""
    return _parse_findings(text, choices, problems, "无法根据上下文确定病人是否患有该症状")


def parse_findings_v1(text: str, choices: list[str] | None, problems: list[str]) -> list[dict[str, str]]:
    """CHIP-MDCFNPC in v1."""
    return _parse_findings(text, choices, problems, "无实际意义的不标注或者和病人当前的状态独立不标注")


def parse_findings_v2(text: str, choices: list[str] | None, problems: list[str]) -> list[dict[str, str]]:
    """CHIP-MDCFNPC in v2, where an attribute that is none of the choices can no longer be right."""
    return _parse_findings(text, choices, problems, "不标注")


def _parse_findings(text: str, choices: list[str] | None, problems: list[str], fallback: str) -> list[dict[str, str]]:
    """Each line after the first with exactly one full-width colon.

    As the benchmark does: the finding is stripped, its attribute is not, so that a space before it makes
    it none of the choices and the `fallback` takes its place.
    """
    findings = []
    for line in text.split("\n")[1:]:
        if line.count("：") == 1:
            if choices is None:
                problems.append("answer_choices is null; findings need the list of attributes")
                return []
            finding, attribute = line.split("：")
            attribute = attribute if attribute in choices else fallback
            findings.append({"entity": finding.strip(), "attr": attribute})
    return findings
