"""Models on the Hugging Face hub: `hf://ORG/NAME`, `hf://ORG/NAME@REVISION`.

huggingface_hub keeps what was downloaded (`HF_HOME`) and takes it from there without a network (`HF_HUB_OFFLINE=1`).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from paddock.errors import ModelError

PREFIX = "hf://"
_BESIDE = ("*.json", "*.model", "*.jinja", "*.txt")
# Not both: many models have their weights twice.
_WEIGHTS = ("*.safetensors", "*.bin")


def local(location: str) -> str | Path:
    """The directory of a model of the hub, downloaded if need be; any other location as it is.

    Raises ModelError where the hub, or offline the cache, does not have it.
    """
    return _snapshot(location) if location.startswith(PREFIX) else location


def name(directory: Path) -> str:
    """What a model directory is called: of a snapshot of the hub ORG/NAME, else the directory's own name."""
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return directory.name


@lru_cache
def _snapshot(location: str) -> Path:
    repository, _, revision = location.removeprefix(PREFIX).partition("@")
    try:
        for weights in _WEIGHTS:
            patterns = [*_BESIDE, weights]
            found = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
            if any(found.glob(weights)):
                break
        return found
    except LocalEntryNotFoundError:
        why = "no such directory, nor a model in the hub's cache, and the hub cannot be reached"
    except HFValidationError:
        why = "no such directory, nor the name of a model on the hub"
    except (httpx.HTTPError, OSError) as error:
        why = f"no such directory, and the hub says: {' '.join(str(error).split())[:200]}"
    raise ModelError(f"{location}: {why}; check the name, HF_HUB_OFFLINE and HF_TOKEN")
