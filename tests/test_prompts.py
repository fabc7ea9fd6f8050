"""The prompt's ids, the completion's ids, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paddock import lora, prompts
from paddock.data import Row, read_rows
from paddock.errors import ConfigError, DataError

TEMPLATE = prompts.load_template("promptcblue")
ROW = Row(input="  感冒吃什么药？\n答：", target=" 多喝水，休息。 ", sample_id="a-1")


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Any:
    return lora.load_tokenizer(base_model)


def test_the_prompt_is_the_reference_recipe(tokenizer: Any) -> None:
    assert TEMPLATE.render(ROW) == "问：\n感冒吃什么药？\n答：\n"
    ids = prompts.prompt_ids(tokenizer, TEMPLATE, ROW)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]).removeprefix(" ") == "问：\n感冒吃什么药？\n答：\n"


def test_every_cue_is_taken_out_and_the_rest_stripped_again() -> None:
    assert prompts.clean_input("答：甲答：\n乙 \n答：") == "甲\n乙"


def test_the_completion_is_the_tail_and_ends(tokenizer: Any) -> None:
    prompt, completion = prompts.example_ids(tokenizer, TEMPLATE, ROW)
    assert prompt == prompts.prompt_ids(tokenizer, TEMPLATE, ROW)
    assert completion[-1] == tokenizer.eos_token_id
    whole = prompts.encode(tokenizer, TEMPLATE.render(ROW) + "多喝水，休息。\n")
    assert prompt + completion[:-1] == whole


def test_the_way_back_gives_every_target(tokenizer: Any, assets: Path) -> None:
    for row in read_rows(assets / "data" / "train.json")[:300]:
        _, completion = prompts.example_ids(tokenizer, TEMPLATE, row)
        text = tokenizer.decode(completion, skip_special_tokens=True)
        assert prompts.answer(text) == row.target.strip()


@pytest.mark.parametrize("text", ["多喝水", "龘靐 😀", "a\nb", "尾部空格", "x\ty", "（１）：，；。"])
def test_the_way_back_gives_rare_characters(tokenizer: Any, text: str) -> None:
    _, completion = prompts.example_ids(tokenizer, TEMPLATE, Row(input="问题", target=text))
    assert prompts.answer(tokenizer.decode(completion, skip_special_tokens=True)) == text


def test_only_one_closing_newline_is_taken_off() -> None:
    assert prompts.answer("甲\n\n") == "甲\n"
    assert prompts.answer(" 甲 \n") == "甲 "


@pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "甲</s>乙<s>", "[PAD]"])
def test_text_never_becomes_a_control_token(tokenizer: Any, text: str) -> None:
    row = Row(input=f"问题{text}", target=f"回答{text}")
    prompt, completion = prompts.example_ids(tokenizer, TEMPLATE, row)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert special.isdisjoint(prompt[1:])
    assert special.isdisjoint(completion[:-1])
    assert prompts.answer(tokenizer.decode(completion[:-1])) == f"回答{text}"


def test_braces_in_a_row_are_text() -> None:
    template = prompts.load_template("alpaca")
    text = template.render(Row(instruction="{input}", input="{instruction} {0} %s"))
    assert "### Instruction:\n{input}\n{instruction} {0} %s\n" in text


def test_a_template_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Q: {input}\nA:\n", encoding="utf-8")
    template = prompts.load_template(str(file))
    assert template.render(Row(input="x")) == "Q: x\nA:\n"
    assert not template.takes_instruction
    file.write_text("no slot", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no \{input\} slot"):
        prompts.load_template(str(file))
    with pytest.raises(ConfigError, match="neither a file nor one of promptcblue, alpaca"):
        prompts.load_template("promptcblu")


def test_a_template_that_ends_inside_a_token_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="share a token"):
        prompts.example_ids(tokenizer, prompts.Template("{input}感"), Row(input="x", target="冒", sample_id="r"))


def test_an_instruction_is_never_dropped() -> None:
    with pytest.raises(DataError, match=r"row a-1: has an instruction.*prompt.template=alpaca"):
        TEMPLATE.render(Row(input="x", instruction="translate", sample_id="a-1"))


def test_only_a_template_that_writes_the_cue_takes_it_out() -> None:
    assert prompts.Template("Q: {input}\nA:\n").render(Row(input=" 他回答：好。 ")) == "Q: 他回答：好。\nA:\n"


def test_a_template_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes("问：{input}".encode("gbk"))
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        prompts.load_template(str(file))
