import random

import pytest

from paddock.tasks.rouge import common_subsequence, rouge_l, rouge_n, rouge_of_sections, rouge_of_texts, tokens


def slow_common_subsequence(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def test_common_subsequence_equals_the_plain_table():
    rng = random.Random(0)
    for _ in range(500):
        a, b = ([rng.choice("甲乙丙丁") for _ in range(rng.randint(0, 70))] for _ in range(2))
        assert common_subsequence(a, b) == slow_common_subsequence(a, b)


def test_tokens():
    assert tokens("体温38.5 CT检查É，好。") == ["体", "温", "38", ".", "5", "ct", "检", "查", "e", "，", "好", "。"]


def test_a_perfect_text_scores_a_little_less_than_one():
    assert rouge_of_texts(["多喝水。"], ["多喝水。"])["rougeL"] == 2 / (2 + 1e-8)


def test_rouge_l_by_hand():
    # The common subsequence of 多喝水 and 喝温水 is 喝水: p = r = 2/3.
    assert rouge_l("多喝水", "喝温水") == pytest.approx(2 / 3)


def test_rouge_n_is_over_sets():
    assert rouge_n("甲甲乙", "甲乙乙", 1) == pytest.approx(1)
    assert rouge_n("甲甲乙", "甲乙乙", 2) == pytest.approx(0.5)
    assert rouge_n("甲", "甲", 2) == 0


def test_an_empty_text_is_replaced_on_both_sides():
    assert rouge_of_texts(["好。"], [""])["rougeL"] == pytest.approx(0.5)  # 好。 against 无。
    assert rouge_of_texts([""], [""])["rougeL"] == pytest.approx(1)


def test_a_mean_over_rows():
    assert rouge_of_texts(["甲", "乙"], ["甲", "丙"])["rougeL"] == pytest.approx(0.5)


def test_sections_are_those_of_gold():
    gold = [{"主诉": "甲", "诊断": "乙"}, {"主诉": "丙"}]
    predicted = [{"主诉": "甲", "建议": "junk"}, {"主诉": "丙"}]
    # Three pairs: two right, one missing.
    assert rouge_of_sections(gold, predicted)["rougeL"] == pytest.approx(2 / 3)


def test_no_pairs():
    assert rouge_of_sections([{}], [{}])["rougeL"] == 0


def test_equal_to_rouge_chinese():
    # rouge_chinese 1.0.3: Rouge().get_scores(avg=True) of the tokens, joined by spaces
    numbers = rouge_of_texts(["建议多喝水，注意休息。有事再来？"], ["注意多休息。多喝温水吧？好"])
    assert numbers == {
        "rouge1": 0.6428571379591838,
        "rouge2": 0.2962962913580247,
        "rougeL": 0.4137930985017836,
    }
