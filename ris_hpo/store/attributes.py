"""Names of the attributes of trials and studies: what is stored beside a trial's parameters and curve.

Trial attributes stay small, since the dashboard loads all of them on each request; curves are intermediate values,
figures are artifacts. Study attributes hold what a worker on another host needs to join: the specification itself.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

# -- what a trial scored ---------------------------------------------------------------------------------------------
COMPONENTS: Final = "components"
"""Network-path ``Scores.as_dict()`` of the best validation; ``k_loc`` inside it is the objective's value."""
PIPELINE: Final = "pipeline"
"""Pipeline-path ``Scores.as_dict()`` of the best weights on the same frozen scenes (completed trials)."""
PIPELINE_FLOOR: Final = "pipeline_floor"
"""``k_loc`` of the floor on the scenes of the pipeline's score, which may be fewer."""
GATE: Final = "gate"
"""One line on the curriculum's gate that was not passed; the trial's score is what it reached until then."""
FLOOR: Final = "floor"
"""``k_loc`` of the floor on the frozen scenes: what right counts and CRB-sized errors would score."""
EFFICIENCY: Final = "efficiency"
"""Share of the way from the worst score (7) to the floor that the value covers; 1 is at the floor, above 1 beyond."""
DIVERGED: Final = "diverged"
"""One line on why training could not go on; such a trial is COMPLETE at the worst score, so that the sampler learns."""

METRICS: Final = "metrics"
"""The further values of the program's last report, by name."""

# -- what a trial was ------------------------------------------------------------------------------------------------
CONFIG_FINGERPRINT: Final = "config_fingerprint"
"""Fingerprint of the run configuration; written when all parameters are drawn."""
SEED: Final = "seed"
"""Seed of the trial's run configuration, derived from the study's seed and the lineage root."""
SCENES: Final = "scenes"
"""Scenes seen in training when the trial ended."""
SECONDS: Final = "seconds"
"""Seconds that workers spent on the trial, those before it was put back included; see ``counting.device_seconds``."""
SCENES_PER_SECOND: Final = "scenes_per_second"
PARAMETERS: Final = "parameters"
"""Trainable parameters of the network."""
PEAK_MEMORY: Final = "peak_memory_bytes"
"""Peak device memory on a GPU, peak resident set of the worker on a CPU."""
HOST: Final = "host"
DEVICE: Final = "device"
THREADS: Final = "threads"
"""Torch threads of the worker; a curve repeats bit for bit only under the same number."""

CODE: Final = "code"
"""Version of this package that ran the trial; one study may have trials of several."""

# -- rungs of a study with promotion ---------------------------------------------------------------------------------
RUNGS: Final = "rungs"
"""Scores at the rungs that the line has reached, the first one first; see ``search.rungs``."""
PAUSED: Final = "paused"
"""Index of the rung at which a waiting trial is paused; None where it runs, or waits to be taken up."""
PROMOTED_AT: Final = "promoted_at"
"""When the line was promoted from each rung, the first one first: seconds since 1970 by the clock of the worker."""

# -- the owner of a trial, and failures ------------------------------------------------------------------------------
OWNER: Final = "owner"
"""Text of the ``Owner`` that claimed the trial, written in the transaction that claims it."""
CAUSE: Final = "cause"
"""A ``Cause``; of a FAIL trial only."""
ERROR: Final = "error"
"""One line: exception and message, or how the worker was lost."""
TRACEBACK: Final = "traceback"
"""Last lines of the traceback of a ``Cause.BUG``."""
LAST_STEP: Final = "last_step"
"""Scenes seen at the last report before a failure."""
PREEMPTIONS: Final = "preemptions"
"""How often the trial was checkpointed, put back and taken up again."""
RELEASED_BY: Final = "released_by"
"""Owner that put the trial back last, so that it can repeat the call when the acknowledgement was lost."""
FIGURES_MISSING: Final = "figures_missing"
"""Figures that could not be drawn or written, as ``{file name: error}``."""

# -- lineage of a retried trial --------------------------------------------------------------------------------------
LINEAGE: Final = "lineage"
"""Number of the first trial of the line; seeds are derived from it. Absent on a trial that is the first."""
PREDECESSOR: Final = "predecessor"
"""Number of the failed trial that this one continues."""
ATTEMPT: Final = "attempt"
"""1 for the first successor, and so on."""
ORIGIN: Final = "origin"
"""``base`` for the base configuration, ``warm-start STUDY#NUMBER`` for one taken from another study,
``enqueued TIME#N`` for one that somebody asked for."""

SET_ASIDE: Final = "set_aside"
"""What an invalidated trial was: ``{"state": ..., "values": ..., "time": ...}``; shown by ``Store``, stored nowhere."""
POINT: Final = "point"
"""Text of the parameters that were chosen for the trial, written in the transaction that keeps them from others."""
RETRIES: Final = "retries"
"""Failures of this line of trials by cause; the count of losses starts over after progress."""
INHERITED_STEP: Final = "inherited_step"
"""Scenes seen at the last report of the line when this successor was queued."""

# -- study attributes ------------------------------------------------------------------------------------------------
IDENTITY: Final = "identity"
"""Random text that no other study of any store has; the study's folder is found by it."""
SPEC: Final = "spec"
"""``StudySpec.stored()``, its base stated whole: all that a worker needs besides the store's address."""
SPACE_FINGERPRINT: Final = "space_fingerprint"
SCORE_VERSION: Final = "score_version"
PROOF: Final = "proof"
"""Fingerprint of the study's phase-0 certificate, or ``no-proof``."""
COMMAND: Final = "command"
"""The command line that made the study, with credentials redacted."""
STARTED_BY: Final = "started_by"
"""Who made the study, as ``user@host``: whom others ask before they change or delete it."""
VERSIONS: Final = "versions"
FORKED_FROM: Final = "forked_from"
NAMED: Final = "named"
"""Dotted keys of the base that options named when the study was made, other than the file has them."""
WARM_START: Final = "warm_start"
REFERENCE: Final = "reference"
"""Scores of the floor and of the ``ml`` estimator on the study's frozen scenes: what a network has to beat."""
CHANGES: Final = "changes"
"""What was changed after the study was made: ``[{"time": ..., "key": ..., "old": ..., "new": ...}, ...]``."""
WINNER: Final = "winner"
"""Re-evaluation of the best configurations on fresh seeds and scenes, with its verdict."""
INVALID: Final = "invalid"
"""Trials whose scores do not count, by number: ``{"3": {"reason": ..., "time": ...}}``; see ``Cause.INVALIDATED``."""


class Cause(StrEnum):
    """Why a trial is FAIL."""

    LOST_WORKER = "lost_worker"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    BUG = "bug"
    DIVERGED = "diverged"
    """Training that cannot go on, in a study without a worst score; another try would end the same way."""
    WITHDRAWN = "withdrawn"
    """Taken out of the queue by a smaller ``--n-trials``; it never ran and is counted nowhere."""
    INVALIDATED = "invalidated"
    """Ended well, and declared invalid since. The database keeps its state and score; ``Store`` shows it as failed, so
    that no sampler, pruner, ranking, report or outside reader of that storage takes its score into account."""


RETRIED_CAUSES: Final = frozenset({Cause.LOST_WORKER, Cause.TIMEOUT, Cause.OUT_OF_MEMORY})
"""Failures that are not the trial's fault: a successor continues it. A bug would only happen again."""

COUNTED: Final = frozenset({CAUSE, PREDECESSOR, PAUSED, DIVERGED, SECONDS, HOST, OWNER})
"""Attributes that say how a trial is counted, ranked and accounted for, and where it ran."""

OF_THE_SERVICE: Final = frozenset(
    {CONFIG_FINGERPRINT, SEED, SCENES, SECONDS, SCENES_PER_SECOND, PEAK_MEMORY, HOST, DEVICE, THREADS, CODE}
    | {METRICS, DIVERGED, OWNER, CAUSE, ERROR, TRACEBACK, LAST_STEP, PREEMPTIONS, RELEASED_BY, FIGURES_MISSING}
    | {LINEAGE, PREDECESSOR, ATTEMPT, ORIGIN, RETRIES, INHERITED_STEP, SET_ASIDE, RUNGS, PAUSED, PROMOTED_AT, POINT}
)
"""Attributes of a trial that a training program cannot write."""
