"""What a trial has reported, kept with its checkpoint: a trial that continues it has to report it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ris_hpo.programs.program import REPORTS


class Journal:
    """The reports of a trial in its directory, one line of JSON each, written as they are made.

    Args:
        directory: the trial's, with a copy of what its predecessor left where there is one.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / REPORTS
        self._scores: dict[int, float] = {}
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self._scores[int(entry["step"])] = float(entry["score"])
                except (ValueError, KeyError, TypeError):  # the worker died while it wrote this line
                    continue

    @property
    def steps(self) -> list[int]:
        """Steps that were reported."""
        return list(self._scores)

    def before(self, step: int) -> Iterator[tuple[int, float]]:
        """Yield the reports of earlier steps in their order."""
        yield from sorted((each, score) for each, score in self._scores.items() if each < step)

    def append(self, step: int, score: float) -> None:
        """Add a report, unless there is one of this step."""
        if step not in self._scores:
            self._scores[step] = score
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "score": score}) + "\n")
