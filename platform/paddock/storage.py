"""Locations: local paths, and URIs (`s3://`, `gs://`, `abfs://`, `hdfs://`, `file://`) that pyarrow's filesystems open.

What is at a URI is read from a local copy (`fetch`) in `$PADDOCK_CACHE`, by default `~/.cache/paddock`; the cache
may be deleted whenever nothing runs. What goes to a URI is written locally (`workplace`) and uploaded.

An object store cannot rename, so a directory of ours is committed there by its manifest alone, which is uploaded
last. Until then `.manifest.json.partial` lies in it, which tells a cut-short upload from somebody else's directory.

Region, endpoint and credentials come from the environment, as the store's own tools take them (AWS_REGION, ...).
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from filelock import FileLock
from pyarrow import fs

from paddock.errors import OutputError, StorageError

MANIFEST = "manifest.json"
UNFINISHED = f".{MANIFEST}.partial"
_PIECE = 8 * 2**20
_TRANSFERS = 4


def is_uri(location: str | Path) -> bool:
    """Whether a location is a URI, not a local path."""
    return "://" in str(location)


def join(location: str | Path, *names: str) -> str | Path:
    """A location below another one: a Path for a local one, a str for a URI."""
    return "/".join([_clean(location), *names]) if is_uri(location) else Path(location, *names)


def parent(location: str | Path) -> str | Path:
    """The directory that a file or directory lies in."""
    return _clean(location).rpartition("/")[0] if is_uri(location) else Path(location).parent


def workplace(location: str | Path) -> Path:
    """Where a location is written on this machine: itself, or for a URI always the same place in the cache."""
    if not is_uri(location):
        return Path(location)
    return _cache() / f"work-{digest(_clean(location))}" / Path(location).name


def exists(location: str | Path) -> bool:
    """Whether there is a file or directory."""
    if not is_uri(location):
        return Path(location).exists()
    with _opened(location) as (filesystem, path):
        return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def is_directory(location: str | Path) -> bool:
    """Whether there is a directory."""
    if not is_uri(location):
        return Path(location).is_dir()
    with _opened(location) as (filesystem, path):
        return bool(filesystem.get_file_info(path).type == fs.FileType.Directory)


def matches(location: str | Path) -> list[str | Path] | None:
    """The files that a glob matches, sorted; None where the location is none. At a URI the last name may be one."""
    if not any(sign in str(location) for sign in "*?[") or exists(location):
        return None
    if not is_uri(location):
        return [Path(name) for name in sorted(glob.glob(str(location), recursive=True)) if Path(name).is_file()]  # noqa: PTH207
    directory, _, pattern = _clean(location).rpartition("/")
    return [join(directory, name) for name in sorted(children(directory)) if fnmatch.fnmatchcase(name, pattern)]


def children(location: str | Path) -> list[str]:
    """The names directly in a directory; none where it does not exist."""
    if not is_uri(location):
        return [path.name for path in Path(location).glob("*")]
    with _opened(location) as (filesystem, path):
        return [info.base_name for info in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))]


def listing(location: str | Path) -> dict[str, int]:
    """Every file below a directory, by its path in it, with its size in bytes; none where it does not exist."""
    if not is_uri(location):
        found = [path for path in Path(location).rglob("*") if path.is_file()]
        return {path.relative_to(location).as_posix(): path.stat().st_size for path in found}
    with _opened(location) as (filesystem, path):
        return {name: info.size for name, info in _files(filesystem, path).items()}


@contextmanager
def reading(location: str | Path) -> Iterator[Any]:
    """A file, open to be read as bytes."""
    if not is_uri(location):
        with Path(location).open("rb") as stream:
            yield stream
    else:
        # Without `compression=None` a .gz would be unpacked.
        with _opened(location) as (filesystem, path), filesystem.open_input_stream(path, compression=None) as stream:
            yield stream


def remove(location: str | Path) -> None:
    """Remove a file or directory, where there is one; a directory of ours first stops being one."""
    if not is_uri(location):
        path = Path(location)
        if path.is_dir():
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    with _opened(location) as (filesystem, uri_path):
        kind = filesystem.get_file_info(uri_path).type
        if kind == fs.FileType.Directory:
            remove(join(location, MANIFEST))
            filesystem.delete_dir(uri_path)
        elif kind != fs.FileType.NotFound:
            filesystem.delete_file(uri_path)


def write_text(location: str | Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / Path(location).name
        source.write_text(text, encoding="utf-8")
        if is_uri(location):
            upload(source, location)
        else:
            partial = Path(location).with_name(f".{source.name}.partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial)
            partial.replace(location)


def upload(source: Path, location: str | Path, *, but: Collection[str] = ()) -> None:
    """Copy a file, or the files of a directory, to a URI; what else is there stays."""
    with _opened(location) as (filesystem, path):
        if source.is_file():
            _put(filesystem, source, path)
        else:
            names = [name for name in listing(source) if name not in but]
            with ThreadPoolExecutor(_TRANSFERS) as pool:
                list(pool.map(lambda name: _put(filesystem, source / name, f"{path}/{name}"), names))


def publish(directory: Path, location: str | Path) -> None:
    """Copy a directory with its manifest to a URI, so that it is there whole or, for the next stage, not at all."""
    stale = listing(location).keys() - listing(directory).keys()
    upload(directory / MANIFEST, join(location, UNFINISHED))
    remove(join(location, MANIFEST))
    upload(directory, location, but=(MANIFEST,))
    for name in stale:
        remove(join(location, name))
    upload(directory / MANIFEST, join(location, MANIFEST))
    remove(join(location, UNFINISHED))


def mirror(location: str | Path, directory: Path) -> None:
    """Make a local directory what is at a URI, empty where nothing is; finished or not."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with _opened(location) as (filesystem, path):
        for name in _files(filesystem, path):
            _get(filesystem, f"{path}/{name}", directory / name)


def fetch(location: str | Path, *, only: Collection[str] | None = None) -> Path:
    """A local path to what is at a location: a local path as it is, of a URI a copy that is read and not written.

    The copy is made once for each state of the source (its files' sizes and times, its manifest) and appears whole;
    a directory of ours is compared with its manifest by the way. `only` names the files that are needed of a
    directory. Raises StorageError where there is nothing or the store refuses, OutputError for a directory of ours
    that is unfinished or damaged.
    """
    if not is_uri(location):
        return Path(location)
    with _opened(location) as (filesystem, path):
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise StorageError(f"{location}: no such file or directory; check the URI")
        files = {"": info} if info.type == fs.FileType.File else _files(filesystem, path)
        said = b""
        if MANIFEST in files:
            with reading(join(location, MANIFEST)) as stream:
                said = stream.read()
        elif "" not in files and exists(join(location, UNFINISHED)):
            raise OutputError(f"{location}: no {MANIFEST}, so whatever wrote it did not finish; make it again")
        hashes = _hashes(said, join(location, MANIFEST)) if said else {}
        for name in hashes.keys() - files.keys():
            raise OutputError(f"{join(location, name)}: is missing; make the directory again")
        names = [n for n in files if not said or n in hashes or n == MANIFEST]
        if only is not None:
            names = [n for n in names if n in only]
        state = [[name, files[name].size, files[name].mtime_ns] for name in sorted(names)]
        copy = _cache() / digest(_clean(location), said.decode(errors="replace"), json.dumps(state))
        copy = copy / Path(location).name
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.partial")

        def get(name: str) -> None:
            found = _get(filesystem, f"{path}/{name}" if name else path, partial / name)
            if found != hashes.get(name, found):
                raise OutputError(
                    f"{join(location, name)}: sha256 {found[:12]}..., the manifest says {hashes[name][:12]}...;"
                    " the file was changed or damaged: make the directory again"
                )

        with FileLock(copy.parent / ".lock"):
            if not copy.exists():
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    if "" not in files:
                        partial.mkdir()
                    with ThreadPoolExecutor(_TRANSFERS) as pool:
                        list(pool.map(get, names))
                    partial.rename(copy)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return copy


@contextmanager
def _opened(location: str | Path) -> Iterator[tuple[Any, str]]:
    """The filesystem of a URI and the path in it; what goes wrong in it, as one line."""
    try:
        if "?" in str(location) or "#" in str(location):
            raise StorageError(f"{location}: '?' and '#' are not read; give region and endpoint by the environment")
        filesystem, path = fs.FileSystem.from_uri(quote(_clean(location), safe="/:@%+,;=&$!*'()~[]"))
        yield filesystem, path
    except FileNotFoundError:
        raise StorageError(f"{location}: no such file or directory; check the URI") from None
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{location}: {' '.join(str(error).split())[:300]}; check URI and credentials") from None


def _files(filesystem: Any, path: str) -> dict[str, Any]:
    """The FileInfo of every file below a directory, without what is being written."""
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    infos = {info.path.removeprefix(f"{path}/"): info for info in found if info.type == fs.FileType.File}
    for name in infos:
        if ".." in PurePosixPath(name).parts:
            raise StorageError(f"{path}: {name!r} points out of the directory; remove it")
    return {n: info for n, info in infos.items() if not (info.base_name[:1] == "." and n.endswith(".partial"))}


def _get(filesystem: Any, path: str, target: Path) -> str:
    """Copy a file here; returns its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream, target.open("wb") as file:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _put(filesystem: Any, source: Path, path: str) -> None:
    directory, name = os.path.split(path)
    # Elsewhere a directory needs not be made, and a file is there only once it is whole.
    if filesystem.type_name in ("local", "hdfs"):
        filesystem.create_dir(directory, recursive=True)
    partial = f"{directory}/.{name}.partial" if filesystem.type_name == "local" else path
    with source.open("rb") as file, filesystem.open_output_stream(partial, compression=None) as stream:
        shutil.copyfileobj(file, stream, _PIECE)
    if partial != path:
        filesystem.move(partial, path)


def _hashes(manifest: bytes, where: str | Path) -> dict[str, str]:
    """What a manifest says of its files; paddock.manifest reads the rest of it."""
    try:
        return {str(name): str(entry["sha256"]) for name, entry in json.loads(manifest)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{where}: not a manifest ({error!r}); remove the directory and make it again") from None


def _cache() -> Path:
    return Path(os.environ.get("PADDOCK_CACHE") or "~/.cache/paddock").expanduser().absolute()


def _clean(location: str | Path) -> str:
    return str(location).rstrip("/")


def digest(*parts: str) -> str:
    """A short name for some texts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
