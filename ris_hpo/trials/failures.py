"""Whose fault an exception is: the machine's, the memory's, or a bug."""

from __future__ import annotations

import errno

from ris_hpo.errors import DeviceError, OutputError
from ris_hpo.store.credentials import redact

_HOST_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE}
)


def is_host_fault(error: BaseException) -> bool:
    """Return whether this machine, not the trial, is at fault: a full or read-only disk, a device that is gone."""
    return isinstance(error, DeviceError | OutputError) or (isinstance(error, OSError) and error.errno in _HOST_ERRORS)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether device or host memory ran out; torch need not be imported for the answer."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def one_line(error: BaseException) -> str:
    """Return type and message of an exception as one line of at most 500 characters, without passwords."""
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
