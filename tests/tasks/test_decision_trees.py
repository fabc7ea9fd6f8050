import pytest

from paddock.tasks import decision_trees
from paddock.tasks.decision_trees import parse_tree

LEAD = "根据给定的指南文本抽取的诊疗决策树如下：\n"
DEFAULT = [{"role": "D", "logical_rel": "null", "triples": []}]


def read(text):
    problems = []
    return parse_tree(text, None, problems), problems


def triples(text):
    nodes, problems = read(f"节点：role=D；logical_rel=null；triples={text}")
    return nodes[0]["triples"], bool(problems)


def test_a_tree():
    text = LEAD + (
        '条件节点：role=C；logical_rel=and；triples=[("病人", "临床表现", "发热"), ["a", "b", "c"]]\n\n'
        "决策节点：role=D；logical_rel=null；triples=[]"
    )
    assert read(text) == (
        [
            {"role": "C", "logical_rel": "and", "triples": [["病人", "临床表现", "发热"], ["a", "b", "c"]]},
            {"role": "D", "logical_rel": "null", "triples": []},
        ],
        [],
    )


def test_nothing_is_a_single_decision():
    assert read("") == (DEFAULT, [])
    assert read(LEAD) == (DEFAULT, [])


def test_a_line_without_a_role_empties_the_tree():
    assert read("节点：role=C；logical_rel=and；triples=[]\njunk") == (DEFAULT, ["a node without a role: 'junk'"])


def test_without_a_relation_the_role_swallows_the_rest():
    line = '节点：role=C；triples=[("a", "b", "c")]'
    nodes, _ = read(line)
    assert nodes == [{"role": 'C；triples=[("a", "b", "c")]', "logical_rel": "null", "triples": [["a", "b", "c"]]}]


def test_only_items_of_length_three_count_and_three_characters_are_a_triple():
    assert triples('[("a", "b"), ("a", "b", "c"), "药片剂", "four"]') == ([["a", "b", "c"], "药片剂"], False)
    assert triples('("a", "b", "c")') == ([], False)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[(1, 2, 3)]",
        "[1]",
        "[('a', 'b', 'c')",
        "['a' + 'b']",
        "[{'a', 'b', 'c'}]",
        "[b'abc']",
        "[('\\ud800', 'b', 'c')]",
        "[" * 5000,
        "-" * 5000 + "1",
        "(" * 150 + ")" * 150,
        "~" * 19_000 + "1",
        "\x00",
        "[" + "('a', 'b', 'c')," * 2000 + "]",
    ],
)
def test_what_is_no_list_of_texts_is_a_problem_and_no_triples(text):
    found, is_problem = triples(text)
    assert found == []
    assert is_problem or text.startswith("((")


def test_nothing_is_evaluated(tmp_path):
    victim = tmp_path / "victim"
    assert triples(f"[(open({str(victim)!r}, 'w').name, 'b', 'c')]") == ([], True)
    assert triples("[(decision_trees, 'b', 'c')]") == ([], True)
    assert not victim.exists()


def test_very_long_triples_are_not_read(monkeypatch):
    monkeypatch.setattr(decision_trees, "MAX_TRIPLES_CHARACTERS", 10)
    assert triples('[("a", "b", "c")]') == ([], True)


@pytest.mark.filterwarnings("error")
def test_a_stray_backslash_does_not_warn():
    assert triples(r'[("\d", "b", "c")]') == ([[r"\d", "b", "c"]], False)
