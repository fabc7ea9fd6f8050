"""The embedded default: the same bytes everywhere, a vocabulary that only grows, rows worth learning."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaForCausalLM

from paddock import prompts
from paddock.data import FIELDS, Row, read_rows
from paddock.demo import make_assets
from paddock.demo.rows import ROWS_PER_TASK
from paddock.scoring import parse_predictions, score
from paddock.tasks import TASKS

BASE, ZH_LLAMA, ZH_ALPACA = "base", "adapters/zh-llama", "adapters/zh-alpaca"
TEMPLATE = prompts.load_template("promptcblue")


def load_tokenizer(assets: Path, name: str) -> Any:
    return AutoTokenizer.from_pretrained(assets / name)


def load_split(assets: Path, split: str) -> list[Row]:
    return read_rows(assets / "data" / f"{split}.json", require_target=True, unique_ids=True)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_a_seed_gives_the_same_bytes_in_any_directory(assets: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    make_assets(tmp_path / "another" / "place")
    torch.set_num_threads(threads)
    assert contents(tmp_path / "another" / "place") == contents(assets)


def test_another_seed_gives_other_rows_and_weights(assets: Path, tmp_path: Path) -> None:
    make_assets(tmp_path, seed=1)
    assert (tmp_path / "data/test.json").read_bytes() != (assets / "data/test.json").read_bytes()
    assert (tmp_path / "base/model.safetensors").read_bytes() != (assets / "base/model.safetensors").read_bytes()


def test_no_file_knows_where_it_was_made(assets: Path) -> None:
    places = [str(assets), str(Path.cwd()), str(Path.home()) + "/"]
    for name, content in contents(assets).items():
        assert not [place for place in places if place.encode() in content], name


@pytest.mark.parametrize("name", [BASE, ZH_LLAMA, ZH_ALPACA])
@pytest.mark.parametrize(
    "text", ["头痛\n咳嗽，\n\n答：\n", "a  b\n\tc", "龘鿍😀é", "<0x0A> [PAD] 3.5mg/日", "鼻\r\n炎"]
)
def test_any_text_survives_the_tokenizer(assets: Path, name: str, text: str) -> None:
    tokenizer = load_tokenizer(assets, name)
    ids = prompts.encode(tokenizer, text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", [BASE, ZH_LLAMA, ZH_ALPACA])
def test_control_tokens_in_a_text_stay_text(assets: Path, name: str) -> None:
    tokenizer = load_tokenizer(assets, name)
    first, *rest = prompts.encode(tokenizer, "a</s>b<s>c<unk>[PAD]")
    assert first == tokenizer.bos_token_id == 1
    assert not {0, 1, 2, tokenizer.pad_token_id} & set(rest)


def test_the_tokenizer_is_llamas(assets: Path) -> None:
    tokenizer = load_tokenizer(assets, BASE)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("x")["input_ids"][0] == 1, "BOS is added by default"
    assert tokenizer.convert_ids_to_tokens([3, 258]) == ["<0x00>", "<0xFF>"]
    assert not {*range(3, 259)} & {*tokenizer.all_special_ids}, "bytes are ordinary vocabulary"


def test_the_vocabulary_only_grows(assets: Path) -> None:
    tokens = []
    for name in (BASE, ZH_LLAMA, ZH_ALPACA):
        tokenizer = load_tokenizer(assets, name)
        tokens.append(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    base, zh_llama, zh_alpaca = tokens
    assert zh_llama[: len(base)] == base
    assert len(zh_llama) > len(base)
    assert zh_alpaca == [*zh_llama, "[PAD]"]
    assert len(set(zh_alpaca)) == len(zh_alpaca)


def test_transformers_reads_the_model_file_as_sentencepiece_does(assets: Path) -> None:
    tokenizer = load_tokenizer(assets, ZH_ALPACA)
    processor = SentencePieceProcessor(model_file=str(assets / ZH_ALPACA / "tokenizer.model"))
    texts = [TEMPLATE.render(row) + row.target for row in load_split(assets, "test")]
    for text in [*texts, *(text[3:] for text in prompts.TEMPLATES.values()), "龘 two  spaces\n"]:
        assert prompts.encode(tokenizer, text)[1:] == processor.encode(text)


def test_the_context_holds_a_long_chinese_row(assets: Path) -> None:
    """The benchmark's longest row has 1,846 characters; 512 tokens are generated after it."""
    config = json.loads((assets / BASE / "config.json").read_text())
    every_third = [chr(code) for code in range(0x4E00, 0x9FFF) if len(chr(code).encode("gb2312", "ignore")) == 2][::3]
    text = "".join(every_third[:1846])
    assert len(text) == 1846
    assert len(prompts.encode(load_tokenizer(assets, ZH_ALPACA), text)) + 512 <= config["max_position_embeddings"]


def test_metas_weights_are_the_same_ones(assets: Path) -> None:
    params = json.loads((assets / "base_meta/params.json").read_text())
    config = json.loads((assets / BASE / "config.json").read_text())
    width, multiple = int(2 * (4 * params["dim"]) / 3), params["multiple_of"]
    assert multiple * ((width + multiple - 1) // multiple) == config["intermediate_size"]

    meta = torch.load(assets / "base_meta/consolidated.00.pth", weights_only=True)
    ours = load_file(assets / BASE / "model.safetensors")
    heads, dim = params["n_heads"], params["dim"]

    def permute(weight: torch.Tensor) -> torch.Tensor:
        """As in transformers' convert_llama_weights_to_hf.py."""
        return weight.view(heads, dim // heads // 2, 2, dim).transpose(1, 2).reshape(dim, dim)

    converted = {
        "model.embed_tokens.weight": meta.pop("tok_embeddings.weight"),
        "model.norm.weight": meta.pop("norm.weight"),
        "lm_head.weight": meta.pop("output.weight"),
    }
    for layer in range(params["n_layers"]):
        theirs, here = f"layers.{layer}", f"model.layers.{layer}"
        for name in "qk":
            weight = meta.pop(f"{theirs}.attention.w{name}.weight")
            converted[f"{here}.self_attn.{name}_proj.weight"] = permute(weight)
            assert not torch.equal(permute(weight), weight)
        for name in "vo":
            converted[f"{here}.self_attn.{name}_proj.weight"] = meta.pop(f"{theirs}.attention.w{name}.weight")
        for number, name in (("1", "gate"), ("2", "down"), ("3", "up")):
            converted[f"{here}.mlp.{name}_proj.weight"] = meta.pop(f"{theirs}.feed_forward.w{number}.weight")
        converted[f"{here}.input_layernorm.weight"] = meta.pop(f"{theirs}.attention_norm.weight")
        converted[f"{here}.post_attention_layernorm.weight"] = meta.pop(f"{theirs}.ffn_norm.weight")
    assert not meta
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], ours[name]) for name in ours)


def test_peft_loads_the_adapters_in_order(assets: Path) -> None:
    """The logits move with each adapter, and so does the vocabulary's size."""
    model: Any = LlamaForCausalLM.from_pretrained(assets / BASE)
    ids = torch.tensor([prompts.encode(load_tokenizer(assets, BASE), "患者头痛")])
    logits = [model(ids).logits]
    for name in (ZH_LLAMA, ZH_ALPACA):
        model.resize_token_embeddings(len(load_tokenizer(assets, name)), mean_resizing=False)
        model = PeftModel.from_pretrained(model, assets / name)
        factors = [weight for key, weight in model.named_parameters() if "lora_" in key]
        assert len(factors) == 4 * 7 * 2
        assert all(weight.any() for weight in factors)
        model = model.merge_and_unload()
        logits.append(model(ids).logits)
    before, middle, after = logits
    assert before.shape[-1] < middle.shape[-1] == after.shape[-1] - 1
    assert not torch.allclose(before, middle[..., : before.shape[-1]], atol=1e-3)
    assert not torch.allclose(middle, after[..., :-1], atol=1e-3)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_every_task_is_in_every_split(assets: Path, split: str) -> None:
    rows = load_split(assets, split)
    assert Counter(row.task_dataset for row in rows) == dict.fromkeys(TASKS["v1"], ROWS_PER_TASK[split])
    tasks = [row.task_dataset for row in rows]
    assert tasks != sorted(tasks), "rows are shuffled across the tasks"
    lines = (assets / "data" / f"{split}.json").read_text(encoding="utf-8").splitlines()
    assert all(tuple(json.loads(line)) == FIELDS for line in lines)


def test_no_prompt_occurs_twice(assets: Path) -> None:
    """Not in two splits, and not under another answer cue either."""
    inputs = [prompts.clean_input(row.input) for split in ROWS_PER_TASK for row in load_split(assets, split)]
    assert len(set(inputs)) == len(inputs)


def test_gold_is_read_back_and_scores_full_marks(assets: Path) -> None:
    rows = load_split(assets, "test")
    parsed = parse_predictions(rows, "v1")
    assert not parsed.errors
    empty = {name: health.empty_answers for name, health in parsed.health.items() if health.empty_answers}
    # A sentence without the one kind of entity that it is asked for: the benchmark has these, too.
    assert set(empty) <= {"IMCS-V2-NER"}
    assert sum(empty.values()) <= 4
    assert score(parsed.results, rows, "v1").overall > 99.999


def test_labels_are_balanced(assets: Path) -> None:
    """No label has more than its share, and saying each task's most frequent answer scores little."""
    train, test = load_split(assets, "train"), load_split(assets, "test")
    counts: dict[str, Counter[str]] = {task: Counter() for task in TASKS["v1"]}
    for row in train:
        counts[row.task_dataset][row.target] += 1
    for name, task in TASKS["v1"].items():
        if task.is_label:
            assert max(counts[name].values()) <= min(counts[name].values()) + 1, name
    constant = [replace(row, target=counts[row.task_dataset].most_common(1)[0][0]) for row in test]
    scores = score(parse_predictions(constant, "v1").results, test, "v1")
    assert scores.overall < 25
    assert max(task.score for name, task in scores.tasks.items() if name not in ("MedDG", "IMCS-V2-MRG")) < 0.4


def test_an_answer_comes_back_from_the_ids_that_train_it(assets: Path) -> None:
    tokenizer = load_tokenizer(assets, ZH_ALPACA)
    for row in load_split(assets, "dev"):
        prompt, completion = prompts.example_ids(tokenizer, TEMPLATE, row)
        assert prompt == prompts.prompt_ids(tokenizer, TEMPLATE, row)
        assert len(prompt) + len(completion) <= 128
        assert prompts.answer(tokenizer.decode(completion, skip_special_tokens=True)) == row.target
