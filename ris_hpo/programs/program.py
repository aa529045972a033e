"""The contract of a training program: one function that trains, and what it is given.

    def train(trial: TrialContext) -> float: ...

A study names its program as ``study.program = "package.module:function"``. The function reads its settings from
``trial.config``, calls ``trial.report`` after each validation, and returns the final score. All else is the service's:
which settings are tried, on which worker, and what becomes of a trial that is pruned, stopped or lost.
"""

from __future__ import annotations

import importlib
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from ris_hpo.atomic import make_folder, replacing
from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError

REPORTS: Final = "reports.jsonl"
"""The service's own file in the directory of a trial: what it has reported."""


class RequeuedError(BaseException):
    """A training program has stopped half-way, with a checkpoint; raised by ``TrialContext.requeue``.

    No ``except Exception`` of a program catches it.
    """


def as_number(value: Any, what: str) -> float:
    """Return a number of any kind as a float: Python's, NumPy's, a tensor of one element.

    Args:
        value: what a program reported or returned.
        what: how to call it in the message.

    Raises:
        TypeError: no number, or several.
    """
    if not isinstance(value, bool | str | bytes):
        try:
            return float(value.detach() if hasattr(value, "detach") else value)  # torch warns of one with a gradient
        except (TypeError, ValueError, RuntimeError):  # the last is torch's, for a tensor of several elements
            pass
    shown = " ".join(repr(value).split())
    raise TypeError(f"{what} is {shown[:60]} ({type(value).__name__}), expected one number")


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

    def replan(self, last_step: int) -> None:
        """State that the last report comes at another step than planned: training was extended, or ends early.

        The rungs stay where they are, since those of one study have to be the same for all its trials.

        Args:
            last_step: of the last report, as far as is known now.
        """

    def report(self, step: int, score: float, **metrics: float) -> bool:
        """Report a validation; then save a checkpoint, so that none is ever passed over.

        A trial that continues a lost one may report again what that one had reported; this is ignored.

        Args:
            step: how far the training is, in a unit of the program's own; a whole number that grows with each report.
            score: what the study is about.
            metrics: other values to be shown; ``floor`` is the best score that any program could have.

        Returns:
            True where the trial is pruned, or paused until it is promoted: the program should save its checkpoint and
            return. One that was paused and not saved trains again what the checkpoint does not hold.

        Raises:
            TypeError: a step that is no whole number, or a score or metric that is no number.
            ValueError: a step that is negative, or not above the one before.
        """
        try:
            place = operator.index(step)
        except TypeError:
            raise TypeError(f"step is {step!r} ({type(step).__name__}), expected a whole number") from None
        last = next(reversed(self.scores), -1)
        if place <= last:
            before = "not be negative" if last < 0 else f"be above {last}, the one reported before"
            raise ValueError(f"step is {place}, but must {before}")
        values = {name: as_number(value, f"metric '{name}'") for name, value in metrics.items()}
        self.scores[place] = self.finite(as_number(score, "score"))
        self.metrics = values
        return False

    def finite(self, score: float) -> float:
        """Return a reported score as it counts; a study replaces one that is not finite by its worst score."""
        return score

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
        """Keep a copy of a file with the trial, where the dashboard shows it.

        Raises:
            FileNotFoundError: no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"artifact {path}: no such file")

    def show(self, **objects: Any) -> None:
        """Hand objects to what draws this kind of trial, if anything does."""

    @contextmanager
    def saving(self, name: str) -> Iterator[Path]:
        """Write a file of the trial's directory whole or not at all.

        ``with trial.saving("state.pt") as path: torch.save(state, path)``

        Args:
            name: the file's name; a plain one, since only files of the directory itself are sure to be found again.

        Yields:
            A temporary path with the same suffix; the file takes its name when all went well and is on the disk.

        Raises:
            ValueError: a name that leads elsewhere, begins with a dot, or is the service's own.
            OutputError: disk full, or no permission.
        """
        with replacing(self._file(name), durable=True) as partial:
            yield partial

    def saved(self, name: str) -> Path | None:
        """Return the path of a file of the trial's directory; None where this trial has to start from the beginning."""
        path = self._file(name)
        return path if path.is_file() else None

    def _file(self, name: str) -> Path:
        if Path(name).name != name or name.startswith(".") or name == REPORTS:
            raise ValueError(
                f"'{name}' cannot be saved with the trial: expected a plain file name, without folders or a dot in "
                f"front, and other than {REPORTS}"
            )
        return self.directory / name


@dataclass(frozen=True)
class Program:
    """A training program.

    Attributes:
        train: trains and returns the final score; None stands for the last one reported.
        config: class of the settings, for defaults and checks when a study is loaded; None takes any settings. Where it
            has a field ``seed``, that is the trial's.
        length: dotted key of the settings that is the last step of a trial; None where there is none.
        interval: dotted key of the settings that is the step of its first report.
        rungs: dotted key of the settings that the rungs' steps are written to, for a program that prepares for them.
        cost: operations of one step under given settings, the same on every machine; for trials of equal compute.
    """

    train: Callable[[TrialContext], float | None]
    config: type[Spec] | None = None
    length: str | None = None
    interval: str | None = None
    rungs: str | None = None
    cost: Callable[[Any], float] | None = None


_BUILT_IN: Final = {"training": "ris_hpo.programs.training:", "inference": "ris_hpo.programs.inference:"}


def built_in(kind: str, objective: str) -> str:
    """Return the name of the program of a study without one of its own.

    Args:
        kind: "training" or "inference".
        objective: "network", "fast" or "pipeline"; an "inference" study has no "fast", whose settings it draws.
    """
    return _BUILT_IN[kind] + objective.upper()


def load_program(name: str) -> Program:
    """Import a program, from the installed packages or the current folder.

    It is imported only here, so that a process that never trains never pays for torch.

    Args:
        name: ``package.module:function``; in place of the function there may be a ``Program``.

    Raises:
        ConfigError: no such module or name in it, one that fails when it is imported, or not a function.
    """
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise ConfigError(f"program '{name}': expected package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ConfigError(
            f"program '{name}' cannot be imported ({error}); install it, or work in the folder that holds it"
        ) from None
    except Exception as error:  # a module of a user may fail in any way while it is imported
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else f"{where[0]}:{where[1]}"
        raise ConfigError(f"program '{name}' cannot be imported ({type(error).__name__}: {error}, {place})") from error
    if not hasattr(module, attribute):
        file, own = getattr(module, "__file__", None), source(name)
        other = own is not None and file is not None and own.resolve() not in (Path(file), *Path(file).parents)
        hint = f"; {own} is not seen because of it: give yours another name" if other else ""
        raise ConfigError(f"program '{name}': module '{path}' ({file or 'built in'}) has no '{attribute}'{hint}")
    found = getattr(module, attribute)
    if isinstance(found, Program):
        return found
    if not callable(found):
        raise ConfigError(f"program '{name}' is not a function but {type(found).__name__}")
    return Program(found)


def source(name: str) -> Path | None:
    """Return the module or package of a program that lies in the current folder; None for an installed one.

    Args:
        name: ``package.module:function``.
    """
    top = name.partition(":")[0].partition(".")[0]
    found = (Path.cwd() / top, Path.cwd() / f"{top}.py")
    return next((path for path in found if path.exists()), None)
