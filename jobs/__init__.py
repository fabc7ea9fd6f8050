"""The jobs: each reads its configuration, calls the package, and tells a user's mistake in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from paddock.config import describe, load
from paddock.config_parts import Settings
from paddock.errors import ConfigError, PaddockError

Config = TypeVar("Config", bound=Settings)


def run(cls: type[Config], main: Callable[[Config], object], **commands: Callable[[Config], object]) -> None:
    """`python -m jobs.NAME [COMMAND] [--config FILE] [key.sub=value ...]`, then exit.

    Exit code 0: done and verified. 2: a mistake that the user can fix, told in one line on stderr.
    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        config_file, overrides, work = None, [], main
        words = iter(sys.argv[1:])
        for position, word in enumerate(words):
            if word in ("-h", "--help"):
                print(_help(cls, main, commands))
                sys.exit(0)
            elif word == "--config":
                config_file = next(words, None)
                if config_file is None:
                    raise ConfigError("--config: needs a file")
            elif word.startswith("--config="):
                config_file = word.removeprefix("--config=")
            elif position == 0 and word in commands:
                work = commands[word]
            elif "=" in word and not word.startswith("-"):
                overrides.append(word)
            else:
                known = ", ".join(["--config FILE", "key.sub=value", *commands])
                raise ConfigError(f"{word!r}: not understood; known are {known}")
        work(load(cls, config_file, overrides))
    except PaddockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _help(
    cls: type[Settings], main: Callable[..., object], commands: dict[str, Callable[..., object]]
) -> str:
    """What the job does, its commands, and every key with its default."""
    about = sys.modules[main.__module__].__doc__ or ""
    names = " | ".join(commands)
    usage = (
        f"usage: [{names}] [--config FILE] [key.sub=value ...]"
        if names
        else "usage: [--config FILE] [key.sub=value ...]"
    )
    return "\n".join([about.strip(), "", usage, "", *describe(cls)])
