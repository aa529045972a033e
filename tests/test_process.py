"""What a process does with its memory."""

from __future__ import annotations

import ctypes
import platform
from types import SimpleNamespace

import pytest

from ris_hpo.process import keep_freed_memory


def test_glibc_is_told_to_keep_what_is_freed_and_other_libraries_are_let_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3) of its malloc.h; the real library takes both."""
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    told: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        told[option] = value
        return 1

    glibc = SimpleNamespace(gnu_get_libc_version=str, mallopt=mallopt)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    assert keep_freed_memory()
    assert told == {-1: 1 << 30, -3: 1 << 30}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()
