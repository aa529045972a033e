"""The figures of a running trial, kept from ever costing the trial its result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from optuna.exceptions import UpdateFinishedTrialError

from ris_hpo.errors import StoreError, StudyGoneError
from ris_hpo.trials.failures import one_line

log = logging.getLogger(__name__)


class Figures(Protocol):
    """What draws a trial for the dashboard while it runs; see ``report.trial_figures.TrialFigures``."""

    def begin(self, config: Any) -> None:
        """Record the run configuration."""

    def show(self, objects: Mapping[str, Any]) -> None:
        """Draw what the training program hands out with ``TrialContext.show``."""


class Drawing:
    """Draws a trial until something goes wrong with that; the error is logged, and the trial goes on without figures.

    Two kinds of error are passed on, since they are the trial's own: the store stays away, or it has given the trial to
    another worker.

    Args:
        number: number of the trial, for the log.
        make: makes the figures; None draws nothing.
    """

    def __init__(self, number: int, make: Callable[[], Figures] | None) -> None:
        self._number = number
        self._figures: Figures | None = None
        if make is not None:
            self._figures = self._attempted(make)

    def begin(self, config: Any) -> None:
        """See ``Figures.begin``."""
        if (figures := self._figures) is not None:
            self._attempted(lambda: figures.begin(config))

    def show(self, objects: Mapping[str, Any]) -> None:
        """See ``Figures.show``."""
        if (figures := self._figures) is not None:
            self._attempted(lambda: figures.show(objects))

    def _attempted(self, draw: Callable[[], Any]) -> Any:
        try:
            return draw()
        except (StoreError, StudyGoneError, UpdateFinishedTrialError):
            raise
        except Exception as error:  # a figure may fail in any way, and none is worth hours of training
            log.error("trial %d goes on without figures: %s", self._number, one_line(error), exc_info=True)
            self._figures = None
            return None
