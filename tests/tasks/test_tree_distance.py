import pytest

from paddock.tasks.tree_distance import children, tree_distance, tree_lenv_ratio

A, B = ("病人", "临床表现", "发热"), ("病人", "治疗药物", "布洛芬")


def node(role, *triples, relation="null"):
    return {"role": role, "logical_rel": relation, "triples": list(triples)}


def tree(roles):
    return [node(role) for role in roles]


GOLD = [node("C", A, relation="and"), node("D", B), node("D")]


def ratio(predicted, gold=GOLD):
    return tree_lenv_ratio([gold], [predicted])["tree_lenv_radio"]


@pytest.mark.parametrize(
    ("roles", "links"),
    [
        ("D", {}),
        ("CDD", {0: (1, 2)}),
        ("CCDDD", {1: (2, 3), 0: (1, 4)}),
        ("CDCDD", {2: (3, 4), 0: (1, 2)}),
        ("CCC", {}),
        ("CD", {}),
        ("DCDD", {}),  # a root that is a decision ends the search before it begins
        ("EDD", {}),
        ("CEDED", {0: (2, 4)}),
    ],
)
def test_children(roles, links):
    assert children(tree(roles)) == links


def test_a_perfect_tree():
    assert ratio(GOLD) == 1


def test_case_does_not_count():
    assert ratio([node("C", ("A", "b", "c"))], [node("C", ("a", "B", "c"))]) == 1


def test_three_characters_are_a_triple_of_them():
    assert tree_lenv_ratio([[node("D", "abc")]], [[node("D", ("A", "b", "C"))]])["tree_lenv_radio"] == 1


def test_distance_by_hand():
    # The default decision against GOLD: role, relation and A at the root; each branch counts its role D
    # against none, the left one also B; size is GOLD's: 2 triples + 2 nodes with triples.
    assert tree_distance(tree("D"), GOLD) == 3 + 2 + 1
    assert ratio(tree("D")) == 1 - 6 / 6


def test_surplus_branches_of_the_prediction_count_too():
    gold = [node("D", B)]
    predicted = [node("C"), node("D"), node("D", B)]
    # root: role and B; branches: role each, and B again. Sizes: 1 + 2 each.
    assert ratio(predicted, gold) == 1 - 5 / 6


def test_nodes_without_triples_take_the_ratio_below_zero():
    gold = [node("D", B)]
    empty = tree("CCCCC" + "D" * 6)
    # root: role and B; ten more nodes: role each. Size: 3.
    assert ratio(empty, gold) == 1 - 12 / 3


def test_a_ratio_over_all_rows():
    both = tree_lenv_ratio([GOLD, GOLD], [GOLD, tree("D")])
    assert both["tree_lenv_radio"] == pytest.approx(1 - 6 / 18)


def test_trees_without_triples_have_no_size():
    assert ratio(tree("D"), tree("D")) == 1
    assert ratio(tree("C"), tree("D")) == 0
