import json
from dataclasses import replace

import pytest

from paddock.config import ScoreConfig, build
from paddock.data import write_records
from paddock.demo.rows import make_rows
from paddock.errors import DataError, OutputError
from paddock.evaluation import read_pair, score_files
from paddock.ledger import Ledger, Prediction
from paddock.manifest import commit, verify


@pytest.fixture
def gold():
    return make_rows(0)["test"]


@pytest.fixture
def files(tmp_path, gold):
    """Writes predicted and gold rows, and makes the configuration that scores them."""

    def write(predicted=gold, right=gold, **more):
        paths = {"predictions": tmp_path / "predictions.json", "gold": tmp_path / "gold.json"}
        write_records(paths["predictions"], [row.as_record() for row in predicted])
        write_records(paths["gold"], [row.as_record() for row in right])
        tree = {name: str(path) for name, path in paths.items()}
        return build(ScoreConfig, {**tree, "output_dir": str(tmp_path / "scores"), **more})

    return write


def test_the_scores_directory(files, gold, tmp_path):
    predicted = [replace(r, target="") if r.task_dataset == "MedDG" else r for r in gold]
    record = score_files(files(predicted))
    assert record == json.loads((tmp_path / "scores" / "scores.json").read_text(encoding="utf-8"))
    assert record["success"] is True
    assert record["score"] == record["scoreJson"]["score"] < 95
    assert record["health"]["MedDG"]["empty_texts"] == 10
    assert record["rows"] == 160
    assert record["parse_errors"] == []
    results = (tmp_path / "scores" / "results.json").read_text(encoding="utf-8")
    assert len(json.loads(results)) == 16
    assert "\\u" not in results
    manifest = verify(tmp_path / "scores")
    assert manifest.kind == "scores"
    assert set(manifest.files) == {"results.json", "scores.json", "report.html"}


def test_the_report_names_what_the_predictions_were_made_from(files, tmp_path):
    config = files()
    commit(tmp_path, "predictions", {"predict": {"max_tokens": 77}}, {"model": "hash-of-the-model"})
    score_files(config)
    report = (tmp_path / "scores" / "report.html").read_text(encoding="utf-8")
    assert "hash-of-the-model" in report
    assert "max_tokens" in report


def test_what_the_ledger_knows_reaches_the_report(files, gold, tmp_path):
    config = files()
    ledger = Ledger(tmp_path / "ledger", {})
    ledger.append([Prediction(i, r.sample_id, "x", "length" if i < 3 else "stop", 7, 5, 0.5, None)
                   for i, r in enumerate(gold)])  # fmt: skip
    for file in (tmp_path / "ledger").iterdir():
        file.rename(tmp_path / file.name)
    record = score_files(config)
    assert sum(health["truncated"] for health in record["health"].values()) == 3
    assert "Time to answer" in (tmp_path / "scores" / "report.html").read_text(encoding="utf-8")


def test_intervals_and_the_lenient_view_stand_beside_the_score(files, gold):
    record = score_files(files([replace(r, target=f"{r.target}\n") for r in gold]))
    assert record["interval"]["low"] <= record["score"] <= record["interval"]["high"]
    assert record["lenient"]["score"] > record["score"] + 1
    assert record["lenient"]["tasks"]["CHIP-CDN"] == pytest.approx(100)


def test_again_does_nothing_and_other_files_are_refused(files, gold, tmp_path, capsys):
    first = score_files(files())
    made = (tmp_path / "scores" / "report.html").stat().st_mtime_ns
    assert score_files(files()) == first
    assert (tmp_path / "scores" / "report.html").stat().st_mtime_ns == made
    assert "nothing to do" in capsys.readouterr().out
    silent = [replace(r, target="") for r in gold]
    with pytest.raises(OutputError, match="predictions"):
        score_files(files(silent))
    assert score_files(files(silent, overwrite=True))["score"] < first["score"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"predictions.json:159: the file ends after 159 of the 160 rows"),
        (lambda rows: [*rows, replace(rows[0], sample_id="new")], r"predictions.json:161: row 'new' is not in"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], r"predictions.json:1: row 'test-1'.*gold.json:1 has row 'test-0'"),
        (lambda rows: [*rows[:5], replace(rows[5], sample_id="new"), *rows[6:]], r"predictions.json:6: row 'new'"),
        (lambda rows: [*rows[:-1], rows[0]], r"predictions.json:160: sample_id 'test-0' stands already in line 1"),
    ],
)
def test_predictions_of_other_rows_are_refused_with_their_line(files, gold, tmp_path, change, message):
    config = files(change(gold))
    with pytest.raises(DataError, match=message):
        score_files(config)
    assert not (tmp_path / "scores").exists()


def test_gold_that_cannot_score_is_refused_with_its_line(files, gold):
    with pytest.raises(DataError, match=r"gold.json:3: the target of row 'test-2' is empty"):
        score_files(files(right=[*gold[:2], replace(gold[2], target=""), *gold[3:]]))
    with pytest.raises(DataError, match=r"gold.json:1: row 'test-0': task_dataset 'Foo' is no task"):
        score_files(files(right=[replace(gold[0], task_dataset="Foo"), *gold[1:]]))


def test_blank_lines_count_as_lines(files, gold, tmp_path):
    config = files(gold[:2], [gold[0], replace(gold[1], sample_id="other")])
    path = tmp_path / "predictions.json"
    path.write_text("\n" + path.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")
    with pytest.raises(DataError, match=r"predictions.json:4: row 'test-1'.*gold.json:2 has row 'other'"):
        read_pair(config.predictions, config.gold, "v1")
