import time
from dataclasses import replace
from pathlib import Path

import pytest

from paddock.data import Row, read_rows
from paddock.demo.rows import make_rows
from paddock.errors import DataError
from paddock.scoring import parse_predictions, profile_of, score, task_of
from paddock.tasks import TASKS

TOY = Path(__file__).parents[2] / "shared" / "data" / "promptcblue_toy" / "train.json"
TREE = '节点：role=D；logical_rel=null；triples=[("流感", "治疗药物", "奥司他韦")]'
V2_ROWS = [
    Row("文本", "因果关系三元组如下：\n头实体：流感；尾实体：发热", None, "", "CMedCausal", "c-1"),
    Row("文本", TREE, None, "", "Text2DT", "t-1"),
]


@pytest.fixture(scope="module")
def gold():
    """Rows of all sixteen tasks."""
    return make_rows(0)["test"]


def as_v2(rows):
    return [replace(r, task_dataset="CMeIE-V2") if r.task_dataset == "CMeIE" else r for r in rows] + V2_ROWS


def scored(predicted, gold, profile="v1"):
    return score(parse_predictions(predicted, profile).results, gold, profile)


def test_a_perfect_prediction_of_v1(gold):
    scores = scored(gold, gold)
    # The two Rouge tasks have 2 / (2 + 1e-8), the others 1.
    assert scores.overall == pytest.approx(99.9999999375, abs=1e-10)
    assert scores.tasks_missing == []
    for name, task in scores.tasks.items():
        assert task.score == pytest.approx(1, abs=1e-8), name


def test_a_perfect_prediction_of_v2(gold):
    rows = as_v2(gold)
    scores = scored(rows, rows, "v2")
    assert len(scores.tasks) == 18
    assert scores.overall == pytest.approx((16 + 2 * 2 / (2 + 1e-8)) / 18 * 100, abs=1e-10)


def test_saying_nothing_scores_little_and_breaks_nothing(gold):
    parsed = parse_predictions([replace(r, target="") for r in gold], "v1")
    scores = score(parsed.results, gold, "v1")
    assert 0 <= scores.overall < 10
    assert scores.tasks["CMeEE-V2"].score == 0
    # An empty label counts as the task's first one, which is sometimes right.
    assert scores.tasks["KUAKE-IR"].score > 0
    assert sum(h.empty_texts for h in parsed.health.values()) == len(gold)


def test_the_official_output(gold):
    official = scored(gold, gold).official()
    names = official["scoreJson"]
    assert official["success"] is True
    assert official["score"] == names["score"]
    assert len(names) == 17
    assert {"CMeIE-Micro-F1", "CHIP-STS-Micro-F1", "KUAKE-QIC-Macro-F1", "MedDG-RougeL", "IMCS-V2-MRG-RougeL"} < set(
        names
    )
    assert {"CMeIE-V2-Micro-F1", "CMedCausal-Micro-F1", "Text2DT-TreeLenvRatio"} < {
        task.official_name for task in TASKS["v2"].values()
    }


def test_the_overall_score_is_the_plain_mean_over_tasks(gold):
    # Every answer to one task of sixteen is wrong: 1/16 is lost, however many rows it has.
    predicted = [replace(r, target="瞎编") if r.task_dataset == "CHIP-CTC" else r for r in gold]
    assert scored(predicted, gold).overall == pytest.approx(100 * 15 / 16, abs=1e-6)


def test_a_file_of_some_tasks_says_which(gold):
    some = [r for r in gold if r.task_dataset in ("KUAKE-IR", "CHIP-CDN")]
    record = scored(some, some).as_record()
    assert record["tasks_scored"] == ["CHIP-CDN", "KUAKE-IR"]
    assert len(record["tasks_missing"]) == 14
    assert record["score"] == pytest.approx(100)


def test_results_hold_every_task_in_the_order_of_the_file(gold):
    results = parse_predictions(gold, "v1").results
    assert len(results) == 16
    for name, answers in results.items():
        assert [a["sample_id"] for a in answers] == [r.sample_id for r in gold if r.task_dataset == name]


def test_health():
    rows = [
        Row("问", "是的", ("相同", "不同"), "", "CHIP-STS", "1"),
        Row("问", "也许", ("相同", "不同"), "", "CHIP-STS", "2"),
        Row("问", " ", ("相同", "不同"), "", "CHIP-STS", "3"),
        Row("问", "junk", None, "", "CMedCausal", "4"),
        Row("问", "", None, "", "Text2DT", "5"),
    ]
    health = parse_predictions(rows, "v2", truncated={"2"}).health
    same = health["CHIP-STS"]
    assert (same.rows, same.empty_texts, same.empty_answers, same.out_of_list, same.truncated) == (3, 1, 1, 1, 1)
    assert (health["CMedCausal"].problems, health["CMedCausal"].empty_answers) == (1, 1)
    assert health["Text2DT"].empty_answers == 1
    assert parse_predictions(rows, "v2").health["CHIP-STS"].truncated is None


def test_gold_without_a_target_cannot_be_scored(gold):
    unanswered = [replace(gold[0], target=" "), *gold[1:]]
    with pytest.raises(DataError, match=f"'{gold[0].sample_id}' has an empty target"):
        scored(gold, unanswered)
    with pytest.raises(DataError, match="no rows"):
        scored(gold, [])


def test_gold_that_cannot_be_read_is_told():
    gold = [replace(V2_ROWS[0], target="junk")]
    scores = scored(gold, gold, "v2")
    assert [e["sample_id"] for e in scores.gold_errors] == ["c-1"]
    assert scores.overall == 0


def test_answers_of_other_rows_are_refused(gold):
    results = parse_predictions(gold, "v1").results
    answers = results["MedDG"]
    with pytest.raises(DataError, match=r"MedDG: 9 answers for 10 gold rows"):
        score({**results, "MedDG": answers[:-1]}, gold, "v1")
    with pytest.raises(DataError, match=r"MedDG: answer 1 is of row"):
        score({**results, "MedDG": answers[::-1]}, gold, "v1")
    with pytest.raises(DataError, match=r"MedDG: 0 answers for 10"):
        score({name: a for name, a in results.items() if name != "MedDG"}, gold, "v1")


def test_profile_of(gold):
    assert profile_of(gold) == "v1"
    assert profile_of(as_v2(gold)) == "v2"
    assert profile_of([r for r in gold if r.task_dataset == "MedDG"]) == "v1"
    with pytest.raises(DataError, match="mix tasks of v1 and v2"):
        profile_of([*gold, *V2_ROWS])
    with pytest.raises(DataError, match="'Foo' is no task of the benchmark"):
        profile_of([Row("x", task_dataset="Foo")])


def test_task_of(gold):
    assert task_of(gold[0], "v1").name == gold[0].task_dataset
    with pytest.raises(DataError, match="'c-1': task_dataset 'CMedCausal' is no task of profile v1; it is one of"):
        task_of(V2_ROWS[0], "v1")
    with pytest.raises(DataError, match="known are CMeEE-V2"):
        parse_predictions([Row("x", task_dataset="Foo")], "v1")


@pytest.mark.skipif(not TOY.is_file(), reason="the benchmark's toy rows are not here")
def test_the_benchmark_s_own_gold_is_read_without_an_error():
    rows = read_rows(TOY, require_target=True)
    parsed = parse_predictions(rows, "v1")
    assert parsed.errors == []
    assert score(parsed.results, rows, "v1").overall == pytest.approx(99.9999999375, abs=1e-10)
    assert not any(health.empty_texts for health in parsed.health.values())


def test_ten_thousand_rows_in_twenty_seconds(gold):
    rows = [replace(gold[i % len(gold)], sample_id=str(i)) for i in range(10_320)]
    # A model that does not stop: long texts are what costs time.
    predicted = [replace(r, target=(r.target + "，多喝水") * (512 // (len(r.target) + 4) + 1)) for r in rows]
    start = time.process_time()
    scored(predicted, rows)
    assert time.process_time() - start < 20
