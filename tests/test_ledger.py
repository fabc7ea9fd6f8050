"""What has been predicted survives, and nothing else gets in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paddock.errors import OutputError
from paddock.ledger import Ledger, Prediction

KEY = {"model": "m", "sampling": {"preset": "greedy"}}


def _row(index: int, text: str = "x", error: str | None = None) -> Prediction:
    return Prediction(index, f"id-{index}", text, "stop", 3, 4, 0.5, error)


def test_a_ledger_goes_on_where_it_was(tmp_path: Path) -> None:
    Ledger(tmp_path / "p", KEY).append([_row(2), _row(0)])
    again = Ledger(tmp_path / "p", KEY)
    assert again.pending(4) == [1, 3]
    again.append([_row(1), _row(3, "", "prompt too long")])
    assert Ledger(tmp_path / "p", KEY).pending(4) == []
    assert again.predictions()[2] == _row(2)


def test_nothing_is_written_before_the_first_shard(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "p", KEY).pending(1) == [0]
    assert list(tmp_path.iterdir()) == []


def test_quarantine_is_kept_named_and_can_be_retried(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "p", KEY)
    ledger.append([_row(0), _row(1, "", "太长")])
    assert ledger.write_quarantine() == 1
    line = json.loads((tmp_path / "p" / "quarantine.jsonl").read_text(encoding="utf-8"))
    assert line == {"sample_id": "id-1", "row_index": 1, "error": "太长"}
    assert ledger.pending(2) == []
    assert ledger.pending(2, retry_quarantined=True) == [1]
    ledger.append([_row(1, "now")])
    assert ledger.predictions()[1].text == "now"
    assert ledger.write_quarantine() == 0


def test_another_key_is_refused_by_name(tmp_path: Path) -> None:
    Ledger(tmp_path / "p", KEY).append([_row(0)])
    with pytest.raises(OutputError, match="predictions of another sampling"):
        Ledger(tmp_path / "p", {**KEY, "sampling": {"preset": "reference"}})
    assert Ledger(tmp_path / "p", KEY).pending(1) == []


def test_what_a_killed_run_left_half_done_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At any moment: before the first shard, in the middle of one, with a file that the disk never got whole."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".ledger.json.partial").write_text('{"half')
    ledger = Ledger(tmp_path / "p", KEY)
    ledger.repair()
    assert list((tmp_path / "p").iterdir()) == []
    ledger.append([_row(0)])
    ledger.append([_row(1)])
    (ledger.shards / ".000002.parquet.partial").write_bytes(b"half")
    (ledger.shards / "000001.parquet").write_bytes((ledger.shards / "000001.parquet").read_bytes()[:50])
    (tmp_path / "p" / ".manifest.json.partial").write_text("{")
    again = Ledger(tmp_path / "p", KEY)
    again.repair()
    assert "000001.parquet: damaged" in capsys.readouterr().out
    assert again.pending(2) == [1]
    assert {file.name for file in (tmp_path / "p").rglob("*")} == {"ledger.json", "shards", "000000.parquet"}
    again.append([_row(1, "again")])
    assert Ledger(tmp_path / "p", KEY).predictions()[1].text == "again"


def test_a_ledger_that_has_its_key_and_no_shard_goes_on(tmp_path: Path) -> None:
    Ledger(tmp_path / "p", KEY).append([_row(0)])
    for file in (tmp_path / "p" / "shards").iterdir():
        file.unlink()
    (tmp_path / "p" / "shards").rmdir()
    again = Ledger(tmp_path / "p", KEY)
    again.repair()
    assert again.pending(1) == [0]


def test_foreign_files_and_damage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"no ledger\.json"):
        Ledger(tmp_path, KEY)
    Ledger(tmp_path / "p", KEY).append([_row(0)])
    (tmp_path / "p" / "ledger.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        Ledger(tmp_path / "p", KEY)
