"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ris_hpo.errors import OutputError

_TEMPORARY = re.compile(r"\..+\.\d+-\d+(\.\w+)?")  # as ``replacing`` names a file
_ABANDONED_S = 3600.0  # no write takes as long, and whether a process of another machine lives cannot be asked


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of what goes wrong inside that ``path`` cannot be written.

    Raises:
        OutputError: no such folder, no permission, disk full.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Write a file under a temporary name beside ``path``; it takes the name of ``path`` when all went well.

    Whatever happens inside, nothing else is left, and what stood at ``path`` before is whole.

    Args:
        path: the file to make or replace; its folder must be there.
        durable: ask the disk to have it before it takes its name, so that it outlives a power failure.

    Yields:
        The temporary path, with the suffix of ``path``: an empty file, for a writer to fill or to replace.

    Raises:
        OutputError: no such folder, no permission, disk full.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        with writing(path):
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # as umask has it: safetensors makes files that only their owner can read
            if durable:
                with partial.open("rb") as stream:
                    os.fsync(stream.fileno())
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files of ``replacing``, in a folder and below, that a process left an hour ago or more."""
    before = time.time() - _ABANDONED_S
    for path in folder.rglob(".*"):
        with suppress(OSError):
            if _TEMPORARY.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < before:
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OutputError: no such folder, no permission, disk full.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name beside ``path``; it takes the name of ``path`` when all went well.

    Args:
        path: a folder that does not exist yet.

    Yields:
        The temporary folder; whatever happens inside, it is gone afterwards.

    Raises:
        OutputError: the path exists already, or cannot be written.
    """
    if path.exists():
        raise OutputError(f"{path}: already there; name a new folder")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            partial.mkdir()
            yield partial
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_folder(path: Path) -> Path:
    """Make a folder with its parents, where it is not there yet.

    Raises:
        OutputError: a file in its way, no permission, disk full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made ({error.strerror})") from None
    return path
