"""Predicted texts -> what the leaderboard takes.

    test_predictions.json     the test rows, each with what the model said as its `target`
    results.json              what these texts say, parsed
    submission.zip            test_predictions.json and post_generate_process.py, which makes the
                              results.json from it with nothing but a Python

The script is put together from the parsers' own source files, so there is one implementation.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from paddock.data import Row, read_rows, write_records
from paddock.errors import DataError
from paddock.scoring import parse_predictions
from paddock.tasks import dump_results

PREDICTIONS = "test_predictions.json"
RESULTS = "results.json"
ARCHIVE = "submission.zip"
SCRIPT = "post_generate_process.py"

# Every file that the script is made of; `parsing` comes last because it uses the others.
SCRIPT_PARTS = (
    "entities",
    "relations",
    "causality",
    "events",
    "terms",
    "findings",
    "labels",
    "free_text",
    "decision_trees",
    "parsing",
)
_HEADER = '''"""{predictions} -> {results}: `python {script} [{predictions} {results}]`.

Profile {profile} of the benchmark. Needs Python 3.10 or newer and nothing else; no text of a model is evaluated.
Put together by Paddock (paddock.submission) from the files of paddock.tasks.
"""

from __future__ import annotations
'''
_FOOTER = """

if __name__ == "__main__":
    predictions, results = sys.argv[1:] or ("{predictions}", "{results}")
    convert_file(predictions, results, "{profile}")
"""


def write_submission(directory: Path, rows: Sequence[Row], texts: Sequence[str], profile: str) -> None:
    """Write the three files for test rows and the answers to them, in the same order.

    A text is what `paddock.prompts.answer` gives, and '' where there is none. What was written is read
    again and compared with the rows, and the zip is unpacked and its script run in isolation.

    Raises DataError where the texts are not one for each row, two rows share an id, a row is of no task of
    the profile, or is not in the benchmark's format.
    """
    if len(rows) != len(texts):
        raise DataError(f"{len(texts)} texts for {len(rows)} rows; a submission has one for each")
    ids = [row.sample_id for row in rows]
    if len(set(ids)) != len(ids):
        double = next(name for name in ids if ids.count(name) > 1)
        raise DataError(f"sample_id {double!r} stands on several rows; ids must be unique")
    predicted = [replace(row, target=text) for row, text in zip(rows, texts, strict=True)]
    parsed = parse_predictions(predicted, profile)
    write_records(directory / PREDICTIONS, [row.as_record() for row in predicted])
    if read_rows(directory / PREDICTIONS, unique_ids=True) != predicted:
        raise DataError(f"{directory / PREDICTIONS}: the rows do not fit the benchmark's six fields; use such rows")
    (directory / RESULTS).write_text(dump_results(parsed.results), encoding="utf-8")
    _write_archive(directory, profile)
    _prove_archive(directory)


def script(profile: str) -> str:
    """The source of post_generate_process.py."""
    names = {"predictions": PREDICTIONS, "results": RESULTS, "script": SCRIPT, "profile": profile}
    parts = [_HEADER.format(**names)]
    for name in SCRIPT_PARTS:
        source = resources.files("paddock.tasks").joinpath(f"{name}.py").read_text(encoding="utf-8")
        parts.append(f"\n\n# {'-' * 40} {name}\n{_without_package_imports(source)}")
    text = "".join(parts) + _FOOTER.format(**names)
    return re.sub(r"\n{4,}", "\n\n\n", text)


def _without_package_imports(source: str) -> str:
    """A file's source without what the one script has already: the other parts, and __future__."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("paddock", "__future__"):
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[number - 1] = ""
    return "".join(lines)


def _write_archive(directory: Path, profile: str) -> None:
    """Equal bytes for equal content, on every machine: no times, no compressor."""
    contents = {PREDICTIONS: (directory / PREDICTIONS).read_bytes(), SCRIPT: script(profile).encode()}
    with zipfile.ZipFile(directory / ARCHIVE, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)


def _prove_archive(directory: Path) -> None:
    """Unpack the zip, run its script alone, and compare: as the leaderboard's organisers would."""
    with tempfile.TemporaryDirectory() as empty:
        with zipfile.ZipFile(directory / ARCHIVE) as archive:
            archive.extractall(empty)
        command = [sys.executable, "-I", SCRIPT]
        done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
        if done.returncode or (Path(empty) / RESULTS).read_bytes() != (directory / RESULTS).read_bytes():
            raise RuntimeError(
                f"{directory / ARCHIVE}: its script does not make {RESULTS} again: {done.stderr[-2000:]}"
            )
