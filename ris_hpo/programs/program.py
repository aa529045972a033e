"""The contract of a training program: one function that trains, and what it is given.

    def train(trial: TrialContext) -> float: ...

A study names its program as ``study.program = "package.module:function"``. The function reads its settings from
``trial.config``, calls ``trial.report`` after each validation, and returns the final score. All else is the service's:
which settings are tried, on which worker, and what becomes of a trial that is pruned, stopped or lost.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from ris_hpo.atomic import make_folder, replacing
from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError


class RequeuedError(Exception):
    """A training program has stopped half-way, with a checkpoint; raised by ``TrialContext.requeue``."""


class TrialContext:
    """What a training program is given: its settings, a place for its files, and whom it reports to.

    This class runs a program by itself: nothing is pruned and nothing is stopped, and what is reported stands in
    ``scores``. In a study the program gets a subclass.

    Args:
        config: the settings, nested as in the study file: the base with the trial's parameters over it.
        directory: folder for checkpoints and other files, made where it is not there.
        seed: where all that is random should start from.
        device: "cpu", "cuda" or "cuda:i".

    Attributes:
        config: as above.
        directory: as above. A trial that continues a lost one finds a copy of its files here.
        seed: as above.
        device: as above.
        scores: score by step, as reported so far.
        metrics: the further values of the last report.
        recorded: what ``record`` was given.
    """

    def __init__(self, config: Mapping[str, Any], directory: Path, *, seed: int = 0, device: str = "cpu") -> None:
        self.config = config
        self.directory = make_folder(directory)
        self.seed = seed
        self.device = device
        self.scores: dict[int, float] = {}
        self.metrics: dict[str, float] = {}
        self.recorded: dict[str, Any] = {}

    def plan(self, first_step: int, last_step: int) -> None:
        """State at which steps the program reports for the first and for the last time, before it does.

        Pruners place their rungs (the steps at which trials are compared) by it, and prune nothing at the last step.
        Without it the first step is 1 and no step is the last.

        Args:
            first_step: of the first report.
            last_step: of the last report.
        """

    def report(self, step: int, score: float, **metrics: float) -> bool:
        """Report a validation; a step that was reported before, by this trial or one that it continues, is ignored.

        Args:
            step: how far the training is, in a unit of the program's own that grows.
            score: what the study is about.
            metrics: other values to be shown; ``floor`` is the best score that any program could have.

        Returns:
            True where the trial is pruned: the program should return now.
        """
        self.scores[step] = score
        self.metrics = metrics
        return False

    def should_stop(self) -> bool:
        """Say whether to stop now. Ask often, save a checkpoint when told so, and call ``requeue``."""
        return False

    def requeue(self) -> NoReturn:
        """Leave the program; the trial goes on later from its checkpoint, perhaps in another process."""
        raise RequeuedError

    def concluding(self) -> None:
        """State that no more reports will come, however long the rest takes: no time limit between reports applies."""

    def record(self, **values: Any) -> None:
        """Keep further results with the trial, as JSON types. Keep them small."""
        self.recorded |= values

    def artifact(self, path: Path) -> None:
        """Keep a copy of a file with the trial, where the dashboard shows it."""

    def show(self, **objects: Any) -> None:
        """Hand objects to what draws this kind of trial, if anything does."""

    @contextmanager
    def saving(self, name: str) -> Iterator[Path]:
        """Write a file of the trial's directory whole or not at all.

        ``with trial.saving("state.pt") as path: torch.save(state, path)``

        Args:
            name: the file's name.

        Yields:
            A temporary path with the same suffix; the file takes its name when all went well and is on the disk.

        Raises:
            OutputError: disk full, or no permission.
        """
        with replacing(self.directory / name, durable=True) as partial:
            yield partial

    def saved(self, name: str) -> Path | None:
        """Return the path of a file of the trial's directory; None where this trial has to start from the beginning."""
        path = self.directory / name
        return path if path.is_file() else None


@dataclass(frozen=True)
class Program:
    """A training program.

    Attributes:
        train: trains and returns the final score; None stands for the last one reported.
        config: class of the settings, for defaults and checks when a study is loaded; None takes any settings. Where it
            has a field ``seed``, that is the trial's.
    """

    train: Callable[[TrialContext], float | None]
    config: type[Spec] | None = None


_BUILT_IN: Final = {"training": "ris_hpo.programs.training:", "inference": "ris_hpo.programs.inference:"}


def built_in(kind: str, objective: str) -> str:
    """Return the name of the program of a study without one of its own.

    Args:
        kind: "training" or "inference".
        objective: "network" or "pipeline".
    """
    return _BUILT_IN[kind] + objective.upper()


def load_program(name: str) -> Program:
    """Import a program, from the installed packages or the current folder.

    It is imported only here, so that a process that never trains never pays for torch.

    Args:
        name: ``package.module:function``; in place of the function there may be a ``Program``.

    Raises:
        ConfigError: no such module or name in it, or not a function.
    """
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise ConfigError(f"program '{name}': expected package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(path), attribute)
    except ImportError as error:
        raise ConfigError(
            f"program '{name}' cannot be imported ({error}); install it, or work in the folder that holds it"
        ) from None
    except AttributeError:
        raise ConfigError(f"program '{name}': module '{path}' has no '{attribute}'") from None
    if isinstance(found, Program):
        return found
    if not callable(found):
        raise ConfigError(f"program '{name}' is not a function but {type(found).__name__}")
    return Program(found)
