"""Scene and estimate files: npz in, npz out, checked array by array.

A scene file holds ``y`` complex64 [B, L, M], ``bs_ris_channel`` complex64 [B, M, N], ``ris_codes`` complex64 [B, L, N],
``noise_power`` float32 [B] and, where the truth is known, ``num_sources`` int64 [B] with ``azimuth``, ``elevation``
(rad) and ``range_m`` float32 [B, K_max], NaN beyond ``num_sources``. ``snr_db`` float32 [B], ``power`` float32
[B, K_max], ``symbols`` complex64 [B, L, K_max], ``true_channel`` complex64 [B, M, N] and the surface as JSON in
``geometry_json`` are written when known and optional when read. An estimate file holds ``num_sources``, ``azimuth``,
``elevation``, ``range_m``, ``existence`` [B, K_max] and, where the method gives one, ``covariance_m2`` [B, K_max, 3,
3].

Files are read without unpickling anything and written to a temporary name first, so that none is ever half there.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ris_hpo.atomic import replacing
from ris_hpo.config import suggestion
from ris_hpo.errors import ConfigError, SceneFileError
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

Array = NDArray[Any]

_TRUTH = ("num_sources", "azimuth", "elevation", "range_m")


def save_scenes(path: Path | str, scenes: Scenes) -> None:
    """Write scenes, with truth, symbols and geometry where they are known.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
    """
    arrays = {
        "y": _numpy(scenes.y),
        "bs_ris_channel": _numpy(scenes.bs_ris_channel),
        "ris_codes": _numpy(scenes.ris_codes),
        "noise_power": _numpy(scenes.noise_power, np.float32),
        "geometry_json": np.array(json.dumps(scenes.geometry.model_dump(mode="json"), sort_keys=True)),
    }
    if scenes.truth is not None:
        order = _packed(scenes.truth)
        arrays |= _source_arrays(scenes.truth.take(order))
        if scenes.symbols is not None:
            index = order.unsqueeze(1).expand(-1, scenes.symbols.shape[1], -1)
            arrays["symbols"] = _numpy(scenes.symbols.gather(2, index))
    if scenes.snr_db is not None:
        arrays["snr_db"] = _numpy(scenes.snr_db, np.float32)
    if scenes.true_channel is not None:
        arrays["true_channel"] = _numpy(scenes.true_channel)
    _write(Path(path), arrays)


def load_scenes(path: Path | str, geometry: Geometry | None = None) -> Scenes:
    """Read scenes.

    Args:
        path: an npz file as described above.
        geometry: the surface, used where the file does not say; a file that says otherwise wins. Without either, the
            default surface is taken if its number of elements fits.

    Raises:
        SceneFileError: missing or damaged file, or an array that is missing, of wrong shape or dtype, or not finite;
            the message names the array, what was found and what was expected.
    """
    path = Path(path)
    arrays = _read(path)
    y = _take(path, arrays, "y", np.complex64, "B L M", {})
    sizes = dict(zip("BLM", y.shape, strict=True))
    for axis, meaning in (("B", "scenes"), ("L", "snapshots"), ("M", "antennas")):
        if sizes[axis] == 0:
            raise SceneFileError(f"{path}: array 'y' has shape {y.shape}: no {meaning} in it; expected [B, L, M]")
    channel = _take(path, arrays, "bs_ris_channel", np.complex64, "B M N", sizes)
    sizes["N"] = channel.shape[2]
    codes = _take(path, arrays, "ris_codes", np.complex64, "B L N", sizes)
    noise_power = _take(path, arrays, "noise_power", np.float32, "B", sizes)
    _require(path, "noise_power", noise_power > 0, "every value must be positive")
    present = [name for name in _TRUTH if name in arrays]
    truth = symbols = None
    if present:
        missing = [name for name in _TRUTH if name not in arrays]
        if missing:
            raise SceneFileError(f"{path}: array '{missing[0]}' is missing; the truth needs all of {', '.join(_TRUTH)}")
        truth = _take_sources(path, arrays, sizes)
        if "symbols" in arrays:
            symbols = torch.from_numpy(_take(path, arrays, "symbols", np.complex64, "B L K", sizes))
    snr_db = true_channel = None
    if "snr_db" in arrays:
        snr_db = torch.from_numpy(_take(path, arrays, "snr_db", np.float32, "B", sizes))
    if "true_channel" in arrays:
        true_channel = torch.from_numpy(_take(path, arrays, "true_channel", np.complex64, "B M N", sizes))
    return Scenes(
        geometry=_take_geometry(path, arrays, geometry, sizes["N"]),
        y=torch.from_numpy(y),
        bs_ris_channel=torch.from_numpy(channel),
        ris_codes=torch.from_numpy(codes),
        noise_power=torch.from_numpy(noise_power),
        truth=truth,
        snr_db=snr_db,
        symbols=symbols,
        true_channel=true_channel,
    )


def save_estimates(path: Path | str, sources: Sources) -> None:
    """Write estimated sources; those present come first in each scene.

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
    _write(Path(path), arrays)


def load_estimates(path: Path | str) -> Sources:
    """Read estimated sources.

    Raises:
        SceneFileError: missing or damaged file, or an array that is missing, of wrong shape or dtype, or not finite.
    """
    path = Path(path)
    arrays = _read(path)
    sources = _take_sources(path, arrays, {})
    batch, k_max = sources.mask.shape
    sizes = {"B": batch, "K": k_max}
    existence = _take(path, arrays, "existence", np.float32, "B K", sizes)
    _require(path, "existence", (existence >= 0) & (existence <= 1), "every value must be a probability")
    covariance = None
    if "covariance_m2" in arrays:
        found = _take(path, arrays, "covariance_m2", np.float32, "B K 3 3", sizes, finite=False)
        _require(path, "covariance_m2", np.isfinite(found[sources.mask.numpy()]), "values of a source must be finite")
        covariance = torch.from_numpy(np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0))
    return Sources(
        sources.azimuth,
        sources.elevation,
        sources.range_m,
        sources.power,
        sources.mask,
        torch.from_numpy(existence),
        covariance,
    )


def _packed(sources: Sources) -> Tensor:
    """Slot order [B, K] with the present sources first."""
    return torch.argsort(sources.mask.to(torch.int8), dim=-1, descending=True, stable=True)


def _source_arrays(sources: Sources) -> dict[str, Array]:
    beyond = ~sources.mask
    arrays = {"num_sources": _numpy(sources.num_sources, np.int64)}
    for name in ("azimuth", "elevation", "range_m"):
        arrays[name] = _numpy(getattr(sources, name).masked_fill(beyond, torch.nan), np.float32)
    arrays["power"] = _numpy(sources.power.masked_fill(beyond, 0.0), np.float32)
    return arrays


def _take_sources(path: Path, arrays: dict[str, Array], sizes: dict[str, int]) -> Sources:
    count = _take(path, arrays, "num_sources", np.int64, "B", sizes)
    sizes["B"] = count.shape[0]
    values = []
    for name in ("azimuth", "elevation", "range_m"):
        values.append(_take(path, arrays, name, np.float32, "B K", sizes, finite=False))
        sizes["K"] = values[0].shape[1]
    if sizes["K"] == 0:
        raise SceneFileError(f"{path}: array 'azimuth' has shape {values[0].shape}: no place for a source in it")
    _require(path, "num_sources", (count >= 0) & (count <= sizes["K"]), f"every value must lie within 0..{sizes['K']}")
    mask = np.arange(sizes["K"]) < count[:, None]
    for name, value in zip(("azimuth", "elevation", "range_m"), values, strict=True):
        _require(path, name, np.isfinite(value[mask]), "values of a source must be finite")
    azimuth, elevation, range_m = values
    for name, value in (("azimuth", azimuth), ("elevation", elevation)):
        _require(path, name, np.abs(value[mask]) < np.pi / 2 + 1e-4, "radians within -pi/2..pi/2 are expected")
    _require(path, "range_m", range_m[mask] > 0, "every range must be positive")
    if "power" in arrays:
        power = _take(path, arrays, "power", np.float32, "B K", sizes)
        _require(path, "power", power >= 0, "no value may be negative")
    else:
        power = mask.astype(np.float32)
    return Sources(
        torch.from_numpy(np.where(mask, azimuth, np.float32(0))),
        torch.from_numpy(np.where(mask, elevation, np.float32(0))),
        torch.from_numpy(np.where(mask, range_m, np.float32(1))),
        torch.from_numpy(power),
        torch.from_numpy(mask),
    )


def _take_geometry(path: Path, arrays: dict[str, Array], geometry: Geometry | None, num_elements: int) -> Geometry:
    if "geometry_json" in arrays:
        text = arrays["geometry_json"]
        if text.shape != () or text.dtype.kind != "U":
            raise SceneFileError(
                f"{path}: array 'geometry_json' has shape {text.shape} and dtype {text.dtype}; expected one string"
            )
        try:
            geometry = Geometry.parse(json.loads(str(text)), "geometry_json")
        except (json.JSONDecodeError, ConfigError) as error:
            raise SceneFileError(f"{path}: array 'geometry_json' does not describe a surface: {error}") from None
    if geometry is None:
        geometry = Geometry()
    if geometry.num_elements != num_elements:
        raise SceneFileError(
            f"{path}: array 'bs_ris_channel' has N = {num_elements} elements, expected "
            f"{geometry.num_horizontal} x {geometry.num_vertical} = {geometry.num_elements} of the surface"
        )
    return geometry


def _take(
    path: Path,
    arrays: dict[str, Array],
    name: str,
    dtype: type[np.generic],
    axes: str,
    sizes: dict[str, int],
    finite: bool = True,
) -> Array:
    """One array of the expected dtype, shape and, unless told otherwise, finite values."""
    if name not in arrays:
        raise SceneFileError(f"{path}: array '{name}' is missing{suggestion(name, list(arrays))}")
    value = arrays[name]
    expected = tuple(int(axis) if axis.isdigit() else sizes.get(axis) for axis in axes.split())
    legend = axes.split()
    fits = value.ndim == len(expected) and all(
        size is None or size == found for size, found in zip(expected, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(axis if size is None else str(size) for axis, size in zip(legend, expected, strict=True))
        raise SceneFileError(
            f"{path}: array '{name}' has shape {value.shape}, expected ({wanted}) = [{', '.join(legend)}]"
        )
    if value.dtype != np.dtype(dtype):
        raise SceneFileError(f"{path}: array '{name}' has dtype {value.dtype}, expected {np.dtype(dtype).name}")
    if finite:
        _require(path, name, np.isfinite(value), "every value must be finite")
    return np.ascontiguousarray(value)


def _require(path: Path, name: str, holds: Array, rule: str) -> None:
    if not holds.all():
        bad = int(np.size(holds) - np.count_nonzero(holds))
        raise SceneFileError(f"{path}: array '{name}': {rule}; {bad} of {np.size(holds)} values do not fit")


def _read(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as stream:  # opened here: np.load leaves a damaged archive open
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SceneFileError(f"{path}: a single array was found, expected an npz archive of named arrays")
            with archive:
                return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise SceneFileError(f"{path}: no such file") from None
    except (
        OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SceneFileError(f"{path}: not a readable npz archive ({reason})") from None


def _write(path: Path, arrays: dict[str, Array]) -> None:
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _numpy(value: Tensor, dtype: type[np.generic] = np.complex64) -> Array:
    array: Array = value.detach().cpu().resolve_conj().numpy()
    return array.astype(dtype, copy=False)
