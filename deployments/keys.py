"""API keys: named, several, kept as sha256 only, revocable while the service runs.

    python -m deployments.keys NAME        # prints a new key, once, and the lines for the file

    keys:
      - name: ward-3
        sha256: 5e88...                    # of the key's text
        requests_per_minute: 60            # the rest is optional
        tokens_per_minute: 100000          # prompt and answer together
        admin: true                        # may call access.admin_routes

They lie in the file that `access.keys` names, which is read again when it changes, or stand in the environment
of what builds the application: `PADDOCK_API_KEYS="ward-3=KEY,ward-4=sha256:5e88..."`, until it is built again.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from paddock.config import load
from paddock.config_parts import Settings
from paddock.errors import ConfigError

ENVIRONMENT = "PADDOCK_API_KEYS"
_LOOK_AGAIN_S = 0.5
logger = logging.getLogger("ray.serve")


class ApiKey(Settings):
    """One caller."""

    name: str = Field(min_length=1, max_length=100)
    """What the request log calls the caller."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """The sha256 of the key, hexadecimal."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """How many requests the caller may start a minute; null is no limit."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """How many tokens of prompts and answers; what exceeds it is made up for before the next request."""
    admin: bool = False
    """Whether the caller may use `access.admin_routes`."""


class KeyFile(Settings):
    """The file of `access.keys`."""

    keys: tuple[ApiKey, ...]
    """The callers."""


def read(file: str | Path) -> tuple[ApiKey, ...]:
    """The keys in a file. Raises ConfigError, in one line, for what is wrong with it."""
    if not Path(file).is_file():
        raise ConfigError(f"access.keys: {file}: no such file; `python -m deployments.keys NAME` prints lines for one")
    try:
        keys = load(KeyFile, file).keys
    except ConfigError as error:
        raise ConfigError(f"access.keys: {file}: {str(error).removeprefix(f'{file}: ')}") from None
    return _distinct(keys, f"access.keys: {file}")


def from_environment() -> tuple[ApiKey, ...]:
    """The keys in PADDOCK_API_KEYS, hashed. Raises ConfigError; never repeats what stands there."""
    keys = []
    for number, entry in enumerate(filter(None, os.environ.get(ENVIRONMENT, "").split(",")), start=1):
        name, equals, key = entry.strip().partition("=")
        if not name or not equals or not key:
            raise ConfigError(f"{ENVIRONMENT}: entry {number} is not NAME=KEY or NAME=sha256:HEX")
        digest = key.removeprefix("sha256:").lower() if key.startswith("sha256:") else digest_of(key)
        try:
            keys.append(ApiKey(name=name, sha256=digest))
        except ValueError:
            raise ConfigError(f"{ENVIRONMENT}: entry {number} has no sha256 of 64 hexadecimal digits") from None
    return _distinct(keys, ENVIRONMENT)


def _distinct(keys: Sequence[ApiKey], where: str) -> tuple[ApiKey, ...]:
    names = [key.name for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: two keys are called {name!r}; limits and the log tell callers apart by name")
    return tuple(keys)


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class KeyRing:
    """The keys that are valid now."""

    def __init__(self, fixed: Sequence[ApiKey] = (), file: str | None = None) -> None:
        """fixed: those of the environment. Raises ConfigError where the file cannot be used."""
        self._fixed, self._file = tuple(fixed), file
        self._from_file = () if file is None else read(file)
        self._state, self._looked = self._stat(), time.monotonic()

    @property
    def required(self) -> bool:
        """Whether a request needs a key: a file without any lets nobody in."""
        return bool(self._fixed) or self._file is not None

    def find(self, key: str) -> ApiKey | None:
        """Whose key this is. The time it takes does not depend on the key: each is compared, in constant time."""
        self._look_again()
        digest, found = digest_of(key), None
        for known in (*self._fixed, *self._from_file):
            if hmac.compare_digest(known.sha256, digest):
                found = known
        return found

    def _look_again(self) -> None:
        """Read the file where it has changed. A file that became unusable revokes nobody: the log says so."""
        if self._file is None or time.monotonic() - self._looked < _LOOK_AGAIN_S:
            return
        self._looked = time.monotonic()
        state = self._stat()
        if state != self._state:
            self._state = state
            try:
                self._from_file = read(self._file)
            except ConfigError as error:
                logger.error("the API keys stay as they were: %s", error)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = Path(self._file or "").stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m deployments.keys NAME", file=sys.stderr)
        return 2
    key = f"pk-{secrets.token_urlsafe(32)}"
    print(f"{key}\n\n  - name: {arguments[0]}\n    sha256: {digest_of(key)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
