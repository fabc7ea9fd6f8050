"""manifest.json: the commit of a directory that a stage wrote.

A stage reads directories and writes one. It works in `.NAME.partial` beside its place; the manifest is
written last and the directory renamed, so that a directory of ours without a valid manifest does not exist
for the next stage. What a killed run leaves there is used by the next run of the same work that asks for it (`resume`),
else removed. Directories from elsewhere (Hugging Face, PEFT) have none and are taken as they are.
At a URI there is no renaming: the directory is uploaded when it is done, the manifest last.

    python -m paddock.manifest verify DIR        hash everything again
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paddock import __version__, aside, storage
from paddock.errors import OutputError, PaddockError
from paddock.locks import locked as locked  # noqa: PLC0414 (part of this module's interface)

NAME = storage.MANIFEST
_HASHES = 4  # files that are hashed at a time
_FIELDS = ("kind", "created_by", "config", "config_hash", "inputs", "files")


@dataclass(frozen=True)
class FileEntry:
    """One file of the directory."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a directory is, what it was made from and by which configuration."""

    kind: str
    created_by: str
    config: dict[str, Any]
    config_hash: str
    inputs: dict[str, str]
    files: dict[str, FileEntry]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """The sha256 of what the directory holds: its kind and the hashes of its files."""
        return config_hash({"kind": self.kind, "files": {k: v.sha256 for k, v in self.files.items()}})

    def write(self, directory: Path) -> None:
        """Write `manifest.json`, atomically."""
        record = asdict(self)
        record.update(record.pop("extra"))
        partial = directory / f".{NAME}.partial"
        partial.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        partial.replace(directory / NAME)


def read(directory: str | Path) -> Manifest | None:
    """A directory's manifest, or None where it has none. Raises OutputError where the file is not one."""
    file = storage.join(directory, NAME)
    if not storage.exists(file):
        return None
    with storage.reading(file) as stream:
        text = stream.read()
    try:
        record = json.loads(text)
        known = {name: record.pop(name) for name in _FIELDS}
        known["files"] = {str(path): FileEntry(**entry) for path, entry in known["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{file}: not a manifest ({error!r}); remove the directory and make it again") from None
    return Manifest(**known, extra=record)


def check(directory: str | Path, kind: str | None = None) -> Manifest:
    """The start-up check: the manifest is there, and every file with its size. Raises OutputError."""
    manifest = read(directory)
    if manifest is None:
        raise OutputError(f"{directory}: no {NAME}, so whatever wrote it did not finish; make it again")
    if kind is not None and manifest.kind != kind:
        raise OutputError(f"{directory}: holds {manifest.kind!r}, wanted {kind!r}; check the path")
    sizes = storage.listing(directory)
    for path, entry in manifest.files.items():
        size = sizes.get(path)
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise OutputError(
                f"{storage.join(directory, path)}: {found}, the manifest says {entry.bytes} bytes;"
                " make the directory again"
            )
    return manifest


def verify(directory: str | Path) -> Manifest:
    """`check`, and every file hashed again. Raises OutputError."""
    manifest = check(directory)
    for path, entry in manifest.files.items():
        file = storage.join(directory, path)
        found = sha256(file)
        if found != entry.sha256:
            raise OutputError(
                f"{file}: sha256 {found[:12]}..., the manifest says {entry.sha256[:12]}...;"
                " the file was changed or damaged: make the directory again"
            )
    return manifest


@dataclass(frozen=True)
class Input:
    """What a stage reads, by its content."""

    hash: str
    """Its manifest's hash, or one over its files' hashes."""
    files: dict[str, FileEntry]


def look(path: str | Path, *, beside: bool = False) -> Input:
    """Identify an input. Raises OutputError where there is nothing, or what is there is damaged or cannot be read.

    beside: other work goes on meanwhile, which needs cores and page cache more (see `paddock.aside`).
    """
    if read(path) is not None:
        found = check(path)
        return Input(found.hash, found.files)
    path = storage.fetch(path)
    try:
        if path.is_file():
            entry = FileEntry(path.stat().st_size, sha256(path))
            return Input(entry.sha256, {path.name: entry})
        if not path.is_dir():
            raise OutputError(f"{path}: no such file or directory; check the path")
        files = scan(path, beside=beside)
    except OSError as error:
        raise OutputError(f"{error.filename or path}: cannot be read ({error.strerror}); get it again") from None
    return Input(config_hash({"files": {k: v.sha256 for k, v in files.items()}}), files)


def fingerprint(path: str | Path) -> str:
    """The hash of an input (see `look`)."""
    return look(path).hash


def config_hash(tree: dict[str, Any]) -> str:
    """The sha256 of a tree of plain values, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256(file: str | Path) -> str:
    """A file's sha256, read in pieces."""
    with storage.reading(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def scan(
    directory: Path, known: Mapping[str, FileEntry] | None = None, *, beside: bool = False
) -> dict[str, FileEntry]:
    """Every file below a directory, in the order of its path, without its manifest and what has one of its own.

    known: what need not be hashed again. beside: see `look`.
    """
    nested = [f.parent for f in directory.rglob(NAME) if f.parent != directory]
    files = sorted(f for f in directory.rglob("*") if f.is_file() and f != directory / NAME)
    names = [f.relative_to(directory).as_posix() for f in files if not any(f.is_relative_to(part) for part in nested)]

    def entry(name: str) -> FileEntry:
        size = (directory / name).stat().st_size
        if known and name in known and known[name].bytes == size:
            return known[name]
        return FileEntry(size, (aside.sha256 if beside else sha256)(directory / name))

    with ThreadPoolExecutor(_HASHES, initializer=aside.give_way if beside else None) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


@dataclass
class Stage:
    """A directory that is being written."""

    kind: str
    place: str | Path
    """Where it will stand: a Path, or the str of a URI."""
    directory: Path
    """Where it is written now."""
    config: dict[str, Any]
    inputs: dict[str, str]
    finished: Manifest | None
    """The manifest of the same work, already done; then there is nothing to write."""
    notes: Path
    """A directory, perhaps there already, for what a later run needs to go on (`resume`); no part of the result."""
    hashes: dict[str, FileEntry] = field(default_factory=dict)
    """Files that were hashed while they were written; the others are hashed at the end."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the kind adds to the manifest."""


@contextmanager
def stage(
    output_dir: str | Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str] | Future[dict[str, str]],
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[Stage]:
    """Write a directory as one step: all of it with its manifest, or nothing.

    `config` is what can change the result, `inputs` the fingerprint of everything that is read; it may come later
    where nothing is there to compare it with. resume: begin with what a killed run of the same work left; a run that
    fails leaves nothing either way. Raises OutputError where the place is taken by another configuration's output, by
    foreign files or by a running job.
    """
    place = storage.workplace(output_dir)
    with locked(output_dir):
        partial = place.parent / f".{place.name}.partial"
        later = inputs if isinstance(inputs, Future) else None
        known = dict(inputs) if not isinstance(inputs, Future) else {}
        if later and (partial.exists() or storage.children(output_dir)):
            known, later = later.result(), None
        work = Stage(
            kind=kind,
            place=storage.join(output_dir),
            directory=partial / place.name,
            config=dict(config),
            inputs=known,
            finished=None,
            notes=partial / "notes",
        )
        if overwrite:
            _refuse_foreign(work.place)
        else:
            work.finished = _finished(work)
        if work.finished is not None:
            print(f"{work.place}: already made with this configuration; nothing to do")
            _discard(partial)
            yield work
            return
        _begin(work, partial, resume and later is None)
        if later:
            later.add_done_callback(lambda _: _sign(work, partial, later))
        else:
            _sign(work, partial)
        try:
            yield work
            if later:
                work.inputs.update(later.result())
            commit(work.directory, kind, work.config, work.inputs, work.extra, work.hashes)
            if storage.is_uri(work.place):
                storage.publish(work.directory, work.place)
            else:
                if place.exists():
                    place.rename(partial / "before")
                work.directory.rename(place)
        except BaseException as error:
            if not resume or isinstance(error, Exception):
                _discard(partial)
            raise
        _discard(partial)


def _discard(partial: Path) -> None:
    """Remove what a run worked in; what is whole in it first stops being so."""
    for file in partial.glob(f"*/{NAME}"):
        file.unlink()
    shutil.rmtree(partial, ignore_errors=True)


def _begin(work: Stage, partial: Path, resume: bool) -> None:
    """Make the directory to work in, with what a killed run of the same work left in it if that is wanted."""
    whose = partial / "work.sha256"
    if not (resume and whose.is_file() and whose.read_text(encoding="ascii") == _identity(work)):
        _discard(partial)
    work.directory.mkdir(parents=True, exist_ok=True)
    (work.directory / NAME).unlink(missing_ok=True)


def _sign(work: Stage, partial: Path, inputs: Future[dict[str, str]] | None = None) -> None:
    """Say in a directory that is being worked in which work that is."""
    if inputs is not None:
        if inputs.cancelled() or inputs.exception() is not None or not partial.exists():
            return
        work.inputs.update(inputs.result())
    (partial / "work.sha256").write_text(_identity(work), encoding="ascii")


def _identity(work: Stage) -> str:
    return config_hash({"kind": work.kind, "by": __version__, "config": work.config, "inputs": work.inputs})


def commit(
    directory: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    extra: Mapping[str, Any] | None = None,
    hashes: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Hash a directory's files, but those in `hashes`, and write its manifest."""
    manifest = Manifest(
        kind=kind,
        created_by=f"paddock {__version__}",
        config=dict(config),
        config_hash=config_hash(dict(config)),
        inputs=dict(inputs),
        files=scan(directory, hashes),
        extra=dict(extra or {}),
    )
    manifest.write(directory)
    return manifest


def difference(found: Manifest, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str | None:
    """What of a configuration and its inputs is not what a manifest says, or None."""
    return changed(found.config, found.inputs, config, inputs)


def changed(
    was_config: Mapping[str, Any], was_inputs: Mapping[str, str], config: Mapping[str, Any], inputs: Mapping[str, str]
) -> str | None:
    """The first difference between two configurations with their inputs, for a person; None where they are the same."""
    before, after = _flat({"config": was_config, "input": was_inputs}), _flat({"config": config, "input": inputs})
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            name = key.removeprefix("config.")
            return f"{name} was {_short(before.get(key))} and is now {_short(after.get(key))}"
    return None


def apart(output_dir: str | Path, *inputs: str | Path) -> None:
    """Raise OutputError where an output would stand in, around or instead of one of its inputs."""
    place = str(storage.join(output_dir))
    for path in map(str, inputs):
        if place == path or path.startswith(f"{place}/") or place.startswith(f"{path}/"):
            raise OutputError(f"output_dir: {place}: overlaps with the input {path}; choose another output_dir")


def _refuse_foreign(place: str | Path) -> None:
    """Raise OutputError where a directory holds anything that no stage of ours wrote."""
    ours = (NAME, storage.UNFINISHED)
    if storage.children(place) and not any(storage.exists(storage.join(place, name)) for name in ours):
        raise OutputError(f"{place}: exists and is not a finished output of Paddock; choose another output_dir")


def _finished(work: Stage) -> Manifest | None:
    place = work.place
    _refuse_foreign(place)
    found = read(place)
    if found is None:
        return None  # nothing there, or an upload of ours that was cut short
    changed = f"kind was {found.kind} and is now {work.kind}" if found.kind != work.kind else None
    changed = changed or difference(found, work.config, work.inputs)
    if changed is not None:
        raise OutputError(
            f"{place}: made with another configuration: {changed}; choose another output_dir or overwrite=true"
        )
    return check(place)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:36]}..."


def main(argv: list[str]) -> int:
    """`verify DIR...`: exit code 0 where all is as written, 2 where not."""
    if len(argv) < 2 or argv[0] != "verify":
        print("usage: python -m paddock.manifest verify DIR...", file=sys.stderr)
        return 2
    try:
        for directory in argv[1:]:
            manifest = verify(directory)
            print(f"{directory}: {manifest.kind}, {len(manifest.files)} files, as written")
    except PaddockError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
