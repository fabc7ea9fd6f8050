import pytest

from paddock.tasks.causality import parse_causality


def read(text):
    problems = []
    return parse_causality(text, None, problems), problems


def test_triples_of_three_relations():
    text = (
        "因果关系三元组如下：\n 头实体：流感；尾实体：发热 \n\n"
        "上下位关系三元组如下：\n头实体：疾病；尾实体：流感\n"
        "条件关系三元组如下：\n头实体：免疫低下；尾三元组：头实体：流感；尾实体：肺炎；关系：因果关系"
    )
    inner = {"predicate": "因果关系", "subject": "流感", "object": "肺炎"}
    assert read(text) == (
        [
            {"predicate": "因果关系", "subject": "流感", "object": "发热"},
            {"predicate": "上下位关系", "subject": "疾病", "object": "流感"},
            # The benchmark's gold answers keep the marker in the subject, too.
            {"predicate": "条件关系", "subject": "免疫低下；尾三元组：", "object": inner},
        ],
        [],
    )


def test_before_any_heading_there_is_no_relation():
    assert read("头实体：甲；尾实体：乙")[0][0]["predicate"] is None


def test_a_relation_named_anywhere_makes_a_line_a_heading():
    text = "因果关系三元组如下：\n头实体：上下位关系；尾实体：乙\n头实体：甲；尾实体：乙"
    assert [t["predicate"] for t in read(text)[0]] == ["上下位关系"]


def test_nothing_after_the_line_that_says_there_is_none():
    assert read("给定的文本没有指定关系的三元组\n头实体：甲；尾实体：乙") == ([], [])


@pytest.mark.parametrize(
    "line",
    [
        "junk",
        "头实体：甲",
        "条件关系三元组如下：\n头实体：甲；尾实体：乙",
        "条件关系三元组如下：\n头实体：甲；尾三元组：头实体：乙；尾实体：丙；关系：无关",
    ],
)
def test_a_line_that_kills_the_official_parser_empties_the_answer(line):
    answer, problems = read(f"因果关系三元组如下：\n头实体：甲；尾实体：乙\n{line}")
    assert answer == []
    assert len(problems) == 1
