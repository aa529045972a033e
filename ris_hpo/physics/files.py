"""Scene and estimate files: named arrays in npz, MATLAB (5, 7.3) or HDF5, checked as a whole.

A scene file holds ``y`` complex [B, L, M], ``bs_ris_channel`` complex [B, M, N], ``ris_codes`` complex [B, L, N] and
``noise_power`` [B]. One channel [M, N], one code book [L, N] and one noise power serve all scenes of a file. Where the
truth is known it holds ``num_sources`` [B] and those of ``azimuth``, ``elevation`` (rad) and ``range_m`` [B, K_max]
that are known, whatever beyond ``num_sources``; ``given`` [B, 3] marks which of the three the receiver knows
beforehand, so that bounds and scores leave them out. ``snr_db`` [B], ``power`` [B, K_max], ``symbols`` complex
[B, L, K_max], ``true_channel`` complex [B, M, N], ``true_noise_power`` [B] and the surface as JSON in ``geometry_json``
are optional. Any width, byte order and memory order is read; files are written in single precision. An estimate file
holds ``num_sources``, ``azimuth``, ``elevation``, ``range_m``, ``existence`` [B, K_max] and, where the method gives
one, ``covariance_m2`` [B, K_max, 3, 3], ``residual`` [B] with ``residual_range`` [B, 2], and ``on_border`` [B, K_max].

Names, shapes and types are checked when a file is opened, values when they are read. A refusal lists all misfits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ris_hpo.config import suggestion
from ris_hpo.errors import ConfigError, SceneFileError
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.containers import SUFFIXES, Array, Arrays, open_arrays, write_arrays
from ris_hpo.physics.layouts import TRUTH, Problems, cast_values, fitted
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

UNSTATED_SURFACE: Final = (
    "the file does not say its surface: state it with --surface, or write 'geometry_json' into the file"
)
_GOODNESS: Final = ("on_border", "residual", "residual_range")
_REQUIRED: Final = ("y", "bs_ris_channel", "ris_codes")


class SceneFile:
    """A scene file that is open for reading, in parts or whole.

    Attributes:
        path: the file.
        kind: ``npz``, ``MATLAB 5``, ``MATLAB 7.3`` or ``HDF5``, or of which files a folder consists.
        geometry: the surface.
        states_surface: whether the file states it; else the caller's is taken, or the default one is assumed.
        sizes: number of scenes B, snapshots L, antennas M, elements N and, with a truth, slots K.
        has_noise_power: whether the file gives the noise power.
        has_truth: whether it gives the truth.
        remarks: one line on each array that is not as files are written: cast, or shared by all scenes.
        unused: names of arrays that nothing reads.
    """

    def __init__(self, arrays: Arrays, geometry: Geometry | None, *, truth: bool = True) -> None:
        self._arrays = arrays
        self.path: Path = arrays.path
        self.kind: str = arrays.kind
        problems = Problems(arrays.path)
        self.sizes: dict[str, int] = {}
        self.has_noise_power = "noise_power" in arrays
        self.has_truth = truth and any(name in arrays for name in TRUTH)
        self._used = fitted(arrays, self._wanted(arrays), self.sizes, problems)
        for axis, meaning in (("B", "scenes"), ("L", "snapshots"), ("M", "antennas"), ("N", "elements")):
            if self.sizes.get(axis) == 0:
                owner = "bs_ris_channel" if axis == "N" else "y"
                problems.add(f"array '{owner}' has shape {arrays[owner].shape}: no {meaning} in it")
        if self.sizes.get("K") == 0:
            problems.add(f"array 'azimuth' has shape {arrays['azimuth'].shape}: no place for a source in it")
        self.states_surface = "geometry_json" in arrays
        self.geometry = _surface(arrays, geometry, problems)
        elements = self.sizes.get("N")
        if elements and self.geometry.num_elements != elements:
            surface = self.geometry
            hint = "" if self.states_surface else f"; {UNSTATED_SURFACE}"
            rows = surface.positions_m is None
            size = f"{surface.num_horizontal} x {surface.num_vertical} = " if rows else ""
            problems.add(
                f"array 'bs_ris_channel' has N = {elements} elements, expected {size}{surface.num_elements} of the "
                f"surface{hint}"
            )
        problems.raise_any()
        self.unused = [name for name in arrays if name not in self._used and name != "geometry_json"]
        self.remarks = [remark for entry in self._used.values() for remark in entry.remarks]

    def _wanted(self, arrays: Arrays) -> list[str]:
        optional = ["noise_power", "snr_db"]
        if self.has_truth:
            optional += [*TRUTH[1:], "power", "given", "symbols", "true_channel", "true_noise_power"]
        counts = TRUTH[:1] if self.has_truth else ()
        return [*_REQUIRED, *counts, *(name for name in optional if name in arrays)]

    def __len__(self) -> int:
        return self.sizes["B"]

    def __enter__(self) -> SceneFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; scenes that were read stay."""
        self._arrays.close()

    def read(self, start: int = 0, stop: int | None = None) -> Scenes:
        """Read scenes ``start`` .. ``stop``, all by default; the noise power is NaN where the file has none.

        Raises:
            SceneFileError: values that are not finite, out of bounds, or lost in single precision.
        """
        part = slice(start, len(self) if stop is None else min(stop, len(self)))
        problems = Problems(self.path)
        values = {name: cast_values(name, entry, part, problems) for name, entry in self._used.items()}
        count = len(range(*part.indices(len(self))))
        for name in ("noise_power", "true_noise_power"):
            if name in values:
                problems.require(name, values[name] > 0, "every value must be positive")
        truth = _truth(values, self._slots(), problems) if self.has_truth else None
        complete = all(name in values for name in TRUTH)
        problems.raise_any()

        def tensor(name: str) -> Tensor | None:
            if name not in values:
                return None
            value = torch.from_numpy(values[name])
            return value.expand(count, *value.shape) if self._used[name].is_shared else value

        y, channel, codes, noise = (tensor(name) for name in (*_REQUIRED, "noise_power"))
        assert y is not None
        assert channel is not None
        assert codes is not None
        return Scenes(
            geometry=self.geometry,
            y=y,
            bs_ris_channel=channel,
            ris_codes=codes,
            noise_power=torch.full((count,), torch.nan) if noise is None else noise,
            truth=truth if complete else None,
            snr_db=tensor("snr_db"),
            symbols=tensor("symbols"),
            true_channel=tensor("true_channel"),
            true_noise_power=tensor("true_noise_power"),
            partial_truth=None if complete else truth,
        )

    def read_all(self) -> Scenes:
        """Read the file whole.

        Raises:
            SceneFileError: as :meth:`read`, or the file has no noise power.
        """
        if not self.has_noise_power:
            hint = suggestion("noise_power", self.unused)
            raise SceneFileError(f"{self.path}: array 'noise_power' is missing{hint}")
        return self.read()

    def _slots(self) -> int:
        """K; of counts alone the largest, at least 1."""
        counts = self._used["num_sources"].array
        return self.sizes.get("K") or max(1, int(np.max(np.asarray(counts[slice(None) if counts.shape else ()]))))

    def parts(self, size: int = 256) -> Iterator[Scenes]:
        """Read the file in parts of ``size`` scenes, so that a large one needs little memory."""
        for start in range(0, len(self), size):
            yield self.read(start, start + size)


class SceneFolder(SceneFile):
    """The scene files of a folder, read one after the other in the order of their names as though they were one.

    Args:
        path: the folder.
        files: opened, at least one.

    Raises:
        SceneFileError: files of different surfaces or sizes, or of which only some have a truth or a noise power.
    """

    def __init__(self, path: Path, files: Sequence[SceneFile]) -> None:
        first = files[0]
        self.path, self.geometry, self.states_surface = path, first.geometry, first.states_surface
        self.has_noise_power, self.has_truth = first.has_noise_power, first.has_truth
        self.kind = f"folder of {len(files)} files, {first.kind}"
        self._files, self._starts = files, [0]
        for file in files:
            for what, mine, firsts in (
                ("surface", str(file.geometry), str(first.geometry)),
                ("noise power", file.has_noise_power, first.has_noise_power),
                ("truth", file.has_truth, first.has_truth),
                *((f"size {axis}", file.sizes.get(axis), first.sizes.get(axis)) for axis in "LMNK"),
            ):
                if mine != firsts:
                    raise SceneFileError(f"{file.path}: {what} is {mine}, that of {first.path.name} is {firsts}")
            self._starts.append(self._starts[-1] + len(file))
        self.sizes = {**first.sizes, "B": self._starts[-1]}
        self.unused = sorted({name for file in files for name in file.unused})
        self.remarks = list(dict.fromkeys(remark for file in files for remark in file.remarks))

    def close(self) -> None:
        """Close the files; scenes that were read stay."""
        for file in self._files:
            file.close()

    def read(self, start: int = 0, stop: int | None = None) -> Scenes:
        """Read scenes ``start`` .. ``stop`` of all files; see :meth:`SceneFile.read`."""
        stop, parts = len(self) if stop is None else stop, []
        for file, first in zip(self._files, self._starts, strict=False):
            if start < first + len(file) and first < stop:
                parts.append(file.read(max(0, start - first), stop - first))
        return Scenes.cat(parts) if parts else self._files[0].read(0, 0)


def open_scenes(path: Path | str, geometry: Geometry | None = None, *, truth: bool = True) -> SceneFile:
    """Open a scene file, or a folder of them, and check names, shapes and types.

    Args:
        path: npz, MATLAB or HDF5 file as described above, or a folder whose files of these kinds are read as one.
        geometry: the surface, used where the file does not say; a file that says otherwise wins. Without either, the
            default surface is assumed if its number of elements fits.
        truth: False leaves aside what the file says of the sources, whatever it is.

    Raises:
        SceneFileError: missing, damaged or of another kind, or arrays that do not fit: one line that lists each with
            what was found and what was expected.
    """
    path = Path(path)
    if path.is_dir():
        places = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES and not each.name.startswith("."))
        if not places:
            raise SceneFileError(f"{path}: no file in it ends in {', '.join(SUFFIXES)}")
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(open_scenes(place, geometry, truth=truth)) for place in places]
            folder = SceneFolder(path, files)
            opened.pop_all()
            return folder
    arrays = open_arrays(path)
    try:
        return SceneFile(arrays, geometry, truth=truth)
    except SceneFileError:
        arrays.close()
        raise


def load_scenes(path: Path | str, geometry: Geometry | None = None, *, truth: bool = True) -> Scenes:
    """Read all scenes of a file; see :func:`open_scenes`.

    Raises:
        SceneFileError: as :func:`open_scenes`, or values that do not fit, or no noise power.
    """
    with open_scenes(path, geometry, truth=truth) as file:
        return file.read_all()


def save_scenes(path: Path | str, scenes: Scenes | Iterable[Scenes]) -> None:
    """Write scenes, with truth, symbols and geometry where they are known; the suffix decides the kind of file.

    Args:
        path: the file to make or replace.
        scenes: a batch, or batches of one kind one after the other, so that a file may be larger than memory.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
    """
    parts = iter([scenes] if isinstance(scenes, Scenes) else scenes)
    first = next(parts)
    surface = json.dumps(first.geometry.model_dump(mode="json"), sort_keys=True)
    arrays = (_scene_arrays(part) for part in itertools.chain([first], parts))
    write_arrays(Path(path), arrays, {"geometry_json": surface})


def _scene_arrays(scenes: Scenes) -> dict[str, Array]:
    arrays = {
        "y": _numpy(scenes.y),
        "bs_ris_channel": _numpy(scenes.bs_ris_channel),
        "ris_codes": _numpy(scenes.ris_codes),
        "noise_power": _numpy(scenes.noise_power, np.float32),
    }
    truth = scenes.partial_truth if scenes.truth is None else scenes.truth
    if truth is not None:
        order = _packed(truth)
        arrays |= _source_arrays(truth.take(order))
        if scenes.symbols is not None:
            index = order.unsqueeze(1).expand(-1, scenes.symbols.shape[1], -1)
            arrays["symbols"] = _numpy(scenes.symbols.gather(2, index))
    if scenes.snr_db is not None:
        arrays["snr_db"] = _numpy(scenes.snr_db, np.float32)
    if scenes.true_channel is not None:
        arrays["true_channel"] = _numpy(scenes.true_channel)
    if scenes.true_noise_power is not None:
        arrays["true_noise_power"] = _numpy(scenes.true_noise_power, np.float32)
    return arrays


def save_estimates(path: Path | str, sources: Sources) -> None:
    """Write estimated sources, those present first in each scene; the suffix decides the kind of file.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
    """
    sources = sources.take(_packed(sources))
    arrays = _source_arrays(sources)
    existence = sources.mask if sources.existence is None else sources.existence
    arrays["existence"] = _numpy(existence, np.float32)
    if sources.covariance_m2 is not None:
        beyond = ~sources.mask[..., None, None]
        arrays["covariance_m2"] = _numpy(sources.covariance_m2.masked_fill(beyond, torch.nan), np.float32)
    if sources.residual is not None and sources.residual_range is not None and sources.on_border is not None:
        arrays["residual"] = _numpy(sources.residual, np.float32)
        arrays["residual_range"] = _numpy(sources.residual_range, np.float32)
        arrays["on_border"] = _numpy(sources.on_border & sources.mask, np.uint8)
    write_arrays(Path(path), [arrays])


def load_estimates(path: Path | str) -> Sources:
    """Read estimated sources.

    Raises:
        SceneFileError: missing or damaged file, or arrays that do not fit: one line that lists each.
    """
    path = Path(path)
    with open_arrays(path) as arrays:
        problems = Problems(path)
        optional = [name for name in ("power", "covariance_m2", *_GOODNESS) if name in arrays]
        used = fitted(arrays, [*TRUTH, "existence", *optional], {}, problems)
        problems.raise_any()
        values = {name: cast_values(name, entry, slice(None), problems) for name, entry in used.items()}
    sources = _truth(values, values["azimuth"].shape[1], problems)
    existence = values["existence"]
    problems.require("existence", (existence >= 0) & (existence <= 1), "every value must be a probability")
    covariance = None
    if "covariance_m2" in values:
        found = values["covariance_m2"]
        problems.require("covariance_m2", np.isfinite(found[sources.mask.numpy()]), "values of a source must be finite")
        covariance = torch.from_numpy(np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0))
    problems.raise_any()
    goodness = {name: torch.from_numpy(values[name]) for name in _GOODNESS if name in values}
    if "on_border" in goodness:
        goodness["on_border"] = goodness["on_border"] != 0
    return dataclasses.replace(sources, existence=torch.from_numpy(existence), covariance_m2=covariance, **goodness)


def _truth(values: dict[str, Array], slots: int, problems: Problems) -> Sources:
    """The sources of checked arrays; a value beyond ``num_sources`` has no meaning, a coordinate not given is NaN."""
    count = values["num_sources"]
    problems.require("num_sources", (count >= 0) & (count <= slots), f"every value must lie within 0..{slots}")
    mask = np.arange(slots) < count[:, None]
    nowhere = np.full(mask.shape, np.nan, np.float32)
    azimuth, elevation, range_m = (values.get(name, nowhere) for name in TRUTH[1:])
    for name, value in zip(TRUTH[1:], (azimuth, elevation, range_m), strict=True):
        if name in values:
            problems.require(name, np.isfinite(value[mask]), "values of a source must be finite")
    for name, value in (("azimuth", azimuth), ("elevation", elevation)):
        angles = value[mask]
        problems.require(name, ~(np.abs(angles) >= np.pi / 2 + 1e-4), "radians within -pi/2..pi/2 are expected")
    problems.require("range_m", ~(range_m[mask] <= 0), "every range must be positive")
    power = values.get("power", mask.astype(np.float32))
    problems.require("power", power >= 0, "no value may be negative")
    return Sources(
        torch.from_numpy(np.where(mask, azimuth, np.float32(0))),
        torch.from_numpy(np.where(mask, elevation, np.float32(0))),
        torch.from_numpy(np.where(mask, range_m, np.float32(1))),
        torch.from_numpy(power),
        torch.from_numpy(mask),
        given=torch.from_numpy(values["given"] != 0) if "given" in values else None,
    )


def _surface(arrays: Arrays, geometry: Geometry | None, problems: Problems) -> Geometry:
    if "geometry_json" not in arrays:
        return geometry or Geometry()
    text = np.asarray(arrays["geometry_json"][()])
    if text.size != 1 or text.dtype.kind != "U":
        problems.add(f"array 'geometry_json' has shape {text.shape} and dtype {text.dtype}; expected one string")
        return geometry or Geometry()
    try:
        return Geometry.parse(json.loads(str(text.reshape(())[()])), "geometry_json")
    except (json.JSONDecodeError, ConfigError) as error:
        problems.add(f"array 'geometry_json' does not describe a surface: {error}")
        return geometry or Geometry()


# -- writing ---------------------------------------------------------------------------------------------------------


def _packed(sources: Sources) -> Tensor:
    """Slot order [B, K] with the present sources first."""
    return torch.argsort(sources.mask.to(torch.int8), dim=-1, descending=True, stable=True)


def _source_arrays(sources: Sources) -> dict[str, Array]:
    beyond = ~sources.mask
    arrays = {"num_sources": _numpy(sources.num_sources, np.int64)}
    for name in ("azimuth", "elevation", "range_m"):
        value = getattr(sources, name).masked_fill(beyond, torch.nan)
        if not bool(value[sources.mask].isnan().any()):  # a coordinate that is not known is not written
            arrays[name] = _numpy(value, np.float32)
    arrays["power"] = _numpy(sources.power.masked_fill(beyond, 0.0), np.float32)
    if sources.given is not None:
        arrays["given"] = _numpy(sources.given, np.uint8)
    return arrays


def _numpy(value: Tensor, dtype: type[np.generic] = np.complex64) -> Array:
    array: Array = value.detach().cpu().resolve_conj().numpy()
    return array.astype(dtype, copy=False)
