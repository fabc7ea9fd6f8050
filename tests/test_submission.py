import json
import subprocess
import sys
import zipfile
from ast import AnnAssign, Assign, Call, ClassDef, FunctionDef, Import, ImportFrom, Name, parse, walk
from dataclasses import replace
from importlib import resources

import pytest

from paddock.data import Row, read_rows
from paddock.demo.rows import make_rows
from paddock.errors import DataError
from paddock.scoring import parse_predictions
from paddock.submission import SCRIPT_PARTS, script, write_submission
from paddock.tasks import dump_results

FILES = {"test_predictions.json", "results.json", "submission.zip"}


@pytest.fixture
def rows():
    """Test rows of all sixteen tasks, without gold, and what a model may have said to them."""
    gold = make_rows(0)["test"]
    return [replace(row, target="") for row in gold], [row.target for row in gold]


def read_bytes(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_predictions_are_the_rows_with_their_targets(rows, tmp_path):
    tests, texts = rows
    texts[3] = ""
    write_submission(tmp_path, tests, texts, "v1")
    assert set(read_bytes(tmp_path)) == FILES
    lines = (tmp_path / "test_predictions.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        row.as_record(target=text) for row, text in zip(tests, texts, strict=True)
    ]
    assert list(json.loads(lines[0])) == [
        "input", "target", "answer_choices", "task_type", "task_dataset", "sample_id",
    ]  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results == parse_predictions(read_rows(tmp_path / "test_predictions.json"), "v1").results


def test_an_archive_holds_both_files_at_its_top(rows, tmp_path):
    write_submission(tmp_path, *rows, "v1")
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.namelist() == ["test_predictions.json", "post_generate_process.py"]
        assert archive.read("test_predictions.json") == (tmp_path / "test_predictions.json").read_bytes()


def test_equal_content_gives_equal_bytes(rows, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_submission(tmp_path / name, *rows, "v1")
    assert read_bytes(tmp_path / "a") == read_bytes(tmp_path / "b")


@pytest.mark.parametrize("profile", ["v1", "v2"])
def test_the_script_alone_makes_the_results(profile, tmp_path):
    said = {
        "CMeEE-V2": "疾病实体:流感,肺炎",
        "CHIP-CDEE": "x\n主体词：咳嗽；描述词：夜间\n",
        "CHIP-MDCFNPC": "x\n咳嗽： 甲",
        "IMCS-V2-MRG": "x\n主诉：咳嗽",
        "MedDG": "行\u2028尾\x85\r好",
    }
    if profile == "v2":
        said |= {"CMedCausal": "junk", "Text2DT": "节点：role=D；logical_rel=null；triples=[('a', 'b', 'c')]"}
    rows = [Row("问", text, ("疾病",), "", name, name) for name, text in said.items()]
    lines = "".join(json.dumps(row.as_record(), ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "said.json").write_text(lines, encoding="utf-8")
    (tmp_path / "post.py").write_text(script(profile), encoding="utf-8")
    command = [sys.executable, "-I", "post.py", "said.json", "found.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    parsed = parse_predictions(rows, profile)
    assert (tmp_path / "found.json").read_text(encoding="utf-8") == dump_results(parsed.results)
    assert ("CMedCausal (CMedCausal): not a triple" in done.stderr) == (profile == "v2")


def test_the_script_needs_only_the_standard_library_and_evaluates_nothing():
    tree = parse(script("v1"))
    imported = [node.module for node in walk(tree) if isinstance(node, ImportFrom)]
    imported += [alias.name for node in walk(tree) if isinstance(node, Import) for alias in node.names]
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
    called = {node.func.id for node in walk(tree) if isinstance(node, Call) and isinstance(node.func, Name)}
    assert not called & {"eval", "exec", "compile", "__import__"}


def test_no_part_of_the_script_hides_another_s_name():
    names = []
    for part in SCRIPT_PARTS:
        source = resources.files("paddock.tasks").joinpath(f"{part}.py").read_text(encoding="utf-8")
        for node in parse(source).body:
            if isinstance(node, FunctionDef | ClassDef):
                names.append(node.name)
            elif isinstance(node, Assign):
                names += [target.id for target in node.targets]
            elif isinstance(node, AnnAssign):
                names.append(node.target.id)
    assert len(names) == len(set(names))


def test_rows_and_texts_that_do_not_fit_are_refused(rows, tmp_path):
    tests, texts = rows
    with pytest.raises(DataError, match="159 texts for 160 rows"):
        write_submission(tmp_path, tests, texts[:-1], "v1")
    with pytest.raises(DataError, match="'test-0' stands on several rows"):
        write_submission(tmp_path, [tests[0], *tests[:-1]], texts, "v1")
    with pytest.raises(DataError, match="no task of profile v1"):
        write_submission(tmp_path, [replace(tests[0], task_dataset="Foo")], ["x"], "v1")
    assert not read_bytes(tmp_path)
    with pytest.raises(DataError, match="six fields"):
        write_submission(tmp_path, [replace(tests[0], instruction="加油")], ["x"], "v1")
