"""What a process does with its memory."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from ris_hpo.process import keep_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_memory_that_is_freed_is_kept_and_used_again() -> None:
    """Tensors of 48 MiB, above what glibc keeps by itself: 12,288 pages each, handed out by the kernel once."""
    assert keep_freed_memory()
    torch.ones(12 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(12 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2 * 12_288
