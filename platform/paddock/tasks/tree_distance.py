"""How far a decision tree is from the right one: Text2DT's `tree_lenv_radio`, as the benchmark computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Node = Mapping[str, Any]
Children = Mapping[int, tuple[int, int]]

_NO_NODE: Node = {"role": "", "logical_rel": "null", "triples": ()}
_MAX_LINKS = 101


def tree_lenv_ratio(gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
    """1 - distance / size over all rows. 1 for equal trees, and without a lower bound.

    The size of a tree is the number of its distinct triples and twice the number of its nodes that have
    triples, which is why nodes without any can take the ratio below 0.
    """
    distance = size = 0
    for gold_nodes, predicted_nodes in zip(gold, predicted, strict=True):
        row = distance_and_size(gold_nodes, predicted_nodes)
        distance, size = distance + row[0], size + row[1]
    if not size:  # the benchmark divides by it
        return {"tree_lenv_radio": float(not distance)}
    return {"tree_lenv_radio": 1 - distance / size}


def distance_and_size(gold: Sequence[Any], predicted: Sequence[Any]) -> tuple[int, int]:
    """What one row adds to both."""
    right, said = _lowered(gold), _lowered(predicted)
    return tree_distance(said, right), _size(said) + _size(right)


def tree_distance(predicted: Sequence[Node], gold: Sequence[Node]) -> int:
    """Walk both trees from their roots; what hangs below one where the other ends counts in full."""
    trees = (predicted, gold)
    below = (children(predicted), children(gold))
    distance = 0
    pairs = [(0, 0)]
    while pairs:
        pair = pairs.pop()
        distance += node_distance(predicted[pair[0]], gold[pair[1]])
        inner = [pair[side] in below[side] for side in (0, 1)]
        if all(inner):
            pairs += zip(below[0][pair[0]], below[1][pair[1]], strict=True)
        elif any(inner):
            side = inner.index(True)
            surplus = list(below[side][pair[side]])
            while surplus:
                node = surplus.pop()
                distance += node_distance(trees[side][node], _NO_NODE)
                surplus += below[side].get(node, ())
    return distance


def node_distance(a: Node, b: Node) -> int:
    """1 for another role, 1 for another relation, and 1 for each triple that only one of them has."""
    differs = (a["role"] != b["role"]) + (a["logical_rel"] != b["logical_rel"])
    return int(differs) + len(set(a["triples"]) ^ set(b["triples"]))


def children(nodes: Sequence[Node]) -> dict[int, tuple[int, int]]:
    """Index of a condition -> the indices of its two branches, from the roles in pre-order.

    Again and again the first C that has two D after it, and no C before the second, takes them as its
    branches and is a D from then on. What never finds its two stays without.
    """
    roles = [node["role"] for node in nodes]
    found: dict[int, tuple[int, int]] = {}
    while roles[0] != "D" and len(found) < _MAX_LINKS:
        link = _first_link(roles)
        if link is None:
            break
        parent, left, right = link
        found[parent] = (left, right)
        roles[parent] = "D"
        roles[parent + 1 : right + 1] = ["X"] * (right - parent)
    return found


def _first_link(roles: Sequence[str]) -> tuple[int, int, int] | None:
    """The first C with two D after it, and where these stand."""
    for parent, role in enumerate(roles):
        if role != "C":
            continue
        decisions = []
        for place in range(parent + 1, len(roles)):
            if roles[place] == "C":
                break
            if roles[place] == "D":
                decisions.append(place)
            if len(decisions) == 2:
                return parent, decisions[0], decisions[1]
    return None


def _lowered(nodes: Sequence[Node]) -> list[Node]:
    return [{**node, "triples": [tuple(part.lower() for part in t) for t in node["triples"]]} for node in nodes]


def _size(nodes: Sequence[Node]) -> int:
    return len({t for node in nodes for t in node["triples"]}) + 2 * sum(1 for n in nodes if n["triples"])
