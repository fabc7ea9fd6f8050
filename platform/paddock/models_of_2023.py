"""What the first LLaMA models on the hub say wrong about themselves, put right by name.

Until transformers 4.28 the class was called LLaMATokenizer, its special tokens were empty strings, and BOS and EOS
stood in config.json as 0 and 1, one too low (decapoda-research/llama-7b-hf and all that was made from it). The
SentencePiece model beside them says what is right.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
from transformers import AutoTokenizer

from paddock.weights import read_object, write_object

Tokens = Mapping[str, tuple[int, str]]
"""`bos`, `eos` and `unk`: id and text."""
_OLD_TOKENIZER, _OLD_MODEL = "LLaMATokenizer", "LLaMAForCausalLM"


def special_tokens(directory: Path | None) -> Tokens:
    """Of a directory's tokenizer.model; empty where there is none to read."""
    if directory is None or not (directory / "tokenizer.model").is_file():
        return {}
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    except (OSError, RuntimeError):
        return {}  # tiktoken's file has the same name
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    return {name: (number, model.id_to_piece(number)) for name, number in ids.items() if number >= 0}


def put_right(name: str, values: Mapping[str, Any], tokens: Tokens) -> tuple[dict[str, Any], list[str]]:
    """A JSON file's content as it should be, and one line for each thing that was changed.

    name: config.json, generation_config.json, tokenizer_config.json or another, which stays. tokens: of
    `special_tokens`.
    """
    right, notes = dict(values), list[str]()

    def change(key: str, value: Any) -> None:
        notes.append(f"{name}: {key} was {right.get(key)!r} and is now {value!r}")
        right[key] = value

    if name == "tokenizer_config.json" and values.get("tokenizer_class") == _OLD_TOKENIZER:
        change("tokenizer_class", "LlamaTokenizer")
        for token, (_, text) in tokens.items():
            if not values.get(f"{token}_token"):
                change(f"{token}_token", text)
        if "add_bos_token" not in values:  # it was true where nothing was said
            change("add_bos_token", True)
    if name in ("config.json", "generation_config.json"):
        if values.get("architectures") == [_OLD_MODEL]:
            change("architectures", ["LlamaForCausalLM"])
        if "unk" in tokens and "bos" in tokens and values.get("bos_token_id") == tokens["unk"][0]:
            for token in ("bos", "eos"):
                if token in tokens:
                    change(f"{token}_token_id", tokens[token][0])
        pad = values.get("pad_token_id")
        if isinstance(pad, int) and pad < 0:
            change("pad_token_id", None)
        if "max_sequence_length" in values and "max_position_embeddings" not in values:
            change("max_position_embeddings", right.pop("max_sequence_length"))
    return right, notes


def load_tokenizer(directory: Path) -> Any:
    """A directory's tokenizer, with its configuration put right."""
    file = directory / "tokenizer_config.json"
    values = read_object(file) if file.is_file() else {}
    if values.get("tokenizer_class") != _OLD_TOKENIZER:
        return AutoTokenizer.from_pretrained(directory)
    with TemporaryDirectory() as name:
        place = Path(name)
        for beside in ("tokenizer.model", "tokenizer.json", "added_tokens.json"):
            if (directory / beside).is_file():
                shutil.copyfile(directory / beside, place / beside)
        write_object(place / file.name, put_right(file.name, values, special_tokens(directory))[0])
        return AutoTokenizer.from_pretrained(place)
