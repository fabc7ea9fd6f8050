from paddock.tasks.events import parse_events

LEAD = "上述句子中的临床发现事件如下：\n"
NOTHING = {"主体词": "", "发生状态": "", "描述词": [], "解剖部位": []}


def read(text):
    return parse_events(text, None, [])


def test_an_event():
    text = LEAD + "主体词：咳嗽；发生状态：否定；描述词：夜间， 阵发，；解剖部位："
    assert read(text) == [{"主体词": "咳嗽", "发生状态": "否定", "描述词": ["夜间", "阵发"], "解剖部位": []}]


def test_the_first_line_is_lost_whatever_it_holds():
    assert read("主体词：咳嗽；发生状态：；描述词：；解剖部位：") == []


def test_a_trailing_newline_is_an_empty_event():
    assert read(LEAD + "主体词：咳嗽\n") == [{**NOTHING, "主体词": "咳嗽"}, NOTHING]


def test_the_last_of_two_equal_fields_counts():
    assert read(LEAD + "主体词：咳嗽；主体词：发热")[0]["主体词"] == "发热"


def test_a_name_after_a_name_fills_both():
    assert read(LEAD + "主体词：描述词：夜间，阵发") == [
        {**NOTHING, "主体词": "描述词：夜间，阵发", "描述词": ["夜间", "阵发"]}
    ]


def test_a_space_before_a_field_or_a_half_width_separator_loses_it():
    assert read(LEAD + "主体词：咳嗽； 描述词：夜间") == [{**NOTHING, "主体词": "咳嗽"}]
    assert read(LEAD + "主体词:咳嗽") == [NOTHING]
