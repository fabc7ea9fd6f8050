import pytest

from paddock.tasks.findings import parse_findings_v1, parse_findings_v2, parse_symptoms

CHOICES = ["患有该症状", "没有患有该症状"]
LEAD = "当前对话中的症状及其阴阳性判断为：\n"
UNKNOWN = "无法根据上下文确定病人是否患有该症状"


def read(text, parse=parse_symptoms):
    return [(f["entity"], f["attr"]) for f in parse(text, CHOICES, [])]


def test_findings():
    assert read(LEAD + " 咳嗽 ：患有该症状\n发热：没有患有该症状") == [
        ("咳嗽", "患有该症状"),
        ("发热", "没有患有该症状"),
    ]


def test_the_first_line_is_lost():
    assert read("咳嗽：患有该症状") == []


def test_lines_without_exactly_one_colon_are_not_read():
    assert read(LEAD + "咳嗽\n医生：咳嗽：患有该症状\n发热:患有该症状") == []


def test_a_space_before_the_attribute_makes_it_the_fallback():
    assert read(LEAD + "咳嗽： 患有该症状") == [("咳嗽", UNKNOWN)]
    assert read(LEAD + "咳嗽：患有该症状 ") == [("咳嗽", UNKNOWN)]


@pytest.mark.parametrize(
    ("parse", "fallback"),
    [
        (parse_symptoms, UNKNOWN),
        (parse_findings_v1, "无实际意义的不标注或者和病人当前的状态独立不标注"),
        (parse_findings_v2, "不标注"),
    ],
)
def test_the_fallback_of_each_task_and_vintage(parse, fallback):
    assert read(LEAD + "咳嗽：瞎编", parse) == [("咳嗽", fallback)]


def test_no_choices_is_a_problem():
    problems = []
    assert parse_symptoms(LEAD + "咳嗽：患有该症状", None, problems) == []
    assert problems
