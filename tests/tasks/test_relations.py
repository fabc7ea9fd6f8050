from paddock.tasks.relations import parse_relations


def read(text):
    return [tuple(t.values()) for t in parse_relations(text, ["病因"], [])]


def test_triples():
    text = (
        "具有病因关系的头尾实体对如下：头实体为流感，尾实体为病毒。头实体为肺炎，尾实体为细菌。\n"
        "具有相关（症状）关系的头尾实体对如下："
    )
    assert read(text) == [("病因", "流感", "病毒"), ("病因", "肺炎", "细菌")]


def test_the_predicate_is_not_looked_up():
    assert read("具有瞎编关系的头尾实体对如下：头实体为甲，尾实体为乙。") == [("瞎编", "甲", "乙")]


def test_two_characters_are_dropped_unseen():
    # Without 具有 the predicate loses its own first two characters, and the prefix stays in the head.
    assert read("病因关系的头尾实体对如下：头实体为甲，尾实体为乙。") == [("", "病因关系的头尾实体对如下：甲", "乙")]


def test_without_the_marker_the_line_is_the_predicate():
    assert read("头实体为甲，尾实体为乙") == [("体为甲，尾实体为乙", "甲", "乙")]


def test_a_half_width_comma_before_the_tail_loses_the_triple():
    assert read("具有病因关系的头尾实体对如下：头实体为流感,尾实体为病毒。") == []


def test_what_follows_a_second_tail_is_lost():
    assert read("具有病因关系的头尾实体对如下：头实体为甲，尾实体为乙，尾实体为丙。") == [("病因", "甲", "乙")]


def test_no_choices_is_a_problem():
    problems = []
    assert parse_relations("", None, problems) == []
    assert problems
