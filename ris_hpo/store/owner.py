"""The owner of a trial: which process holds it, by which claim, and whether that process still exists."""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_PROC = Path("/proc")
_IS_LINUX = sys.platform.startswith("linux")


@dataclass(frozen=True)
class Process:
    """One process among those of all machines.

    Attributes:
        host: name of the machine or container, which several may share.
        boot: the kernel's boot id; empty where the system has none.
        namespace: inode of the PID namespace; empty where the system has none, or ``/proc`` shows another one.
        pid: process id within the namespace.
        start: when the process began, in the kernel's ticks since boot where it tells them. The time of day is no
            identity: it is computed back from now, and changes when somebody sets the clock.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    start: str

    @property
    def is_here(self) -> bool:
        """Whether the process is of this host, boot and PID namespace, so that it can be looked up."""
        here = this_process()
        return (self.host, self.boot, self.namespace) == (here.host, here.boot, here.namespace)

    @property
    def is_gone(self) -> bool:
        """Whether this process is known not to exist any more.

        Only a process of this host, boot and PID namespace can be looked up. Of any other the answer is False: whether
        it lives shows in its heartbeat alone, so that containers that share a host name do not declare each other dead.
        """
        if not self.is_here:
            return False
        if not _IS_LINUX:
            try:
                process = psutil.Process(self.pid)
                return bool(process.status() == psutil.STATUS_ZOMBIE) or f"{process.create_time():.2f}" != self.start
            except psutil.NoSuchProcess:
                return True
        if self.namespace == "":
            return False
        try:
            state, start = _state_and_start(str(self.pid))
        except OSError:
            return not _exists(self.pid)
        return state == "Z" or start != self.start


@dataclass(frozen=True)
class Owner:
    """One claim of a trial by a process; ``claim`` numbers the claims of the process, so that no two owners are equal.

    Its text, ``HOST:BOOT:NAMESPACE:PID:START:CLAIM``, stands on the trial as ``attributes.OWNER``.
    """

    process: Process
    claim: int

    def __str__(self) -> str:
        """Return the text that ``parse`` reads."""
        process = self.process
        return f"{process.host}:{process.boot}:{process.namespace}:{process.pid}:{process.start}:{self.claim}"

    @classmethod
    def parse(cls, text: str | None) -> Owner | None:
        """Return the owner that a trial names; None where it names none, or in a form that is not known."""
        found = _TEXT.fullmatch(text or "")
        if found is None:
            return None
        host, boot, namespace, pid, start, claim = found.groups()
        return cls(Process(host, boot, namespace, int(pid), start), int(claim))


_TEXT = re.compile(r"([^:]*):([^:]*):([^:]*):(\d+):([\d.]+):(\d+)")


def this_user() -> str:
    """Return who runs this process, as ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user needs no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def this_process() -> Process:
    """Return the identity of the calling process."""
    return _identity(os.getpid())


@cache
def _identity(pid: int) -> Process:
    host = socket.gethostname()
    if not _IS_LINUX:
        return Process(host, "", "", pid, f"{psutil.Process(pid).create_time():.2f}")
    _, start = _state_and_start("self")
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    try:
        shows_us = os.readlink(_PROC / "self") == str(pid)  # /proc may have been mounted in an outer namespace
        namespace = str((_PROC / "self/ns/pid").stat().st_ino) if shows_us else ""
    except OSError:
        namespace = ""
    return Process(host, boot, namespace, pid, start)


def _state_and_start(pid: str) -> tuple[str, str]:
    """Return fields 3 and 22 of a process's ``stat``; its second field is a name that may hold anything."""
    fields = (_PROC / pid / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], fields[19]


def _exists(pid: int) -> bool:
    """Ask the kernel itself: ``/proc`` may hide the processes of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
