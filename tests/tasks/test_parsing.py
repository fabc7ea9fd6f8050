import json

import pytest

from paddock.tasks import PARSERS, TASKS
from paddock.tasks.parsing import convert_file, dump_results, parse_answer, parse_records

RECORD = {"sample_id": "a", "task_dataset": "MedDG", "target": "好,的:", "answer_choices": None}


def test_v1_widens_the_first_hundred_of_each_separator():
    text = "," * 101 + ":" * 101 + ";" * 101
    wide, _ = parse_answer("v1", "MedDG", text, None)
    assert wide == "，" * 100 + "," + "：" * 100 + ":" + "；" * 100 + ";"
    assert parse_answer("v2", "MedDG", text, None)[0] == text


def test_half_width_output_is_read_in_v1_only():
    text = "疾病实体:流感,肺炎"
    assert len(parse_answer("v1", "CMeEE-V2", text, ["疾病"])[0]) == 2
    assert len(parse_answer("v2", "CMeEE-V2", text, ["疾病"])[0]) == 1


def test_the_vintages_have_their_tasks():
    assert (len(PARSERS["v1"]), len(PARSERS["v2"])) == (16, 18)
    assert set(PARSERS["v2"]) - set(PARSERS["v1"]) == {"CMeIE-V2", "CMedCausal", "Text2DT"}
    assert set(PARSERS["v1"]) - set(PARSERS["v2"]) == {"CMeIE"}
    for profile, parsers in PARSERS.items():
        assert set(TASKS[profile]) == set(parsers)
        assert all(TASKS[profile][name].parse is parse for name, parse in parsers.items())


@pytest.mark.parametrize("profile", ["v1", "v2"])
def test_results_hold_every_task(profile):
    results, errors = parse_records([RECORD], profile)
    assert list(results) == list(PARSERS[profile])
    assert results["MedDG"] == [{"sample_id": "a", "answer": "好，的：" if profile == "v1" else "好,的:"}]
    assert errors == []


def test_what_cannot_be_read_is_recorded():
    record = {**RECORD, "task_dataset": "CMedCausal", "target": "junk"}
    _, errors = parse_records([record], "v2")
    assert [(e["sample_id"], e["task_dataset"]) for e in errors] == [("a", "CMedCausal")]


@pytest.mark.parametrize(("profile", "task"), [(p, t) for p in PARSERS for t in PARSERS[p]])
@pytest.mark.parametrize("text", ["", "\n", "junk", "：；，。", "实体：\n关系的头尾实体对\n：：\n", "𠀀\u2028\x00"])
def test_no_text_breaks_a_parser(profile, task, text):
    answer, _ = parse_answer(profile, task, text, ["实体", ""])
    json.dumps(answer)
    parse_answer(profile, task, text, None)


def test_convert_file_writes_what_the_benchmark_writes(tmp_path, capsys):
    bad = {**RECORD, "sample_id": "b", "task_dataset": "CMedCausal", "target": "junk"}
    lines = [json.dumps(record, ensure_ascii=False) for record in (RECORD, bad)]
    (tmp_path / "in.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    convert_file(str(tmp_path / "in.json"), str(tmp_path / "out.json"), "v2")
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert text == dump_results(json.loads(text))
    assert '"answer": "好,的:"' in text
    assert "b (CMedCausal): not a triple" in capsys.readouterr().err
