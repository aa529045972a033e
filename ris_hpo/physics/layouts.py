"""What the arrays of scene and estimate files have to look like, and the checks of an open file against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from ris_hpo.config import suggestion
from ris_hpo.errors import SceneFileError
from ris_hpo.physics.containers import Array, Arrays, LazyArray

TRUTH: Final = ("num_sources", "azimuth", "elevation", "range_m")
_TYPES: Final = {"complex": np.complex64, "real": np.float32, "integer": np.int64}


@dataclass(frozen=True)
class Layout:
    """What an array has to look like.

    Attributes:
        axes: its axes by letter or size, for example ``B L M``.
        kind: what its numbers are.
        shared: whether it may lack the axis B, and then serves every scene.
    """

    axes: str
    kind: Literal["complex", "real", "integer"]
    shared: bool = False

    @property
    def legend(self) -> list[str]:
        """The axes one by one."""
        return self.axes.split()


LAYOUTS: Final = {
    "y": Layout("B L M", "complex"),
    "bs_ris_channel": Layout("B M N", "complex", shared=True),
    "ris_codes": Layout("B L N", "complex", shared=True),
    "noise_power": Layout("B", "real", shared=True),
    "num_sources": Layout("B", "integer"),
    "azimuth": Layout("B K", "real"),
    "elevation": Layout("B K", "real"),
    "range_m": Layout("B K", "real"),
    "power": Layout("B K", "real"),
    "given": Layout("B 3", "integer"),
    "snr_db": Layout("B", "real"),
    "symbols": Layout("B L K", "complex"),
    "true_channel": Layout("B M N", "complex", shared=True),
    "true_noise_power": Layout("B", "real", shared=True),
    "existence": Layout("B K", "real"),
    "covariance_m2": Layout("B K 3 3", "real"),
    "on_border": Layout("B K", "integer"),
    "residual": Layout("B", "real"),
    "residual_range": Layout("B 2", "real"),
}


class Problems:
    """Collects what does not fit in a file, for one message."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[str] = []

    def add(self, text: str) -> None:
        """Add what does not fit."""
        self._found.append(text)

    def require(self, name: str, holds: Array, rule: str) -> None:
        """Add a rule that some values of an array break."""
        if not holds.all():
            bad = int(np.size(holds) - np.count_nonzero(holds))
            self.add(f"array '{name}': {rule}; {bad} of {np.size(holds)} values do not fit")

    def raise_any(self) -> None:
        """Refuse the file if anything does not fit.

        Raises:
            SceneFileError: one line that lists it all.
        """
        if len(self._found) == 1:
            raise SceneFileError(f"{self._path}: {self._found[0]}")
        if self._found:
            listed = "; ".join(f"({number}) {text}" for number, text in enumerate(self._found, 1))
            raise SceneFileError(f"{self._path}: {len(self._found)} things do not fit: {listed}")


@dataclass(frozen=True)
class Entry:
    """An array of a file whose shape and type fit its layout."""

    array: LazyArray
    layout: Layout
    is_shared: bool
    shape: tuple[int, ...]
    remarks: list[str]


def fitted(arrays: Arrays, names: Sequence[str], sizes: dict[str, int], problems: Problems) -> dict[str, Entry]:
    """Check shapes and types; ``sizes`` gets the axes that are met first."""
    found: dict[str, Entry] = {}
    for name in names:
        if name not in arrays:
            told = any(each in arrays for each in TRUTH) and "y" in arrays
            hint = "; a truth needs it" if name in TRUTH and told else suggestion(name, list(arrays))
            problems.add(f"array '{name}' is missing{hint}")
            continue
        entry = _entry(name, arrays, sizes, problems)
        if entry is not None:
            found[name] = entry
    return found


def _entry(name: str, arrays: Arrays, sizes: dict[str, int], problems: Problems) -> Entry | None:
    array, layout = arrays[name], LAYOUTS[name]
    if layout.axes == "B M N" and len(array.shape) == 4:  # a channel of its own in every snapshot
        layout = Layout("B L M N", layout.kind)
    legend = layout.legend
    shape = tuple(array.shape)
    if arrays.kind.startswith("MATLAB"):  # no vectors there, and no ones at the end of a shape
        if len(legend) == 1:
            shape = tuple(size for size in shape if size != 1) or ((1,) if sizes.get("B") == 1 else ())
        elif not layout.shared:
            shape += (1,) * (len(legend) - len(shape))
    shared = layout.shared and len(shape) == len(legend) - 1
    if layout.shared and len(legend) == 1 and shape == (1,) and sizes.get("B", 1) != 1:
        shared, shape = True, ()
    axes = legend[1:] if shared else legend
    expected = [int(axis) if axis.isdigit() else sizes.get(axis) for axis in axes]
    fits = len(shape) == len(axes) and all(size in (None, found) for size, found in zip(expected, shape, strict=True))
    if not fits:
        wanted = ", ".join(axis if size is None else str(size) for axis, size in zip(axes, expected, strict=True))
        hint = _exchanged(shape, expected, axes)
        problems.add(f"array '{name}' has shape {shape}, expected ({wanted}) = [{', '.join(axes)}]{hint}")
    remarks = []
    target = np.dtype(_TYPES[layout.kind])
    problem = _type_problem(array.dtype, layout.kind, real_is_enough=name == "ris_codes")
    if problem is not None:
        problems.add(f"array '{name}' has dtype {array.dtype}, {problem}")
    elif array.dtype != target:
        remarks.append(f"'{name}' is {array.dtype} and read as {target}")
    if not fits or problem is not None:
        return None
    for axis, size in zip(axes, shape, strict=True):
        if not axis.isdigit():
            sizes.setdefault(axis, size)
    if shared:
        remarks.append(f"one '{name}' serves all scenes")
    return Entry(array, layout, shared, shape, remarks)


def _exchanged(shape: tuple[int, ...], expected: Sequence[int | None], axes: Sequence[str]) -> str:
    """A hint where the last two axes stand in the other order."""
    if len(shape) != len(expected) or len(shape) < 2:
        return ""
    swapped = (*shape[:-2], shape[-1], shape[-2])
    if all(size in (None, found) for size, found in zip(expected, swapped, strict=True)):
        found = [*axes[:-2], axes[-1], axes[-2]]
        return f"; it looks like [{', '.join(found)}]: exchange the last two axes"
    return ""


def _type_problem(dtype: np.dtype[Any], kind: str, *, real_is_enough: bool) -> str | None:
    if kind == "complex":
        fits = dtype.kind == "c" or (real_is_enough and dtype.kind in "fiu")
        return None if fits else "expected complex64 or complex128"
    return None if dtype.kind in "fiu" else f"expected {'whole' if kind == 'integer' else 'real'} numbers"


def cast_values(name: str, entry: Entry, part: slice, problems: Problems) -> Array:
    """Read scenes ``part`` of an array, cast as files are written, and check that the cast keeps the values."""
    everything: Any = slice(None) if entry.array.shape else ()
    if entry.is_shared:
        raw = np.asarray(entry.array[everything]).reshape(entry.shape)
    elif len(entry.shape) == 1:  # MATLAB writes a vector as a row or as a column
        raw = np.asarray(entry.array[everything]).reshape(-1)[part]
    else:
        raw = np.asarray(entry.array[part]).reshape(-1, *entry.shape[1:])
    target = np.dtype(_TYPES[entry.layout.kind])
    if raw.dtype.kind == "c" or name not in ("azimuth", "elevation", "range_m", "covariance_m2", "residual_range"):
        problems.require(name, np.isfinite(raw), "every value must be finite")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = raw.astype(target, order="C")
    if entry.layout.kind == "integer":
        problems.require(name, cast == raw, "whole numbers are expected")
    else:
        finite = np.isfinite(raw)
        kept = np.isfinite(cast) & ((cast != 0) | (raw == 0))
        problems.require(
            name, kept | ~finite, "every value must fit single precision, 1e-38 .. 1e38; choose another unit"
        )
    return cast
