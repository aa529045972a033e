"""Counter-based random numbers: a scene is a function of (seed, index), on any device and in any batch.

Word c of the stream with key k is mix(k + (c + 1) g) with SplitMix64's finaliser ``mix`` and golden-ratio increment g
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). Keys are themselves mixed from
(seed, scene index, name of the draw), so that a further draw never shifts the others.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_UNIT = 2.0**-24


class SceneRandom:
    """One independent stream per scene and draw name.

    Args:
        seed: any integer; the stream's family.
        index: [B] int64 scene indices.
    """

    def __init__(self, seed: int, index: Tensor) -> None:
        root = torch.tensor(_signed(seed), dtype=torch.int64, device=index.device)
        self._keys = _mix(_mix(root + _GOLDEN) + index * _GOLDEN)

    def words(self, name: str, count: int) -> Tensor:
        """[B, count] uniformly distributed 64-bit words, as int64."""
        keys = _mix(self._keys ^ _signed(zlib.crc32(name.encode()) * 0x9E3779B1 + 1))
        counters = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _GOLDEN
        return _mix(keys.unsqueeze(-1) + counters)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] float32 in [0, 1)."""
        words = self.words(name, math.prod(shape))
        result: Tensor = (
            (_high24(words).to(torch.float32) * _UNIT).unflatten(-1, shape or (1,)).squeeze(-1 if not shape else ())
        )
        return result

    def between(self, name: str, bounds: tuple[float, float], *shape: int) -> Tensor:
        """[B, *shape] float32 uniform on the bounds."""
        return bounds[0] + (bounds[1] - bounds[0]) * self.uniform(name, *shape)

    def integers(self, name: str, count: int, *shape: int) -> Tensor:
        """[B, *shape] int64 uniform on 0..count-1."""
        return (self.uniform(name, *shape) * count).to(torch.int64).clamp_(max=count - 1)

    def complex_normal(self, name: str, *shape: int) -> Tensor:
        """[B, *shape] complex64, CN(0, 1): sqrt(-ln u) exp(j phi), one 64-bit word each; ``name`` says which stream."""
        words = self.words(name, math.prod(shape))
        magnitude = ((_high24(words) + 1).to(torch.float32) * _UNIT).log_().neg_().sqrt_()
        phase = (words & 0xFFFFFF).to(torch.float32).mul_(2 * math.pi * _UNIT)
        # cos and sin are vectorised on a CPU, torch.polar is not: three times as fast
        values = torch.complex(phase.cos().mul_(magnitude), phase.sin().mul_(magnitude))
        result: Tensor = values.unflatten(-1, shape)
        return result


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _high24(words: Tensor) -> Tensor:
    return _shift(words, 40)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)
