"""The storage that is handed to Optuna: it repeats calls while the server does not answer, and keeps what it read."""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar, cast

from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from ris_hpo.errors import StudyGoneError
from ris_hpo.store import attributes as names
from ris_hpo.store import folders
from ris_hpo.store.credentials import redact
from ris_hpo.store.database import GONE
from ris_hpo.store.retry import retried
from ris_hpo.store.standings import Promote
from ris_hpo.store.tickets import Claim, Seen, StudyContent, TicketStorage

Method = TypeVar("Method", bound=Callable[..., Any])

_ONE_BY_ONE = 16
"""Trials that are read one at a time in any case; one takes as long as four read together with all of the study."""


def _retrying(method: Method) -> Method:
    """Return a method that makes the same call of ``TicketStorage``, again and again while the server is away."""

    @functools.wraps(method, updated=())  # without the mark of an abstract method
    def call(self: Store, *args: Any, **kwargs: Any) -> Any:
        try:
            return retried(getattr(self.tickets, method.__name__))(*args, **kwargs)
        except KeyError as error:
            raise StudyGoneError(GONE) from error

    return cast(Method, call)


class _Known:
    """What is known of one study: its identity, and by number its trials and their ids."""

    def __init__(self) -> None:
        self.identity: str | None = None
        self.in_use = False
        self.trials: dict[int, FrozenTrial] = {}
        self.seen: dict[int, Seen] = {}
        self.invalid: dict[str, dict[str, str]] = {}
        self.newest = -1


class Store(BaseStorage):
    """Optuna's storage over ``TicketStorage``, with its ticket transactions.

    Every call outlives a server that is away for a while. Trials are kept once read: a finished one never changes, and
    a ticket that nobody ever took, or a trial that is still paused at the same rung, has not changed either, so that a
    look at a thousand trials is one short query and the few that are running. Optuna's own cache would read all waiting
    trials again on each look.

    A study or trial that is not there, or not any more, is a ``StudyGoneError``.
    """

    def __init__(self, tickets: TicketStorage, address: str, *, read_only: bool = False) -> None:
        self.tickets = tickets
        self.address = address
        """What a worker in another process needs to open the same store; holds the password if the URL did."""
        self.read_only = read_only
        """Whether it is a file that this process may only read."""
        self._studies: dict[int, _Known] = {}
        self._finished: dict[int, FrozenTrial] = {}
        self._owners: dict[int, str] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"tickets": self.tickets, "address": self.address, "read_only": self.read_only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

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
        self.tickets.close()

    def remove_session(self) -> None:
        """Give back the connection that this thread holds."""
        self.tickets.remove_session()

    # -- Optuna's calls: all of them may be repeated after a lost acknowledgement, but for ``create_new_trial`` --------

    set_study_user_attr = _retrying(BaseStorage.set_study_user_attr)
    set_study_system_attr = _retrying(BaseStorage.set_study_system_attr)
    get_study_id_from_name = _retrying(BaseStorage.get_study_id_from_name)
    get_study_name_from_id = _retrying(BaseStorage.get_study_name_from_id)
    get_study_directions = _retrying(BaseStorage.get_study_directions)
    get_study_user_attrs = _retrying(BaseStorage.get_study_user_attrs)
    get_study_system_attrs = _retrying(BaseStorage.get_study_system_attrs)
    get_all_studies = _retrying(BaseStorage.get_all_studies)
    set_trial_param = _retrying(BaseStorage.set_trial_param)
    set_trial_intermediate_value = _retrying(BaseStorage.set_trial_intermediate_value)
    set_trial_user_attr = _retrying(BaseStorage.set_trial_user_attr)
    set_trial_system_attr = _retrying(BaseStorage.set_trial_system_attr)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """See ``RDBStorage.create_new_trial``; tickets are made by ``fill``, which can be repeated."""
        return self.tickets.create_new_trial(study_id, template_trial)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """See ``RDBStorage.set_trial_state_values``; the end of a trial that this process claimed may be repeated."""
        owner = self._owners.get(trial_id)
        try:
            return bool(retried(self.tickets.set_trial_state_values)(trial_id, state, values, owner=owner))
        except KeyError as error:
            raise StudyGoneError(GONE) from error

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """See ``RDBStorage.create_new_study``; repeated, it finds its own study: ``DuplicatedStudyError``."""
        study_id = int(retried(self.tickets.create_new_study)(directions, study_name))
        with self._lock:
            self._forget(study_id)  # a study that is deleted by now may have had the same id
        return study_id

    def delete_study(self, study_id: int) -> None:
        """See ``RDBStorage.delete_study``; the study's folder is removed with it."""
        identity = self.get_study_user_attrs(study_id).get(names.IDENTITY)
        retried(self.tickets.delete_study)(study_id)
        with self._lock:
            self._forget(study_id)
        if identity is not None:
            folders.remove_folder(self, identity)

    def rename(self, study_id: int, name: str) -> None:
        """See ``TicketStorage.rename``; the study's folder is found by its identity."""
        retried(self.tickets.rename)(study_id, name)

    def content(self, study_id: int) -> StudyContent:
        """See ``TicketStorage.content``."""
        try:
            content: StudyContent = retried(self.tickets.content)(study_id)
        except KeyError as error:
            raise StudyGoneError(GONE) from error
        return content

    def receive(self, content: StudyContent, identity: str, place: Callable[[int], None]) -> int:
        """See ``TicketStorage.receive``."""
        study_id = int(retried(self.tickets.receive)(content, identity, place))
        with self._lock:
            self._forget(study_id)
        return study_id

    def _forget(self, study_id: int) -> _Known:
        for seen in self._studies.pop(study_id, _Known()).seen.values():
            self._finished.pop(seen.trial_id, None)
        return self._studies.setdefault(study_id, _Known())

    def identity(self, study_id: int, replaces: str | None = None) -> str:
        """See ``TicketStorage.identity``; from now on another study under the same id is a ``StudyGoneError``."""
        identity = str(retried(self.tickets.identity)(study_id, replaces))
        with self._lock:
            known = self._studies.setdefault(study_id, _Known())
            if known.identity not in (None, identity):
                known = self._forget(study_id)
            known.identity, known.in_use = identity, True
        return identity

    @functools.cached_property
    def database(self) -> tuple[str, int]:
        """See ``TicketStorage.database``."""
        name, number = retried(self.tickets.database)()
        return str(name), int(number)

    def record_heartbeat(self, trial_id: int) -> None:
        """See ``RDBStorage.record_heartbeat``."""
        retried(self.tickets.record_heartbeat)(trial_id)

    def get_heartbeat_interval(self) -> int | None:
        """Seconds between heartbeats of a running trial; None where there are none."""
        return self.tickets.get_heartbeat_interval()

    # -- trials that were read before ----------------------------------------------------------------------------------

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """See ``RDBStorage.get_trial_id_from_study_id_trial_number``."""
        known = self._studies.get(study_id)
        if known is not None and trial_number in known.seen:
            return known.seen[trial_number].trial_id
        try:
            return int(retried(self.tickets.get_trial_id_from_study_id_trial_number)(study_id, trial_number))
        except KeyError as error:
            raise StudyGoneError(GONE) from error

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See ``RDBStorage.get_trial``."""
        kept = self._finished.get(trial_id)
        if kept is not None:
            return kept
        try:
            trial: FrozenTrial = retried(self.tickets.get_trial)(trial_id)
        except KeyError as error:
            raise StudyGoneError(GONE) from error
        return trial

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """See ``RDBStorage.get_all_trials``; the trials of a study by number."""
        with self._lock:
            try:
                retried(self._refresh)(study_id)
            except KeyError as error:
                raise StudyGoneError(GONE) from error
            known = self._studies[study_id]
            trials = [
                known.trials[number]
                for number in sorted(known.trials)
                if states is None or known.trials[number].state in states
            ]
        return copy.deepcopy(trials) if deepcopy else trials

    def outline(self, study_id: int) -> list[FrozenTrial]:
        """Return the trials of a study by number, as its status needs them.

        Those that run or failed are whole; of the others there are state, values and the attributes that are counted.
        """
        known = self._studies.get(study_id)
        if known is not None and known.trials:  # no more than the news has to be read
            return self.get_all_trials(study_id, deepcopy=False)

        def read() -> list[FrozenTrial]:
            invalid = self.tickets.view(study_id, sys.maxsize).invalid
            states = (TrialState.RUNNING, TrialState.FAIL)
            whole = {each.number: each for each in self.tickets.get_all_trials(study_id, deepcopy=False, states=states)}
            found = []
            for trial in self.tickets.outline(study_id, names.COUNTED):
                same = whole.get(trial.number)  # unless it has ended since
                trial = same if same is not None and same.state == trial.state else trial
                found.append(set_aside(trial, invalid.get(str(trial.number))))
            return found

        trials: list[FrozenTrial] = retried(read)()
        return trials

    def _refresh(self, study_id: int) -> None:
        """Read again what may have changed: what runs or ran until now, and what is new."""
        known = self._studies.setdefault(study_id, _Known())
        view = self.tickets.view(study_id, known.newest)
        if known.identity not in (None, view.identity):  # deleted, and made anew under the same id
            if known.in_use:
                raise StudyGoneError(GONE)
            known = self._forget(study_id)
            view = self.tickets.view(study_id, known.newest)
        known.identity, now = view.identity, view.trials
        untouched = {
            number
            for number, seen in now.items()
            if seen.state is TrialState.WAITING and (not seen.begun or seen.paused is not None)
        }
        stale = {number for number in now if number not in untouched or known.seen.get(number) != now[number]}
        stale |= {  # ended since the last look
            number for number, seen in known.seen.items() if not seen.state.is_finished() and number not in now
        }
        before, known.invalid = known.invalid, view.invalid
        changed = {int(key) for key in {*before, *view.invalid} if before.get(key) != view.invalid.get(key)}
        stale |= changed & known.trials.keys()
        if not stale:
            return
        fresh: dict[int, FrozenTrial] = {}
        if sum(now[number].state is TrialState.RUNNING for number in stale & now.keys()) > 1:
            running = self.tickets.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
            fresh = {trial.number: trial for trial in running}
        if len(stale - fresh.keys()) > max(_ONE_BY_ONE, len(known.trials) // 4):  # the first look at a study
            fresh = {trial.number: trial for trial in self.tickets.get_all_trials(study_id, deepcopy=False)}
        ids = {number: seen.trial_id for number, seen in (*known.seen.items(), *now.items())}
        for number in stale - fresh.keys():
            fresh[number] = self.tickets.get_trial(ids[number])
        for number, trial in fresh.items():
            if number not in ids:
                continue  # made after the first look
            shown = set_aside(trial, known.invalid.get(str(number)))
            known.trials[number] = shown
            paused = trial.user_attrs.get(names.PAUSED)
            known.seen[number] = Seen(ids[number], trial.state, trial.datetime_start is not None, paused)
            known.newest = max(known.newest, ids[number])
            if trial.state.is_finished():
                self._finished[ids[number]] = shown

    # -- tickets -------------------------------------------------------------------------------------------------------

    def fill(self, study_id: int, tickets: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> int:
        """See ``TicketStorage.fill``."""
        return int(retried(self.tickets.fill)(study_id, tickets))

    def enqueue(self, study_id: int, tickets: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> None:
        """See ``TicketStorage.enqueue``."""
        retried(self.tickets.enqueue)(study_id, tickets)
        with self._lock:  # a ticket that was read before is not taken for untouched
            known = self._studies.get(study_id, _Known())
            known.seen = {number: replace(seen, begun=True) for number, seen in known.seen.items()}

    def change_attribute(self, study_id: int, key: str, change: Callable[[Any], Any]) -> None:
        """See ``TicketStorage.change_attribute``; ``change`` may be called again on what it made."""
        retried(self.tickets.change_attribute)(study_id, key, change)

    def claim(self, study_id: int, owner: str, promote: Promote | None = None) -> int | None:
        """See ``TicketStorage.claim``; the number of the trial."""
        known = self._studies.get(study_id)
        identity = known.identity if known is not None and known.in_use else None
        claim: Claim | None = retried(self.tickets.claim)(study_id, owner, identity, promote)
        if claim is None:
            return None
        self._owners = {claim.trial_id: owner}  # a worker has one trial at a time
        return claim.number

    def release(self, study_id: int, number: int, owner: str | None, marks: Mapping[str, Any]) -> bool:
        """See ``TicketStorage.release``."""
        return bool(retried(self.tickets.release)(study_id, number, owner, marks))

    def retire(
        self,
        study_id: int,
        number: int,
        owner: str | None,
        marks: Mapping[str, Any],
        successor: Callable[[FrozenTrial], FrozenTrial | None],
    ) -> bool:
        """See ``TicketStorage.retire``."""
        return bool(retried(self.tickets.retire)(study_id, number, owner, marks, successor))

    def heartbeats(self, study_id: int) -> dict[int, datetime]:
        """See ``TicketStorage.heartbeats``."""
        beats: dict[int, datetime] = retried(self.tickets.heartbeats)(study_id)
        return beats

    def reserve(self, study_id: int, number: int, choose: Callable[[Collection[str]], str]) -> str:
        """See ``TicketStorage.reserve``."""
        return str(retried(self.tickets.reserve)(study_id, number, choose))

    def withdraw(self, study_id: int, numbers: Sequence[int]) -> None:
        """See ``TicketStorage.withdraw``."""
        retried(self.tickets.withdraw)(study_id, numbers)

    def mark(self, study_id: int, number: int, marks: Mapping[str, Any]) -> None:
        """See ``TicketStorage.mark``."""
        retried(self.tickets.mark)(study_id, number, marks)


def ticket(params: Mapping[str, Any] | None = None, marks: Mapping[str, Any] | None = None) -> FrozenTrial:
    """Return a WAITING template: empty for the sampler to fill, or with parameters that are fixed beforehand."""
    system = {"fixed_params": dict(params)} if params else None
    return create_trial(state=TrialState.WAITING, user_attrs=dict(marks or {}), system_attrs=system)


def set_aside(trial: FrozenTrial, entry: Mapping[str, str] | None) -> FrozenTrial:
    """Return a trial as it is shown: as failed, with the reason, where its study's ``INVALID`` has an entry."""
    if entry is None:
        return trial
    shown = copy.copy(trial)
    was = {"state": trial.state.name.lower(), "values": trial.values, "time": entry["time"]}
    marks = {names.CAUSE: names.Cause.INVALIDATED.value, names.ERROR: entry["reason"], names.SET_ASIDE: was}
    marks_without_rungs = {**trial.user_attrs, **marks, names.RUNGS: None}  # promotion compares by them
    shown.state, shown.values, shown.user_attrs = TrialState.FAIL, None, marks_without_rungs
    return shown
