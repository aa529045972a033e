"""Notices of a run: a command or a web address hears of failed trials, each new best one, a full disk, and the end.

A command gets the notice as JSON on its standard input, a web address as the body of a POST request. Notices leave on
a thread of their own and are tried three times: none ever holds up a trial or changes how a run ends.

With ``$RIS_HPO_NOTIFY_SECRET`` a request has the header ``X-Ris-Hpo-Signature: sha256=HEX``, the HMAC of its body.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import os
import queue
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit

import optuna

from ris_hpo.errors import ConfigError, RisHpoError
from ris_hpo.search.lifecycle import direction_of
from ris_hpo.search.status import study_status
from ris_hpo.store.credentials import redact
from ris_hpo.text import finite
from ris_hpo.workers.supervisor import PoolSnapshot, Supervisor

SECRET_VARIABLE: Final = "RIS_HPO_NOTIFY_SECRET"
TRIES: Final = 3
_PAUSE_S = 2.0  # before the second try; twice as long before the third
_LIMIT_S = 10.0  # for one try
_PATIENCE_S = 30.0  # for all that is still under way when the run has ended

log = logging.getLogger(__name__)


def notified(
    snapshots: Iterator[PoolSnapshot], supervisor: Supervisor, study: optuna.Study, targets: Sequence[str]
) -> Iterator[PoolSnapshot]:
    """Pass a run's snapshots on, and send notices of what they say.

    Each is ``{"event", "study", "time", "trials", "best", ...}``: ``trial_failed`` (for good) with ``trial`` (number,
    cause, error, host), ``new_best``, ``run_paused`` with ``reason`` (the disk has no room), ``run_ended`` with
    ``ending`` (finished, interrupted, or the rule that applied), ``run_failed`` with ``error``.

    Args:
        snapshots: of the run.
        supervisor: of the run, which knows how it ended.
        study: the study.
        targets: commands, and web addresses (``http://``, ``https://``).

    Yields:
        The snapshots.
    """
    if not targets:
        yield from snapshots
        return
    with Notifier(targets) as notifier:
        heard: set[int] | None = None
        best, paused, begun = None, None, False
        try:
            for snapshot in snapshots:
                leader = None if snapshot.best is None else snapshot.best.number
                if begun and leader is not None and leader != best:
                    notifier.send(_notice("new_best", study))
                if snapshot.paused is not None and paused is None:
                    notifier.send(_notice("run_paused", study, reason=snapshot.paused))
                best, paused, begun = leader, snapshot.paused, True
                failed = {} if snapshot.tally.fail == 0 else _failed(study)
                for number in sorted(set(failed) - (set(failed) if heard is None else heard)):
                    notifier.send(_notice("trial_failed", study, trial=failed[number]))
                heard = set(failed) | (heard or set())
                yield snapshot
        except RisHpoError as error:
            notifier.send(_notice("run_failed", study, error=redact(str(error))))
            raise
        notifier.send(_notice("run_ended", study, ending=supervisor.ending))


def _status(study: optuna.Study) -> dict[str, Any]:
    metric = (study.metric_names or ["k_loc"])[0]
    return study_status(study.study_name, study.get_trials(deepcopy=False), metric, direction_of(study)).as_dict()


def _failed(study: optuna.Study) -> dict[int, dict[str, Any]]:
    """The trials that failed for good, by number."""
    keys = ("number", "cause", "error", "host", "device", "last_step")
    rows = [row for row in _status(study)["failed"] if not row["retried"]]
    return {row["number"]: {key: row[key] for key in keys} for row in rows}


def _notice(event: str, study: optuna.Study, **more: Any) -> dict[str, Any]:
    found = _status(study)
    head = {
        "event": event,
        "study": study.study_name,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    return {**head, "trials": found["trials"], "best": found["best"], **more}


class Notifier:
    """Sends notices on a thread of its own; leaving its block waits for those under way, for half a minute at most.

    Args:
        targets: commands, and web addresses.

    Raises:
        ConfigError: a web address without a host.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = {target: _shown(target) for target in targets}
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="notices", daemon=True)

    def __enter__(self) -> Notifier:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._waiting.put(None)
        self._thread.join(timeout=_PATIENCE_S)

    def send(self, notice: Mapping[str, Any]) -> None:
        """Queue a notice for every target."""
        self._waiting.put(json.dumps(finite(notice), default=str).encode())

    def _work(self) -> None:
        while (body := self._waiting.get()) is not None:
            for target, shown in self._targets.items():
                self._deliver(target, shown, body)

    def _deliver(self, target: str, shown: str, body: bytes) -> None:
        for attempt in range(TRIES):
            if attempt:
                time.sleep(_PAUSE_S * attempt)
            try:
                _post(target, body) if _is_address(target) else _call(target, body)
                return
            except (OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError) as error:
                problem = redact(" ".join(str(error).split()))
        log.warning("a notice to %s was not delivered in %d tries: %s", shown, TRIES, problem)


def _is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def _shown(target: str) -> str:
    """A target in messages: of an address only the host, since its path may hold a token."""
    if not _is_address(target):
        return f"'{redact(target)}'"
    try:
        scheme, host = urlsplit(target).scheme, urlsplit(target).hostname
    except ValueError:
        host = None
    if not host:
        raise ConfigError("a web address for notices has no host: expected https://HOST/PATH")
    return f"{scheme}://{host}"


def _post(address: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "ris-hpo"}
    secret = os.environ.get(SECRET_VARIABLE)
    if secret:
        headers["X-Ris-Hpo-Signature"] = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=_LIMIT_S) as answer:
        answer.read()


def _call(command: str, body: bytes) -> None:
    """Run a user's own command line in a shell."""
    subprocess.run(command, shell=True, input=body, capture_output=True, timeout=_LIMIT_S, check=True)
