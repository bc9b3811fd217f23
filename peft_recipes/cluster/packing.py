"""Folders as streams of pieces: how a run's folder goes to a node and comes back without a shared disk.

The stream is a tar archive, written and read piece by piece, so that neither side holds a folder in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from peft_recipes.runs.files import clear
from peft_recipes.runs.lock import LOCK_FILES

PIECE = 8 * 2**20  # bytes: above the size from which Ray stores an object, below what a small object store can hold


def pack(root: Path, names: Iterable[str] | None = None, piece: int = PIECE) -> Iterator[bytes]:
    """Yield the files of a folder, or of some entries of it, as pieces of a tar archive.

    Locks and unfinished files are left out. Raises OSError where a file disappears or shrinks meanwhile.
    """
    buffer = bytearray()
    for path in _files(root, names):
        buffer += _header(path, path.relative_to(root).as_posix())
        left = path.stat().st_size if path.is_file() else 0
        padding = -left % tarfile.BLOCKSIZE
        with open(path, "rb") if path.is_file() else contextlib.nullcontext() as file:
            while left:
                read = file.read(min(left, piece))
                if not read:
                    raise OSError(f"{path} became shorter while it was read")
                left -= len(read)
                buffer += read
                while len(buffer) >= piece:
                    yield bytes(buffer[:piece])
                    del buffer[:piece]
        buffer += bytes(padding)
    yield bytes(buffer + bytes(2 * tarfile.BLOCKSIZE))  # two empty blocks end an archive


def _files(root: Path, names: Iterable[str] | None) -> Iterator[Path]:
    for start in [root] if names is None else [root / name for name in names]:
        for path in [start, *sorted(start.rglob("*"))] if start.is_dir() else [start]:
            relative = path.relative_to(root)
            if path != root and not any(part in LOCK_FILES for part in relative.parts):
                yield path


def _header(path: Path, name: str) -> bytes:
    info = tarfile.TarInfo(name)
    stat = path.stat()
    info.mode, info.mtime = stat.st_mode & 0o777, int(stat.st_mtime)
    if path.is_dir():
        info.type = tarfile.DIRTYPE
    else:
        info.size = stat.st_size
    return info.tobuf(tarfile.PAX_FORMAT)


class _Stream:
    """A file object that reads the pieces one after another."""

    def __init__(self, pieces: Iterable[bytes]):
        self._pieces, self._buffer = iter(pieces), bytearray()

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size and (piece := next(self._pieces, None)) is not None:
            self._buffer += piece
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def unpack(pieces: Iterable[bytes], folder: Path) -> None:
    """Write the files of a stream to a new folder, which appears complete or not at all."""
    incoming = folder.with_name(f".{folder.name}.incoming-{os.getpid()}")
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    try:
        with tarfile.open(fileobj=_Stream(pieces), mode="r|") as archive:  # type: ignore[call-overload]
            archive.extractall(incoming, filter="data")
        os.replace(incoming, folder)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def receive(pieces: Iterable[bytes], folder: Path, last: str = "") -> None:
    """Replace a folder's content by the stream's: it is complete before the first file is moved; `last` comes last."""
    with _incoming(pieces, folder) as incoming:
        (folder / last).unlink(missing_ok=True) if last else None
        clear(folder, keep=LOCK_FILES)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(incoming.iterdir(), key=lambda path: path.name == last):
            os.replace(path, folder / path.name)


def receive_parts(pieces: Iterable[bytes], folder: Path, names: Iterable[str], instead_of: Iterable[Path] = ()) -> None:
    """Put some entries of a folder that is still being written into its copy; then delete `instead_of` there."""
    with _incoming(pieces, folder) as incoming:
        for target in [folder / name for name in names]:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            os.replace(incoming / target.relative_to(folder), target)
        for path in instead_of:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _incoming(pieces: Iterable[bytes], folder: Path) -> Iterator[Path]:
    incoming = folder.with_name(f".{folder.name}.received")
    shutil.rmtree(incoming, ignore_errors=True)  # of a process that was killed
    unpack(pieces, incoming)
    try:
        yield incoming
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def digest(path: Path) -> str:
    """Return a hash of a file's or folder's names, sizes and contents; of a large file, of its first and last MB."""
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        total.update(f"{file.relative_to(path).as_posix()} {size}\n".encode())
        with file.open("rb") as content:
            if size <= 64 * 2**20:
                total.update(content.read())
            else:
                total.update(content.read(2**20))
                content.seek(-(2**20), os.SEEK_END)
                total.update(content.read())
    return total.hexdigest()[:20]
