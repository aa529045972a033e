"""The storage that is handed to Optuna: a read cache over the ticket storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.trial import FrozenTrial, TrialState, create_trial

from ris_hpo.store.credentials import redact
from ris_hpo.store.patience import patiently
from ris_hpo.store.tickets import Seen, TicketStorage

_CHUNK = 500  # trials asked for by id in one statement


_NO_ID = 2**31 - 1


class Store(_CachedStorage):
    """The storage handed to Optuna: a read cache over ``TicketStorage``, and its ticket operations."""

    def __init__(self, backend: TicketStorage, address: str) -> None:
        super().__init__(backend)
        self.tickets = backend
        self.address = address
        """What a worker in another process needs to open the same store; holds the password if the URL did."""

    @property
    def redacted(self) -> str:
        """The address fit for people, logs and attributes."""
        return redact(self.address)

    @property
    def is_sqlite(self) -> bool:
        """Whether the store is a file on this machine."""
        return self.tickets.is_sqlite

    def close(self) -> None:
        """Give the connections of this process back."""
        self.tickets.scoped_session.remove()
        self.tickets.engine.dispose()

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        """Refresh the cache without reading waiting tickets again: Optuna's own would load all of them on each look."""
        with self._lock:
            study = self._studies.setdefault(study_id, _StudyInfo())
            newest = max((trial._trial_id for trial in study.trials.values()), default=-1)
            seen: dict[int, Seen] = patiently(self.tickets.trial_states)(study_id, newest)
            if not seen and newest == -1:
                self.tickets.get_study_directions(study_id)  # raises KeyError where there is no such study
            known = {
                trial._trial_id: (trial.state, trial.datetime_start is not None)
                for trial in study.trials.values()
                if not trial.state.is_finished()
            }
            # tickets that nobody ever took cannot have changed
            untouched = (TrialState.WAITING, False)
            stale = [key for key, now in seen.items() if now != untouched or known.get(key) != untouched]
            stale += [key for key in known if key not in seen]  # ended since the last look
            for start in range(0, len(stale), _CHUNK):
                few = stale[start : start + _CHUNK]
                self._add_trials_to_cache(
                    study_id,
                    self._backend._get_trials(
                        study_id, None, included_trial_ids=set(few), trial_id_greater_than=_NO_ID
                    ),
                )

    def fill(self, study_id: int, tickets: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> int:
        """See ``TicketStorage.fill``."""
        return int(patiently(self.tickets.fill)(study_id, tickets))

    def claim(self, study_id: int, owner: str) -> int | None:
        """See ``TicketStorage.claim``."""
        trial_id: int | None = patiently(self.tickets.claim)(study_id, owner)
        return trial_id

    def release(self, trial_id: int, owner: str | None, marks: Mapping[str, Any]) -> bool:
        """See ``TicketStorage.release``."""
        return bool(patiently(self.tickets.release)(trial_id, owner, marks))

    def retire(
        self,
        trial_id: int,
        owner: str | None,
        marks: Mapping[str, Any],
        successor: Callable[[FrozenTrial], FrozenTrial | None],
    ) -> bool:
        """See ``TicketStorage.retire``."""
        return bool(patiently(self.tickets.retire)(trial_id, owner, marks, successor))

    def heartbeats(self, study_id: int) -> dict[int, datetime]:
        """See ``TicketStorage.heartbeats``."""
        beats: dict[int, datetime] = patiently(self.tickets.heartbeats)(study_id)
        return beats

    def withdraw(self, trial_ids: Sequence[int]) -> None:
        """See ``TicketStorage.withdraw``."""
        patiently(self.tickets.withdraw)(trial_ids)

    def mark(self, trial_id: int, marks: Mapping[str, Any]) -> None:
        """See ``TicketStorage.mark``."""
        patiently(self.tickets.mark)(trial_id, marks)


def ticket(params: Mapping[str, Any] | None = None, marks: Mapping[str, Any] | None = None) -> FrozenTrial:
    """Return a WAITING template: empty for the sampler to fill, or with parameters that are fixed beforehand."""
    system = {"fixed_params": dict(params)} if params else None
    return create_trial(state=TrialState.WAITING, user_attrs=dict(marks or {}), system_attrs=system)
