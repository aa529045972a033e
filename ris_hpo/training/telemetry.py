"""Events of a run as JSON lines: steps, validations, phases, gates, start and end.

One line per event, with ``event`` and ``scenes_seen``. A resumed run cuts the file back to the length it had at its
checkpoint, so that no step is recorded twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ris_hpo.atomic import writing
from ris_hpo.errors import ConfigError

FILE_NAME = "telemetry.jsonl"
STEP, VALIDATION, PHASE, GATE, START, END = "step", "validation", "phase", "gate", "start", "end"


class Telemetry:
    """Writer of one run's events; a context manager.

    Raises:
        OutputError: the file cannot be written; any call may raise it.
    """

    def __init__(self, directory: Path, offset: int = 0) -> None:
        self.path = directory / FILE_NAME
        with writing(self.path):
            if self.path.exists():
                with self.path.open("rb+") as stream:
                    stream.truncate(min(offset, self.path.stat().st_size))
            self._stream: TextIO = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self.path):
            self._stream.close()

    def write(self, event: str, scenes_seen: int, **values: Any) -> None:
        """Append one event; infinities and NaN are written as null with their name under ``not_finite``."""
        record = {"event": event, "scenes_seen": scenes_seen} | values
        bad = [key for key, value in record.items() if isinstance(value, float) and not abs(value) < float("inf")]
        if bad:
            record |= dict.fromkeys(bad) | {"not_finite": bad}
        with writing(self.path):
            self._stream.write(json.dumps(record, separators=(",", ":")) + "\n")

    def offset(self) -> int:
        """Bytes written so far, flushed to the operating system."""
        with writing(self.path):
            self._stream.flush()
        return self._stream.tell()


def read(directory: Path) -> Iterator[dict[str, Any]]:
    """Events of a run, oldest first; a last line that a crash cut short is left out.

    Raises:
        ConfigError: there is no telemetry in the directory, or a line of it is not an event.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: no telemetry; is '{directory}' the directory of a run?")
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                event = json.loads(line)
            except ValueError:
                raise ConfigError(f"{path}: line {number} is not an event of a run") from None
            yield event
