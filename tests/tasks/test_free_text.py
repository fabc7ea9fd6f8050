from paddock.tasks.free_text import parse_reply, parse_report

LEAD = "上述问诊对话的诊疗报告如下：\n"


def read(text):
    return parse_report(text, None, [])


def test_a_reply_is_stripped():
    assert parse_reply(" 多喝水。\n", None, []) == "多喝水。"


def test_sections():
    text = LEAD + "主诉：咳嗽两天。\n现病史：暂缺\n辅助检查：\n诊断： 感冒 \n其他：无"
    assert read(text) == {"主诉": "咳嗽两天。", "现病史": "暂缺", "辅助检查": "", "诊断": "感冒"}


def test_the_first_line_is_lost_even_where_it_is_a_section():
    assert read("主诉：咳嗽\n诊断：感冒") == {"诊断": "感冒"}
    # The text is stripped first: a blank line before the lead does not save the section.
    assert read("\n主诉：咳嗽\n诊断：感冒") == {"诊断": "感冒"}


def test_the_last_of_two_equal_sections_and_of_two_equal_names_counts():
    assert read(LEAD + "诊断：感冒\n诊断：肺炎") == {"诊断": "肺炎"}
    assert read(LEAD + "诊断：感冒，诊断：肺炎") == {"诊断": "肺炎"}


def test_indented_and_further_lines_are_lost():
    assert read(LEAD + " 主诉：咳嗽\n诊断：感冒\n轻度") == {"诊断": "感冒"}
