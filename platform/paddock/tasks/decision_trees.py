"""Decision trees in pre-order, one node a line: Text2DT (v2).

    target           根据给定的指南文本抽取的诊疗决策树如下：
                     条件节点：role=C；logical_rel=and；triples=[("病人", "临床表现", "发热")]
                     决策节点：role=D；logical_rel=null；triples=[("病人", "治疗药物", "布洛芬")]
                     决策节点：role=D；logical_rel=null；triples=[]
    answer           [{"role": "C", "logical_rel": "and", "triples": [["病人", "临床表现", "发热"]]}, ...]

Standard library only: this file becomes a part of the leaderboard's post_generate_process.py.
"""

from __future__ import annotations

import ast
import warnings
from typing import Any

MAX_TRIPLES_CHARACTERS = 20_000


def parse_tree(text: str, choices: list[str] | None, problems: list[str]) -> list[dict[str, Any]]:
    """The nodes of a tree; a single decision that says nothing where there are none.

    The benchmark's script hands a node's triples to eval(). Here they are read as a literal, and what is
    not one is a problem and no triples. A line without a role, on which that script dies, empties the tree.
    """
    nothing = [{"role": "D", "logical_rel": "null", "triples": []}]
    nodes = []
    for line in text.split("\n"):
        if not line or "根据给定的指南文本抽取的诊疗决策树" in line:
            continue
        if "：role=" not in line:
            problems.append(f"a node without a role: {line[:60]!r}")
            return nothing
        role = line.split("：role=")[1].split("；logical_rel=")[0]
        after = line.split("；logical_rel=")
        relation = after[1].split("；triples=")[0] if len(after) > 1 else "null"
        given = line.split("；triples=")
        triples = _read_triples(given[1], problems) if len(given) > 1 else []
        nodes.append({"role": role, "logical_rel": relation, "triples": triples})
    return nodes or nothing


def _read_triples(text: str, problems: list[str]) -> list[Any]:
    """A literal list's items of length three. Their parts must be text, or the benchmark cannot score them.

    A string of three characters counts as a triple, as it does there.
    """
    try:
        if len(text) > MAX_TRIPLES_CHARACTERS:
            raise ValueError(f"{len(text)} characters of triples")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stray backslash in generated text is no news
            items = ast.literal_eval(text)
        triples = [item for item in items if len(item) == 3] if isinstance(items, list) else []
        if not all(isinstance(t, (str, list, tuple)) and all(isinstance(w, str) for w in t) for t in triples):
            raise ValueError("a triple that is not text")
        # Half a surrogate pair, written as an escape, cannot be written to a file.
        "".join(w for t in triples for w in t).encode()
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        problems.append(f"triples that cannot be read ({type(error).__name__}): {text[:60]!r}")
        return []
    return [t if isinstance(t, str) else list(t) for t in triples]
