"""Row -> token ids, and generated text -> answer: the one place that training, HTTP and batch share.

The prompt is BOS, then a template filled with the row; the completion is the target, one newline, EOS.
BOS and EOS are added here as ids. Text that comes from a user is encoded with its special tokens split,
so that a `</s>` in it stays five characters and never ends or restarts a turn.

    <s>问：\\n{input}\\n答：\\n  ->  {target}\\n</s>            (`promptcblue`, the benchmark's reference recipe)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paddock import storage
from paddock.data import Row
from paddock.errors import ConfigError, DataError, ModelError

# A response with this header holds texts that went through `answer` already.
ANSWERED = "x-paddock-answered"
# The reference recipe takes its own answer cue out of the input, which 3 of 4 benchmark rows end in.
_CUE = "答："

TEMPLATES: Mapping[str, str] = {
    "promptcblue": "问：\n{input}\n答：\n",
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes"
        " the request.\n\n### Instruction:\n{instruction}\n{input}\n\n### Response:\n"
    ),
}
_SLOT = re.compile(r"\{(instruction|input)\}")


@dataclass(frozen=True)
class Template:
    """A prompt with the slots `{input}` and, if it likes, `{instruction}`."""

    text: str

    @property
    def takes_instruction(self) -> bool:
        return "{instruction}" in self.text

    def render(self, row: Row) -> str:
        """The prompt's text, without BOS. Slots are filled once: braces in a row are only text.

        Raises DataError where the row has an instruction that the template would drop.
        """
        if row.instruction.strip() and not self.takes_instruction:
            raise DataError(
                f"row {row.sample_id}: has an instruction, and the prompt template has no {{instruction}} slot for it;"
                " set prompt.template=alpaca, or a file with both slots"
            )
        text = clean_input(row.input) if _CUE in self.text else row.input.strip()
        slots = {"instruction": row.instruction.strip(), "input": text}
        return _SLOT.sub(lambda slot: slots[slot.group(1)], self.text)


def load_template(name: str) -> Template:
    """A template by name, or from a UTF-8 file. Raises ConfigError where it is neither or has no `{input}`."""
    if name in TEMPLATES:
        return Template(TEMPLATES[name])
    if not storage.exists(name):
        raise ConfigError(f"prompt.template: {name!r} is neither a file nor one of {', '.join(TEMPLATES)}")
    try:
        text = storage.fetch(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt.template: {name} cannot be read as UTF-8 text ({error}); save it as such") from None
    if "{input}" not in text:
        raise ConfigError(f"prompt.template: {name} has no {{input}} slot, so every row would get the same prompt")
    return Template(text)


def clean_input(text: str) -> str:
    """The input as the reference recipe trains with it: its answer cue removed, stripped before and after.

    For templates that write the cue themselves; to any other it is a part of the text.
    """
    return text.strip().replace(_CUE, "").strip()


def encode(tokenizer: Any, text: str) -> list[int]:
    """BOS and the ids of a text from outside, in which no special token is recognised."""
    if tokenizer.bos_token_id is None:
        raise ModelError("the tokenizer has no BOS token; a LLaMA tokenizer names it in tokenizer_config.json")
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [tokenizer.bos_token_id, *ids]


def prompt_ids(tokenizer: Any, template: Template, row: Row) -> list[int]:
    """The ids that the model is given for a row, BOS first."""
    return encode(tokenizer, template.render(row))


def example_ids(tokenizer: Any, template: Template, row: Row) -> tuple[list[int], list[int]]:
    """Prompt ids and completion ids (with EOS) of a training row.

    The completion is what remains of ids(prompt + completion) after ids(prompt): encoded alone it would
    begin with a word-start piece that generation never sees. Raises DataError where the two do not split
    there (a template that does not end at a token boundary).
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token; a model trained without one never stops")
    prompt = template.render(row)
    before = encode(tokenizer, prompt)
    both = encode(tokenizer, f"{prompt}{row.target.strip()}\n")
    if both[: len(before)] != before:
        raise DataError(
            f"row {row.sample_id}: prompt and completion share a token; let the prompt template end in a newline"
        )
    return before, [*both[len(before) :], tokenizer.eos_token_id]


def answer(text: str) -> str:
    """Generated text -> the answer that is parsed.

    Takes off the completion's one closing newline, and the one leading space that decoding a completion
    alone adds: nothing more, for the benchmark's parser reads other answers from other whitespace.
    """
    return text.removeprefix(" ").removesuffix("\n")


def unanswer(text: str) -> str:
    """The shortest text whose `answer` is this one: for an answer that is going to go through `answer` again."""
    return " " * text.startswith(" ") + text + "\n" * text.endswith("\n")
