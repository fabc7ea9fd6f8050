"""The commit of a directory: whole or not there, the same or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddock import manifest
from paddock.errors import OutputError

CONFIG = {"train": {"seed": 1}}
INPUTS = {"base": "abc"}


def _make(place: Path, text: str = "hello", **changes: object) -> bool:
    """Write a stage; returns whether there was anything to do."""
    settings = {"kind": "model", "config": CONFIG, "inputs": INPUTS, **changes}
    with manifest.stage(place, **settings) as work:  # type: ignore[arg-type]
        if work.finished:
            return False
        (work.directory / "sub").mkdir()
        (work.directory / "sub" / "a.txt").write_text(text)
        work.extra["proof"] = 1
    return True


def test_a_stage_is_committed_by_its_manifest(tmp_path: Path) -> None:
    place = tmp_path / "out" / "m"
    assert _make(place)
    found = manifest.verify(place)
    assert (found.kind, found.config, found.inputs, found.extra) == ("model", CONFIG, INPUTS, {"proof": 1})
    assert list(found.files) == ["sub/a.txt"]
    assert found.created_by.startswith("paddock ")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m"]


def test_the_same_work_is_not_done_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "m"
    assert _make(place)
    assert not _make(place)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": {"train": {"seed": 2}}}, "train.seed was 1 and is now 2"),
        ({"inputs": {"base": "xyz"}}, 'input.base was "abc" and is now "xyz"'),
        ({"kind": "scores"}, "kind was model and is now scores"),
    ],
)
def test_other_work_in_the_same_place_is_refused(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    place = tmp_path / "m"
    _make(place)
    with pytest.raises(OutputError, match=says):
        _make(place, **changes)
    assert manifest.verify(place).config == CONFIG
    assert _make(place, overwrite=True, **changes)


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with manifest.stage(tmp_path / "m", kind="model", config={}, inputs={}) as work:
            (work.directory / "a").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_an_output(tmp_path: Path) -> None:
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "stale").write_text("x")
    assert _make(tmp_path / "m")
    assert list(manifest.verify(tmp_path / "m").files) == ["sub/a.txt"]


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("x")
    with pytest.raises(OutputError, match="not a finished output"):
        _make(tmp_path / "m")
    with pytest.raises(OutputError, match="not a finished output"):
        _make(tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "mine").read_text() == "x"


def test_an_output_does_not_stand_in_or_around_its_input(tmp_path: Path) -> None:
    for output in (tmp_path / "a", tmp_path / "a" / "b", tmp_path):
        with pytest.raises(OutputError, match="overlaps with the input"):
            manifest.apart(output, str(tmp_path / "a"))
    manifest.apart(tmp_path / "ab", tmp_path / "a")


def test_what_has_a_manifest_of_its_own_is_no_part(tmp_path: Path) -> None:
    _make(tmp_path / "m" / "scores")
    (tmp_path / "m" / "a").write_text("x")
    assert list(manifest.scan(tmp_path / "m")) == ["a"]


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        _make(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be made"):
        _make(tmp_path / "file" / "m")


def test_a_second_run_on_one_place_is_refused(tmp_path: Path) -> None:
    with manifest.locked(tmp_path / "m"), pytest.raises(OutputError, match="another run is writing here"):
        _make(tmp_path / "m")
    assert _make(tmp_path / "m")


def test_damage_is_found(tmp_path: Path) -> None:
    place = tmp_path / "m"
    _make(place)
    (place / "sub" / "a.txt").write_text("hellO")
    manifest.check(place)
    with pytest.raises(OutputError, match=r"a\.txt: sha256"):
        manifest.verify(place)
    (place / "sub" / "a.txt").write_text("longer than before")
    with pytest.raises(OutputError, match=r"a\.txt: has 18 bytes, the manifest says 5"):
        manifest.check(place)
    (place / "sub" / "a.txt").unlink()
    with pytest.raises(OutputError, match=r"a\.txt: is missing"):
        manifest.check(place)
    with pytest.raises(OutputError, match="is missing"):
        _make(place)


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"kind": "model"}'):
        (tmp_path / manifest.NAME).write_text(text)
        with pytest.raises(OutputError, match="not a manifest"):
            manifest.read(tmp_path)


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text("same")
    assert manifest.fingerprint(tmp_path / "a") == manifest.fingerprint(tmp_path / "b")
    (tmp_path / "b" / "f").write_text("other")
    assert manifest.fingerprint(tmp_path / "a") != manifest.fingerprint(tmp_path / "b")
    with pytest.raises(OutputError, match="no such file"):
        manifest.fingerprint(tmp_path / "c")


def test_verify_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _make(tmp_path / "m")
    assert manifest.main(["verify", str(tmp_path / "m")]) == 0
    (tmp_path / "m" / "sub" / "a.txt").write_text("hellO")
    assert manifest.main(["verify", str(tmp_path / "m")]) == 2
    assert "was changed or damaged" in capsys.readouterr().err
    assert manifest.main([]) == 2
