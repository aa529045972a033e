"""Waiting for what another process or thread does: by condition, never by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, limit_s: float = 120) -> T:
    """What ``condition`` returns once it is true; the limit is one that only a hang exceeds."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} after {limit_s:.0f} s"
        time.sleep(0.02)
    return found
