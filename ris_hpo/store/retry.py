"""Repeating calls of the store while its server does not answer, and saying so."""

from __future__ import annotations

import functools
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from optuna.exceptions import StorageInternalError
from sqlalchemy import exc as sql_errors

from ris_hpo.errors import StoreError
from ris_hpo.store.credentials import redact

RETRY_S: Final = 300.0  # how long a server may be away (restart, fail-over) before a worker gives up
LONGEST_PAUSE_S: Final = 5.0  # between two attempts to reach a server
QUIET_S: Final = 3.0  # how long a wait may take before it is logged

log = logging.getLogger(__name__)

_BY_STATEMENT = "statement pooling mode"
_CROWDED = ("too many clients", "too many connections", "remaining connection slots", "no more connections allowed")


def retried(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, repeated while the server does not answer.

    It must be safe to repeat when it was done and the acknowledgement was lost.

    Raises:
        StoreError: the store refused, or has not answered for ``RETRY_S``.
    """

    @functools.wraps(call)
    def repeated(*args: Any, **kwargs: Any) -> Any:
        wait = Wait("the store", RETRY_S)
        while True:
            try:
                return call(*args, **kwargs)
            except (StorageInternalError, sql_errors.SQLAlchemyError) as error:
                if not is_connection_loss(error):
                    raise StoreError(f"the store refused: {reason(error)}") from error
                if not wait.again(reason(error)):
                    raise StoreError(
                        f"the store has not answered for {RETRY_S:.0f} s ({reason(error)}); "
                        "finished trials are safe; run the same command again when it is back"
                    ) from error

    return repeated


class Wait:
    """Pauses of growing length between attempts; a wait of more than ``QUIET_S`` is logged, once.

    Args:
        what: what is waited for, as the log names it.
        limit_s: after which there is no further attempt.
    """

    def __init__(self, what: str, limit_s: float) -> None:
        self.what = what
        self._begun = time.monotonic()
        self._limit = limit_s
        self._pause = 0.05
        self._logged = False

    def again(self, found: str) -> bool:
        """Pause, and return whether to try again."""
        waited = time.monotonic() - self._begun
        if waited + self._pause > self._limit:
            return False
        if waited + self._pause > QUIET_S:
            self._log(f"{found}; trying again for {self._limit:.0f} s")
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        return True

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Log an attempt that gets no answer: a pooler lets clients wait when all its connections are in use."""
        timer = threading.Timer(2 * QUIET_S, self._log, ["all its connections may be in use; still waiting"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _log(self, why: str) -> None:
        if not self._logged:
            self._logged = True
            log.warning("%s does not answer: %s", self.what, why)


def is_connection_loss(error: BaseException) -> bool:
    """Return whether an error means that the server does not answer now, so that the same call may succeed later."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, sql_errors.DBAPIError) and cause.connection_invalidated:
        return True
    if isinstance(cause, sql_errors.PendingRollbackError):
        return True  # Optuna tries a second query in the transaction that the lost connection took with it
    if not isinstance(cause, sql_errors.OperationalError | sql_errors.InterfaceError):
        return False
    if _BY_STATEMENT in str(cause.orig):
        return False  # a pooler that allows no transactions; waiting does not change its settings
    # a file that is full, read-only or damaged does not come back by waiting; a server that is away may
    return not isinstance(cause.orig, sqlite3.Error) or "locked" in str(cause.orig)


def reason(error: BaseException) -> str:
    """Return what a database said, as one line without passwords, with what to do about too many connections."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    original = cause.orig if isinstance(cause, sql_errors.DBAPIError) and cause.orig is not None else cause
    text = redact(" ".join(str(original).split()))[:300] or type(original).__name__
    if any(words in text for words in _CROWDED):
        text += "; each worker takes one or two: raise the limit, use fewer workers, or put a pooler in between"
    if _BY_STATEMENT in text:
        text += "; set pool_mode = transaction (or session) in PgBouncer, since a claim is a transaction"
    return text
