"""The report in a real browser, as wide as a desk and as narrow as a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from paddock import charts
from paddock.demo.rows import make_rows
from paddock.report import Measured, Run, write_report
from paddock.scoring import parse_predictions, score

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; apt-get install chromium")
# The page in a frame of a given width; what the browser made of it goes into the title.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>waiting</title>
<iframe style="width:{width}px;height:3000px;border:0" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, shapes = [...page.querySelectorAll("svg.chart")];
  document.title = JSON.stringify([
    page.documentElement.scrollWidth, page.documentElement.clientWidth, shapes.length,
    Math.min(...shapes.map(shape => shape.getBoundingClientRect().height)),
    page.body.innerText.includes("感冒") || page.body.textContent.includes("患者"),
    page.querySelector("table").getBoundingClientRect().width > 0]);
}};
</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gold = make_rows(0)["test"]
    runs = []
    for name, rows in (("checkpoint-100", [replace(r, target="") for r in gold]), ("checkpoint-200", gold)):
        parsed = parse_predictions(rows, "v1")
        measured = [Measured(0.1 * (i % 7), 20 + i, i % 50) for i in range(len(rows))]
        runs.append(Run(name, rows, parsed, score(parsed.results, gold, "v1"), measured))
    file = tmp_path_factory.mktemp("report") / "report.html"
    points = [charts.Point(f"checkpoint-{i}", i, i - 2, i + 1) for i in range(10, 60, 10)]
    write_report(file, "报告", runs, gold, curve=points, lenient={"Overall": 100.0}, provenance={"model": "m" * 300})
    return file


def _chromium(*words: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_sticks_out_and_everything_is_drawn(report: Path, tmp_path: Path, width: int) -> None:
    page = html.escape(report.read_text(encoding="utf-8"), quote=True)
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=page), encoding="utf-8")
    said = _chromium("--dump-dom", f"--window-size={max(width, 600)},3000", (tmp_path / "frame.html").as_uri())
    title = re.search(r"<title>(.*?)</title>", said)
    assert title is not None
    scroll, client, shapes, height, chinese, table = json.loads(html.unescape(title.group(1)))
    assert width - 20 <= client <= width  # a scroll bar beside it
    assert scroll <= client, "a phone's reader would have to scroll sideways"
    assert shapes == 1 + 2 * 3
    assert height > 80
    assert chinese
    assert table


def test_a_screenshot_can_be_taken_from_disk(report: Path, tmp_path: Path) -> None:
    _chromium("--window-size=1200,2000", f"--screenshot={tmp_path / 'shot.png'}", report.as_uri())
    assert (tmp_path / "shot.png").stat().st_size > 30_000
