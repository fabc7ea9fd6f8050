"""The jobs: each reads its configuration, calls the package, and tells a user's mistake in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

from paddock.config import describe, load
from paddock.config_parts import Settings
from paddock.errors import ConfigError, PaddockError

Config = TypeVar("Config", bound=Settings)


def run(cls: type[Config], main: Callable[[Config], object], **commands: Callable[[Any], object]) -> None:
    """`python -m jobs.NAME [COMMAND] [--config FILE] [key.sub=value ...]`, then exit.

    A command's configuration is what its `config` parameter is annotated with. Exit code 0: done and
    verified. 2: a mistake that the user can fix, told in one line on stderr. Anything else is a bug of ours
    and keeps its traceback.
    """
    words = sys.argv[1:]
    try:
        work: Callable[[Any], object] = main
        if words and words[0] in commands:
            work = commands[words.pop(0)]
            cls = get_type_hints(work)["config"]
        if "-h" in words or "--help" in words:
            print(_help(cls, main, list(commands)))
            sys.exit(0)
        config_file, overrides = _parse(_named(words, getattr(cls, "positional", ())), list(commands))
        work(load(cls, config_file, overrides))
    except PaddockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _named(words: list[str], names: Sequence[str]) -> list[str]:
    """Words without a key get the keys that a configuration names for them, in order."""
    left, named = iter(names), []
    for before, word in zip(["", *words], words, strict=False):
        key = None if "=" in word or word.startswith("-") or before == "--config" else next(left, None)
        named.append(word if key is None else f"{key}={word}")
    return named


def _parse(words: list[str], commands: list[str]) -> tuple[str | None, list[str]]:
    config_file, overrides = None, []
    rest = iter(words)
    for word in rest:
        if word == "--config":
            config_file = next(rest, None)
            if config_file is None:
                raise ConfigError("--config: needs a file")
        elif word.startswith("--config="):
            config_file = word.removeprefix("--config=")
        elif "=" in word and not word.startswith("-"):
            overrides.append(word)
        else:
            known = ", ".join(["--config FILE", "key.sub=value", *commands])
            raise ConfigError(f"{word!r}: not understood; known are {known}")
    return config_file, overrides


def _help(cls: type[Settings], main: Callable[..., object], commands: list[str]) -> str:
    """What the job does, its commands, and every key with its default."""
    about = sys.modules[main.__module__].__doc__ or ""
    command = f"[{'|'.join(commands)}] " if commands else ""
    return "\n".join([about.strip(), "", f"usage: {command}[--config FILE] [key.sub=value ...]", "", *describe(cls)])
