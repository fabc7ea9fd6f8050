"""The demo's vocabularies: a LLaMA-style SentencePiece BPE model, and how Chinese-LLaMA grows it.

    base        <unk> <s> </s>, the 256 bytes, ASCII, some English pieces and very little Chinese
    zh-llama    base, then Chinese characters and the words of the demo's rows
    zh-alpaca   zh-llama, then [PAD]

A vocabulary only grows at its end, so that an id means the same in all three. The model files are
written piece by piece, not trained by SentencePiece, whose files record where and how they were made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from paddock.prompts import TEMPLATES

PAD = "[PAD]"
CONTROL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "▁"

# LLaMA's own vocabulary has some seven hundred Chinese characters; the demo's base has these.
_BASE_CHINESE = "，。：；、？！“”的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子"
_BASE_ENGLISH = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they"
    " which one you were all her she there would their we him been has when who will more no if out so said"
    " what up its about into than them can only other new some could time these two may then do first any my"
    " now such like our over man me even most made after also did many before must through back years where"
    " much your way well down should because each just those people how too little state good very make world"
    " still own see men work long get here between both life being under never day same another know while"
    " last might us great old year off come since against go came right used take three"
)


def base_pieces() -> list[str]:
    """The base's vocabulary without control and byte tokens."""
    printable = [chr(code) for code in range(0x21, 0x7F)]
    words = [_SPACE + word for word in f"{TEMPLATES['alpaca']} {_BASE_ENGLISH}".split() if "{" not in word]
    return _unique([_SPACE, *printable, *_BASE_CHINESE, *_byte_pair_pieces(words)])


def chinese_pieces(phrases: Iterable[str]) -> list[str]:
    """What zh-llama appends: the characters of the GB 2312 standard's first level, the most common
    3,755 in alphabetical order, and the pieces that make up the given phrases."""
    common = [bytes((row, cell)).decode("gb2312", "ignore") for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF)]
    phrases = sorted(set(phrases))
    known = set(base_pieces())
    pieces = [*common, *sorted(set("".join(phrases)) - {"\n", " "}), *_byte_pair_pieces(phrases)]
    return [piece for piece in _unique(pieces) if piece not in known]


def sentencepiece_model(pieces: Sequence[str], *, pad: bool = False) -> bytes:
    """A serialized SentencePiece BPE model of these pieces, in their order, earlier ones merged first."""
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = proto.SentencePiece.Type
    for token, kind in zip(CONTROL, (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL), strict=True):
        _append(proto, token, 0.0, kind)
    for token in _BYTES:
        _append(proto, token, 0.0, kinds.BYTE)
    for rank, piece in enumerate(pieces):
        _append(proto, piece, -float(rank), kinds.NORMAL)
    if pad:
        _append(proto, PAD, 0.0, kinds.CONTROL)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(proto.pieces)
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString(deterministic=True))


def tokenizer_config(*, pad: bool = False) -> dict[str, Any]:
    """What LLaMA's `tokenizer_config.json` says."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "pad_token": PAD if pad else None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }


def special_tokens_map(*, pad: bool = False) -> dict[str, str]:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {**tokens, "pad_token": PAD} if pad else tokens


def _append(proto: Any, piece: str, score: float, kind: Any) -> None:
    entry = proto.pieces.add()
    entry.piece, entry.score, entry.type = piece, score, kind


def _unique(pieces: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(piece for piece in pieces if piece))


def _byte_pair_pieces(phrases: Iterable[str]) -> list[str]:
    """Byte-pair encoding run to its end: every phrase becomes one piece, by way of the most frequent pairs."""
    split = [list(phrase) for phrase in phrases]
    pieces = []
    while pairs := Counter(pair for parts in split for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        pieces.append("".join(best))
        split = [_merge(parts, best) for parts in split]
    return pieces


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
