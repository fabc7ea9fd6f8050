"""API keys: where they come from, how they are compared, how they are revoked."""

from __future__ import annotations

import hmac
import time
from pathlib import Path
from typing import Any

import pytest

from deployments import keys
from deployments.keys import ApiKey, KeyRing, digest_of
from paddock.errors import ConfigError


def write(file: Path, **named: str) -> Path:
    lines = [f"  - name: {name}\n    sha256: {digest_of(key)}" for name, key in named.items()]
    file.write_text("\n".join(["keys:", *lines]) if lines else "keys: []", encoding="utf-8")
    return file


def test_a_key_is_revoked_and_added_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "keys.yaml", alice="a", bob="b")
    ring = KeyRing((), str(file))
    assert (ring.find("a") or ring.find("")).name == "alice"  # type: ignore[union-attr]
    write(file, bob="b", carol="ccc")
    time.sleep(0.6)
    assert ring.find("a") is None
    assert ring.find("ccc") is not None
    file.write_text("keys: [", encoding="utf-8")
    time.sleep(0.6)
    assert ring.find("b") is not None
    assert "the API keys stay as they were" in caplog.text
    write(file)
    time.sleep(0.6)
    assert ring.required
    assert ring.find("b") is None


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    known = [ApiKey(name=name, sha256=digest_of(name)) for name in "abc"]
    ring = KeyRing(known)
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda x, y: bool(compared.append(x)) or real(x, y))
    for key in ("a", "c", "nope", ""):
        compared.clear()
        ring.find(key)
        assert compared == [k.sha256 for k in known]


def test_keys_stand_in_the_environment_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.ENVIRONMENT, f"alice=one=1, bob=sha256:{digest_of('two')}")
    ring = KeyRing(keys.from_environment())
    assert [ring.find(key).name for key in ("one=1", "two")] == ["alice", "bob"]  # type: ignore[union-attr]
    monkeypatch.delenv(keys.ENVIRONMENT)
    assert not KeyRing(keys.from_environment()).required


@pytest.mark.parametrize("value", ["hunter22", "=hunter22", "a=", "a=sha256:hunter22", "a=hunter22,a=x"])
def test_a_mistake_in_the_environment_is_told_without_the_key(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.ENVIRONMENT, value)
    with pytest.raises(ConfigError, match="PADDOCK_API_KEYS: ") as caught:
        keys.from_environment()
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [{name: a, sha256: abc}]", r"keys\.0\.sha256"),
        ("keys: [{name: a, key: abc}]", r"keys\.0\.key: unknown key"),
        (f"keys: [{{name: a, sha256: {'0' * 63}f}}, {{name: a, sha256: {'1' * 63}f}}]", "two keys are called 'a'"),
        ("keys: [", "not YAML"),
        ("", "keys"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        KeyRing((), str(tmp_path / "keys.yaml"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such file"):
        KeyRing((), str(tmp_path / "none.yaml"))


def test_the_command_prints_a_key_and_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["ward-3"]) == 0
    key, lines = capsys.readouterr().out.split("\n\n")
    (tmp_path / "keys.yaml").write_text(f"keys:\n{lines}", encoding="utf-8")
    found = KeyRing((), str(tmp_path / "keys.yaml")).find(key)
    assert found is not None
    assert found.name == "ward-3"
    assert keys.main([]) == 2
