"""Every error a user can meet, each with its exit code.

The message is one line: what was found, what was expected, what to do. The command line prints that line and exits with
``exit_code``; a program catches the class. Anything that is not a ``RisHpoError`` is a bug and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def one_line(message: str) -> str:
    """Return a message as one line. Escapes control characters, because messages quote user input."""
    line = " ".join(message.split("\n"))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class RisHpoError(Exception):
    """Base of all errors that are the input's or the surroundings' fault, not a bug."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(RisHpoError):
    """A run configuration or TOML file that cannot be used: unknown key, wrong type, impossible bounds."""

    exit_code = 3


class SpaceError(ConfigError):
    """A search space that is not known, cannot be read or does not fit the study it is used with."""

    exit_code = 4


class SceneFileError(RisHpoError):
    """A scene or estimate file that is missing, malformed or holds values that no scene has."""

    exit_code = 5


class CheckpointError(RisHpoError):
    """A checkpoint that is missing, damaged or belongs to another network or configuration."""

    exit_code = 6


class StoreError(RisHpoError):
    """A trial store that cannot be opened, reached, written or understood."""

    exit_code = 7


class StudyError(RisHpoError):
    """A study that does not exist, is empty, or does not allow what was asked of it."""

    exit_code = 8


class StudyGoneError(StudyError, KeyError):
    """A study or trial that is not in the store, or not any more: deleted or renamed while it was in use."""

    exit_code = 16
    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class ArchiveError(RisHpoError):
    """An archive of a study that is missing, damaged, cut short, or not one that this program wrote."""

    exit_code = 17


class NumericalError(RisHpoError):
    """A computation without a finite answer, with the quantity and the bounded repair that did not help."""

    exit_code = 9


class TrainingDivergedError(NumericalError):
    """Training that cannot go on: a non-finite loss (with the term's name) or repeatedly skipped steps."""

    exit_code = 10


class ProofError(RisHpoError):
    """A network that does not pass phase 0, with the self-test that failed."""

    exit_code = 11


class GateError(RisHpoError):
    """A curriculum phase that did not pass its gate, with the evidence."""

    exit_code = 12


class WorkerError(RisHpoError):
    """A worker pool that cannot do its work: crash loop, no device, no free memory."""

    exit_code = 13


class DeviceError(RisHpoError):
    """A device that was asked for and is not there, or has too little memory."""

    exit_code = 14


class OutputError(RisHpoError):
    """A file or folder that cannot be written: no such folder, no permission, disk full."""

    exit_code = 15


@contextmanager
def reading(path: Path, kind: type[RisHpoError]) -> Iterator[None]:
    """Say why a file cannot be read: a missing file is not an unreadable one.

    Args:
        path: the file.
        kind: the error to raise.
    """
    try:
        yield
    except FileNotFoundError:
        raise kind(f"{path}: no such file") from None
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror or error})") from None
