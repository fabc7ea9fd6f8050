"""What a benchmark leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

from paddock.benchmark import BenchmarkConfig, Record


def test_a_record_says_where_and_how_it_was_measured(tmp_path: Path) -> None:
    record = Record(BenchmarkConfig(output_dir=str(tmp_path)), "copy")
    record.add(what="copy", seconds=1.5)
    file = record.write(ratio=2.0)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert list(written) == ["machine", "versions", "command", "date", "rows", "summary"]
    assert "CPU cores" in written["machine"]
    assert written["versions"].keys() >= {"python", "torch", "ray", "peft"}
    assert written["rows"] == [{"what": "copy", "seconds": 1.5}]
    assert written["summary"] == {"ratio": 2.0}
    assert file.with_suffix(".log").read_text(encoding="utf-8").splitlines()[0] == json.dumps(written["rows"][0])
