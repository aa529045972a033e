"""Where a trial goes on from: its predecessor's checkpoint, or the start where a checkpoint is damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_PARTIAL = ".partial-"
_DAMAGED = ".damaged-"


def inherit(directory: Path, predecessors: Iterable[Path]) -> None:
    """Give a trial a copy of the checkpoint of the nearest predecessor that has one.

    It is a copy in a directory of its own: the predecessor's worker may only have been silent, and writes on where
    nobody reads any more. Without a predecessor's checkpoint (another host, no shared disk) the trial starts over, to
    the same curve.

    Args:
        directory: the trial's own directory; nothing is done where it exists.
        predecessors: directories of the trials that this one continues, the nearest first; some may not exist.
    """
    if directory.exists():
        return
    source = next((each for each in predecessors if each.is_dir()), None)
    if source is None:
        return
    partial = directory.with_name(f"{directory.name}{_PARTIAL}{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(".*"))  # not the files that are half written
        partial.rename(directory)
    except OSError:  # the predecessor's worker moved a file meanwhile: start over rather than from a torn checkpoint
        shutil.rmtree(partial, ignore_errors=True)


def set_aside(directory: Path) -> None:
    """Move a directory with a damaged checkpoint away, so that the trial can start over.

    It is kept until the trial has ended (``remove_leftovers``), for whoever wants to look at it meanwhile.
    """
    directory.rename(directory.with_name(f"{directory.name}{_DAMAGED}{os.getpid()}"))


def remove_leftovers(directory: Path) -> None:
    """Remove what ``inherit`` and ``set_aside`` left beside a trial's directory, this worker or one that was killed."""
    for kind in (_PARTIAL, _DAMAGED):
        for path in directory.parent.glob(f"{directory.name}{kind}*"):
            shutil.rmtree(path, ignore_errors=True)
