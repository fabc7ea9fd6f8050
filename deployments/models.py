"""`/v1/models`: the base and the adapters that a request can name, with what they were made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paddock import manifest
from paddock.engine import Engine
from paddock.errors import PaddockError


def cards(engine: Engine, model: str) -> Iterator[dict[str, Any]]:
    """One card a name, as OpenAI's clients read them; `manifest` is null for a directory from elsewhere."""
    base = engine.served_model_name
    yield {**_card(base, model), "parent": None, "max_model_len": engine.max_model_len}
    if engine.adapters is not None:
        for name in engine.adapters.names():
            yield {**_card(name, engine.adapters.root / name), "parent": base}


def _card(name: str, directory: str | Path) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "paddock", "manifest": _manifest(directory)}


def _manifest(directory: str | Path) -> dict[str, Any] | None:
    """What a manifest says of the content: nothing of paths or of the machine that made it."""
    try:
        found = manifest.read(directory)
    except PaddockError:  # damaged: who asks for it is told
        return None
    if found is None:
        return None
    told = {"kind": found.kind, "created_by": found.created_by, "hash": found.hash, "config_hash": found.config_hash}
    return {**told, "inputs": found.inputs, **{key: found.extra[key] for key in ("scores",) if key in found.extra}}
