import pytest

from paddock.tasks.labels import parse_label, parse_same_meaning


def test_a_label_is_stripped_and_an_invented_one_stays():
    assert parse_label(" 相关\n", ["相关", "不相关"], []) == "相关"
    assert parse_label("相关。", ["相关", "不相关"], []) == "相关。"


@pytest.mark.parametrize(
    ("text", "label"),
    [("相同", "是的"), (" 不同\n", "不是"), ("是的", "是的"), ("是", "是"), ("是的。", "是的。"), ("", "")],
)
def test_same_meaning(text, label):
    assert parse_same_meaning(text, None, []) == label
