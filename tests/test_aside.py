"""Work beside other work: the same hashes, all pages let go, and nobody else's priority changed."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paddock import aside


@pytest.mark.parametrize("size", [0, 1, 4096, 3 * 4096 + 7])
def test_hash_is_the_files_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(aside, "_STEP", 4096)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert aside.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_every_byte_is_let_go_when_it_is_some_steps_behind(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(aside, "_STEP", 32)
    monkeypatch.setattr(aside, "_REACH", 128)
    gone: set[int] = set()
    monkeypatch.setattr(
        os, "posix_fadvise", lambda handle, begin, size, advice: gone.update(range(begin, begin + size))
    )
    for start in range(0, 960, piece):
        aside.let_go(3, start, start + piece)
        reached = (start + piece) // 32 * 32
        assert gone >= set(range(reached))
        assert all(byte < start + piece for byte in gone)  # what was read ahead stays


def test_only_the_thread_gives_way() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    before = priority()
    with ThreadPoolExecutor(1, initializer=aside.give_way) as pool:
        assert pool.submit(priority).result() == max(before, 10)
    assert priority() == before


def test_a_thread_that_gave_way_further_already_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "getpriority", lambda which, who: 15)
    monkeypatch.setattr(os, "setpriority", lambda which, who, value: asked.append(value))
    aside.give_way()
    assert asked == [15]
