"""Rouge of Chinese text, equal to the benchmark's (transformers' BasicTokenizer, rouge_chinese 1.0.3)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

# What the benchmark puts in the place of a text without a token, on both sides.
_NOTHING = ["无", "。"]


def rouge_of_texts(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Mean Rouge F over the rows."""
    return _mean_rouge(zip(gold, predicted, strict=True))


def rouge_of_sections(gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
    """Mean Rouge F over every section of every gold report; a section only predicted costs nothing."""
    pairs = zip(gold, predicted, strict=True)
    return _mean_rouge((text, said.get(name, "")) for right, said in pairs for name, text in right.items())


def rouge_l(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """F of the longest common subsequence of two token sequences, neither of them empty."""
    common = common_subsequence(gold, predicted)
    return _f(common / len(predicted), common / len(gold))


def rouge_n(gold: Sequence[str], predicted: Sequence[str], n: int) -> float:
    """F of the sets of n-grams."""
    right, said = _ngrams(gold, n), _ngrams(predicted, n)
    common = len(right & said)
    return _f(common / len(said) if said else 0.0, common / len(right) if right else 0.0)


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    Bit-parallel: a column of the dynamic programme is one integer, a bit for each token of the shorter
    sequence that is 0 where the length grows. Source: Hyyro, Bit-parallel LCS-length computation
    revisited (2004).
    """
    short, long = sorted((a, b), key=len)
    places: dict[str, int] = {}
    for index, token in enumerate(short):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(short)) - 1
    column = full
    for token in long:
        matches = column & places.get(token, 0)
        column = (column + matches | column - matches) & full
    return len(short) - column.bit_count()


def tokens(text: str) -> list[str]:
    """Lower-cased tokens: each Chinese character and punctuation mark alone, runs of Latin and digits whole."""
    found: list[str] = _tokenizer().tokenize(text)
    return found


@functools.cache
def _tokenizer() -> Any:
    from transformers import BasicTokenizer  # only here: the other tasks need no such import

    return BasicTokenizer(tokenize_chinese_chars=True)


def _mean_rouge(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Keys as the benchmark names them; only `rougeL` counts."""
    count, totals = 0, {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for right, said in pairs:
        gold, predicted = tokens(right) or _NOTHING, tokens(said) or _NOTHING
        totals["rouge1"] += rouge_n(gold, predicted, 1)
        totals["rouge2"] += rouge_n(gold, predicted, 2)
        totals["rougeL"] += rouge_l(gold, predicted)
        count += 1
    return {name: total / count if count else 0.0 for name, total in totals.items()}


def _ngrams(sequence: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}


def _f(precision: float, recall: float) -> float:
    # The 1e-8 is why a perfect prediction scores a little less than 1.
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))
