import pytest

from paddock.tasks.metrics import label_f1, set_f1


def entity(name, kind="疾病"):
    return {"entity": name, "type": kind}


def test_set_f1_counts_over_all_rows():
    gold = [[entity("流感"), entity("肺炎")], [entity("胃炎")]]
    predicted = [[entity("流感"), entity("鼻炎")], []]
    # 1 matched, 1 invented, 2 missed
    assert set_f1(gold, predicted) == {"precision": 1 / 2, "recall": 1 / 3, "f1": pytest.approx(0.4)}


def test_equal_items_of_a_row_count_once():
    assert set_f1([[entity("流感")]], [[entity("流感"), entity("流感")]])["f1"] == 1


def test_without_a_match_all_is_zero():
    assert set_f1([[]], [[]])["f1"] == 0
    assert set_f1([[entity("流感")]], [[entity("流感", "药物")]]) == {"precision": 0, "recall": 0, "f1": 0}


def test_keys_do_not_count_but_the_order_of_inner_lists_does():
    assert set_f1([[{"a": "x", "b": "y"}]], [[{"b": "y", "a": "x"}]])["f1"] == 1
    assert set_f1([[{"a": "x", "b": "y"}]], [[{"c": "x", "d": "y"}]])["f1"] == 1
    assert set_f1([[{"描述词": ["甲", "乙"]}]], [[{"描述词": ["乙", "甲"]}]])["f1"] == 0


def test_case_and_width_count():
    assert set_f1([[entity("CT")]], [[entity("ct")]])["f1"] == 0
    assert set_f1([[entity("A")]], [[entity("Ａ")]])["f1"] == 0


def test_macro_is_over_the_labels_that_occur():
    gold, predicted = ["甲", "甲", "乙"], ["甲", "丙", "乙"]
    # 甲: p 1, r 1/2, f 2/3; 乙: 1; 丙, only predicted: 0
    numbers = label_f1(gold, predicted, blank="甲", average="macro")
    assert numbers["macro-precision"] == pytest.approx(2 / 3)
    assert numbers["macro-recall"] == pytest.approx(0.5)
    assert numbers["macro-f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_weighted_is_by_the_number_in_gold():
    gold, predicted = ["甲", "甲", "乙"], ["甲", "丙", "乙"]
    numbers = label_f1(gold, predicted, blank="甲", average="weighted")
    assert numbers == {
        "precision": pytest.approx(1),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx((2 * 2 / 3 + 1) / 3),
    }


def test_an_empty_prediction_counts_as_the_first_label():
    assert label_f1(["甲", "乙"], ["", "乙"], blank="甲", average="macro")["macro-f1"] == 1
    assert label_f1(["甲", "乙"], ["甲", ""], blank="甲", average="macro")["macro-f1"] < 1


@pytest.mark.parametrize(
    ("average", "numbers"),
    [
        # sklearn 1.5.2: classification_report(gold, predicted, output_dict=True, zero_division=0)
        ("macro", [0.6, 0.5333333333333333, 0.5266666666666666]),
        ("weighted", [0.8125, 0.625, 0.675]),
    ],
)
def test_labels_equal_to_sklearn(average, numbers):
    found = label_f1(list("甲乙丙甲甲乙丁丁"), list("甲丙丙乙甲乙丁戊"), blank="甲", average=average)
    assert list(found.values()) == pytest.approx(numbers, abs=1e-12)
