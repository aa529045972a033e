"""What a worker reports to its supervisor: dataclasses on both sides, a line of JSON between them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from ris_hpo.store.attributes import Cause
from ris_hpo.trials.context import Report, Scoring, Started
from ris_hpo.trials.run import Outcome


class Reason(StrEnum):
    """Why a worker ended."""

    DONE = "done"
    """The study has no open trial left."""
    STOPPED = "stopped"
    """It was asked to stop."""
    LIMIT = "max_trials"
    """It has ended as many trials as it was to."""
    OUT_OF_MEMORY = "out_of_memory"
    """A trial ran out of memory; a fresh process goes on."""
    BUG = "bug"
    """A trial failed with a bug; a fresh process goes on, since this one may be left in any state."""
    UNFIT = "unfit"
    """This machine cannot run trials now: disk full, device gone."""
    STORE = "store"
    """The store cannot be opened, or stays away."""
    REFUSED = "refused"
    """The study cannot be worked on: it is gone, or this version of the code would run other trials."""
    CRASHED = "crashed"
    """The process died, or its node did."""


@dataclass(frozen=True)
class Ready:
    """The worker is about to claim its first trial.

    Attributes:
        owner: text of an ``Owner`` of this process; its claim number means nothing.
    """

    owner: str


@dataclass(frozen=True)
class Note:
    """One line that a person should read: the worker waits, and for what."""

    text: str


@dataclass(frozen=True)
class Left:
    """The worker has ended, or is about to; the last event of each worker.

    Attributes:
        reason: why.
        error: one line on what went wrong; empty where nothing did.
    """

    reason: Reason
    error: str = ""


Event = Ready | Started | Report | Scoring | Outcome | Note | Left

_KINDS: Final[dict[str, Any]] = {kind.__name__: kind for kind in (Ready, Started, Report, Scoring, Outcome, Note, Left)}


def encode(event: Event) -> str:
    """Return an event as one line of JSON."""
    return json.dumps({"event": type(event).__name__, **asdict(event)})


def decode(line: str | bytes) -> Event:
    """Return the event that ``encode`` wrote."""
    fields = json.loads(line)
    kind = _KINDS[fields.pop("event")]
    if kind is Left:
        fields["reason"] = Reason(fields["reason"])
    elif kind is Outcome and fields["cause"] is not None:
        fields["cause"] = Cause(fields["cause"])
    event: Event = kind(**fields)
    return event
