"""Who holds a trial: one name per claim, and whether its process still exists."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import psutil


def owner_name(sequence: int) -> str:
    """Return a name no other claim has: host, process, when that process began, and a running number."""
    return f"{socket.gethostname()}:{os.getpid()}:{_birth(psutil.Process())}:{sequence}"


def is_dead_here(owner: str) -> bool:
    """Say whether ``owner`` is a process of this host that does not exist any more."""
    host, pid, birth, _ = owner.rsplit(":", 3)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(pid))
        return bool(process.status() == psutil.STATUS_ZOMBIE) or _birth(process) != birth
    except psutil.NoSuchProcess:
        return True


def _birth(process: psutil.Process) -> str:
    """When a process began, in the kernel's own ticks where it tells them.

    The time of day it began at is no name: it is counted back from now, and changes when somebody sets the clock.
    """
    if not sys.platform.startswith("linux"):
        return f"{process.create_time():.2f}"
    try:
        status = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(process.pid) from None
    return status.rpartition(")")[2].split()[19]  # field 22; the second one is a name that may hold anything
