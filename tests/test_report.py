from dataclasses import replace
from html.parser import HTMLParser

import pytest

from paddock.demo.rows import make_rows
from paddock.report import Run, write_report
from paddock.scoring import parse_predictions, score


class Page(HTMLParser):
    """What a browser would make of it: the open tags must close, and all text is collected."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture
def gold():
    return make_rows(0)["test"]


def run(name, rows, gold):
    parsed = parse_predictions(rows, "v1")
    return Run(name, rows, parsed, score(parsed.results, gold, "v1") if gold else None)


def page(path, runs, gold=(), **more):
    write_report(path, "Scores", runs, gold, **more)
    return Page(path.read_text(encoding="utf-8"))


def test_two_runs_side_by_side(gold, tmp_path):
    base = [replace(r, target="") for r in gold]
    runs = [run("base", base, gold), run("tuned", gold, gold)]
    text = page(
        tmp_path / "report.html",
        runs,
        gold,
        provenance={"model": "abc123", "versions": {"ray": "2.60"}},
        seconds={"train": 61.25},
    ).text
    change = runs[1].scores.overall - runs[0].scores.overall
    for wanted in ("base", "tuned", "Overall", "CHIP-CDEE", f"{change:+.2f}", "100.00", "abc123", '"2.60"', "61.2"):
        assert wanted in text


def test_one_run_has_no_change_column(gold, tmp_path):
    assert "Change" not in page(tmp_path / "report.html", [run("predictions", gold, gold)], gold).text


def test_it_needs_no_network_and_no_script(gold, tmp_path):
    found = page(tmp_path / "report.html", [run("predictions", gold, gold)], gold)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not {"src", "href"} & {name for name, _ in found.attributes}
    assert ("name", "viewport") in found.attributes
    assert ("charset", "utf-8") in found.attributes
    assert "url(" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_everything_that_comes_from_a_row_is_escaped(gold, tmp_path):
    evil = "<script>alert('x')</script>{{ 7 * 7 }}&amp;"
    rows = [replace(r, input=evil + r.input, target=evil, sample_id=evil + r.sample_id) for r in gold]
    right = [replace(r, target=g.target) for r, g in zip(rows, gold, strict=True)]
    found = page(tmp_path / "report.html", [run(evil, rows, right)], right, provenance={evil: evil})
    assert "script" not in found.tags
    assert evil in found.text


def test_examples_are_wrong_answers_first_beside_gold(gold, tmp_path):
    replies = [r for r in gold if r.task_dataset == "MedDG"]
    wrong = replies[-1]
    rows = [replace(r, target="答错了") if r is wrong else r for r in gold]
    text = page(tmp_path / "report.html", [run("predictions", rows, gold)], gold).text
    assert "答错了" in text
    assert wrong.target in text
    assert text.index(wrong.sample_id) < text.index(replies[0].sample_id + "\n")


def test_without_gold_there_is_no_score(gold, tmp_path):
    text = page(tmp_path / "report.html", [run("predictions", gold, ())]).text
    assert "nothing to score" in text
    assert gold[0].input in text


def test_missing_tasks_and_parse_errors_are_told(gold, tmp_path):
    some = [replace(r, answer_choices=None) for r in gold if r.task_dataset == "CMeEE-V2"]
    text = page(tmp_path / "report.html", [run("predictions", some, some)], some).text
    assert "not comparable with the leaderboard" in " ".join(text.split())
    assert "10 of 10 parse errors" in text
    assert "answer_choices is null" in text
