from paddock.tasks.terms import parse_terms

CHOICES = ["胃恶性肿瘤", "腺癌", "胃息肉"]


def read(text):
    return [term["entity"] for term in parse_terms(text, CHOICES, [])]


def test_terms_among_the_choices_sorted_and_once():
    assert read("腺癌，胃恶性肿瘤， 腺癌，流感") == sorted(["腺癌", "胃恶性肿瘤"])


def test_only_the_last_line_counts():
    assert read("腺癌\n胃息肉") == ["胃息肉"]
    assert read("腺癌\n") == []


def test_the_null_answer_and_a_half_width_comma_are_no_terms():
    assert read("没有对应的标准化实体") == []
    assert read("腺癌,胃息肉") == []


def test_no_choices_is_a_problem_only_where_there_is_something_to_choose():
    problems = []
    assert parse_terms("", None, problems) == []
    assert not problems
    assert parse_terms("腺癌", None, problems) == []
    assert problems
