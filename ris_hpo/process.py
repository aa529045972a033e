"""This process: its memory, the signals that ask it to stop, and the folders where it leaves and finds its files."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Final

STORAGE_VARIABLE: Final = "RIS_HPO_STORAGE_DIR"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)


def storage_directory() -> Path:
    """Return where runs leave their database, checkpoints and artifacts: ``$RIS_HPO_STORAGE_DIR`` or ``./storage``."""
    return Path(os.environ.get(STORAGE_VARIABLE) or "storage")


def study_directories() -> list[Path]:
    """Return the folders searched for study files, first found first: ``./studies``, then those that come with ris-hpo.

    These lie inside the package where it was installed, and beside it in a checkout.
    """
    package = Path(__file__).resolve().parent
    inside = package / "studies"
    return [Path("studies"), inside if inside.is_dir() else package.parent / "studies"]


def keep_freed_memory() -> bool:
    """Let the C library keep up to 1 GiB that is freed, instead of giving it back and asking for it again.

    Tensors of some megabytes come and go with every operation; pages that the kernel hands out anew each time cost a
    tenth of the time that a scene takes.

    Returns:
        whether the C library is one that can (glibc).
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(option, 1 << 30) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


class StopSignals:
    """SIGTERM and SIGINT as a question: the first asks to stop, the second ends the process at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Say whether a stop was asked for."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Ask to stop, as the first signal does."""
        self._asked.set()

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            os._exit(128 + number)
        self._asked.set()
