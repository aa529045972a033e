"""What is done to a study from outside: watched, packed, copied, its trials asked for, tried again, set aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ris_hpo.api.table import LiveTable, in_notebook
from ris_hpo.search import amend
from ris_hpo.search.archive import EVERYTHING, Moved, archive_study, copy_study
from ris_hpo.search.lifecycle import status as status_of
from ris_hpo.search.spec import KeepSpec
from ris_hpo.search.status import StudyStatus
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.workers.watch import watched


class StudyUpkeep:
    """The part of ``Study`` that looks after it and its trials.

    Args:
        store: the store.
        name: the study's name.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.name = name

    def watch(self, interval: float = 2.0, *, show: bool | None = None) -> StudyStatus:
        """Follow the study while somebody else runs it, until it has ended; return where it then stands.

        Args:
            interval: seconds between two looks.
            show: keep a table up to date in the notebook; by default where there is a notebook.
        """
        table = LiveTable() if (in_notebook() if show is None else show) else None
        for snapshot in watched(self._store, self.name, interval):
            if table is not None:
                table.update(snapshot)
        return status_of(self._store, self.name)

    def archive(self, out: str | Path, *, keep: KeepSpec = EVERYTHING) -> Moved:
        """Write the study with its files into one file (``.zip``); it stays in the store.

        Args:
            out: the file to write.
            keep: whose checkpoints are taken; those of trials that have not ended are in any case.

        Raises:
            StudyError: it runs.
            OutputError: the file cannot be written.
        """
        return archive_study(self._store, self.name, Path(out), keep=keep)

    def copy(self, storage: str, *, name: str | None = None) -> None:
        """Copy the study with its files into another store.

        Args:
            storage: address of the other store.
            name: of the study there; None for its own.

        Raises:
            StudyError: it runs, or the other store has a study of that name.
        """
        with closing(open_store(storage)) as target:
            copy_study(self._store, self.name, target, new=name)

    def enqueue(self, *configurations: Mapping[str, Any], again: bool = False) -> list[int]:
        """Let the study try configurations of your own next; return the numbers of the trials that will run them.

        Args:
            configurations: values by searched key; what one leaves out is the sampler's.
            again: also those that a trial of the study has already.

        Raises:
            SpaceError: a key that is not searched, or a value outside its range; nothing is queued then.
            ConfigError: a configuration that the program refuses as a whole; nothing is queued then.
        """
        return amend.enqueue(self._store, self.name, configurations, again=again).numbers

    def retry(self, *numbers: int, causes: Sequence[str] = (), every: bool = False) -> list[int]:
        """Queue failed trials again, by number, cause or all; return their numbers.

        Raises:
            StudyError: no such trial, or one that has not failed.
        """
        found = amend.retry(self._store, self.name, numbers=numbers, causes=causes, every=every)
        return [each.number for each in found]

    def invalidate(self, *numbers: int, reason: str) -> None:
        """Take trials out of every ranking, report and comparison; they stay, with their scores and the reason.

        Raises:
            StudyError: no such trial, or one without a score.
        """
        amend.invalidate(self._store, self.name, numbers, reason)

    def reinstate(self, *numbers: int) -> None:
        """Let the scores of invalidated trials count again.

        Raises:
            StudyError: no such trial, or one that was not invalidated.
        """
        amend.reinstate(self._store, self.name, numbers)
