from paddock.tasks.entities import parse_entities

CHOICES = ["疾病", "药物"]


def read(text):
    problems = []
    return [(e["type"], e["entity"]) for e in parse_entities(text, CHOICES, problems)], problems


def test_entities_in_the_order_of_the_choices():
    text = "上述句子中的实体包含：\n药物实体：奥司他韦\n疾病实体：流感， 肺炎 ，"
    assert read(text) == ([("疾病", "流感"), ("疾病", "肺炎"), ("药物", "奥司他韦")], [])


def test_half_width_colon_leaves_the_prefix_and_comma_does_not_split():
    assert read("疾病实体:流感")[0] == [("疾病", "疾病实体:流感")]
    assert read("疾病实体：流感,肺炎")[0] == [("疾病", "流感,肺炎")]


def test_other_types_and_indented_lines_are_not_read():
    assert read("科室实体：儿科\n 疾病实体：流感") == ([], [])


def test_a_choice_listed_twice_is_read_twice():
    assert len(parse_entities("疾病实体：流感", ["疾病", "疾病"], [])) == 2


def test_no_choices_is_a_problem():
    problems = []
    assert parse_entities("疾病实体：流感", None, problems) == []
    assert "answer_choices" in problems[0]
