"""Calls of the store that outlive a server that is away for a while."""

from __future__ import annotations

import functools
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Final

from optuna.exceptions import StorageInternalError
from sqlalchemy import exc as sql_errors

from ris_hpo.errors import StoreError
from ris_hpo.store.credentials import redact

PATIENCE_S: Final = 300.0  # how long a server may be away (restart, fail-over) before a worker gives up
LONGEST_PAUSE_S: Final = 5.0  # between two attempts to reach a server


def patiently(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, repeated while the server is away; it must be safe to repeat after a lost acknowledgement.

    Raises:
        StoreError: the store refused, or stayed away for ``PATIENCE_S``.
    """

    @functools.wraps(call)
    def repeated(*args: Any, **kwargs: Any) -> Any:
        pause, deadline = 0.05, time.monotonic() + PATIENCE_S
        while True:
            try:
                return call(*args, **kwargs)
            except (StorageInternalError, sql_errors.SQLAlchemyError) as error:
                if not is_connection_loss(error):
                    raise StoreError(f"the store refused: {reason(error)}") from error
                if time.monotonic() + pause > deadline:
                    raise StoreError(
                        f"the store has not answered for {PATIENCE_S:.0f} s ({reason(error)}); "
                        "nothing acknowledged is lost, run the same command again when it is back"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    return repeated


def is_connection_loss(error: BaseException) -> bool:
    """Say whether an error means that the server is away, so that the same call may succeed later."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, sql_errors.DBAPIError) and cause.connection_invalidated:
        return True
    if isinstance(cause, sql_errors.PendingRollbackError):
        return True  # Optuna tries a second query in the transaction that the lost connection took with it
    if not isinstance(cause, sql_errors.OperationalError | sql_errors.InterfaceError):
        return False
    # a file that is full, read-only or damaged does not come back by waiting; a server that is away may
    return not isinstance(cause.orig, sqlite3.Error) or "locked" in str(cause.orig)


def reason(error: BaseException) -> str:
    """Return what a database said, as one line without passwords."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    original = cause.orig if isinstance(cause, sql_errors.DBAPIError) and cause.orig is not None else cause
    return redact(" ".join(str(original).split()))[:300] or type(original).__name__
