"""The score without torch: its version, its worst value, and the efficiency of a value against its floor."""

from __future__ import annotations

import math
from typing import Final

SCORE_VERSION: Final = 1
"""Changes with the meaning of ``k_loc``; scores of two versions are not compared."""

WORST_K_LOC: Final = 7.0
"""No source found where there are some: K_acc 0, every error at its cap, no success."""


def efficiency(value: float, floor: float) -> float:
    """Return (7 - value) / (7 - floor): 0 at the worst score, 1 at the floor."""
    return (WORST_K_LOC - value) / (WORST_K_LOC - floor)


def finite_score(value: float) -> float:
    """Return the value as it is reported: NaN and infinity count as the worst score."""
    return value if math.isfinite(value) else WORST_K_LOC
