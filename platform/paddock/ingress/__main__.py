"""`python -m paddock.ingress [HOST]`: the environment of a Ray that is about to be started, for a shell to read."""

from __future__ import annotations

import shlex
import sys

from paddock.ingress import environment


def main(arguments: list[str]) -> int:
    if len(arguments) > 1:
        print("usage: python -m paddock.ingress [HOST]", file=sys.stderr)
        return 2
    variables, line = environment("auto", arguments[0] if arguments else "127.0.0.1", several_nodes=False)
    print(line, file=sys.stderr)
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
