"""Named arrays in files: npz archives, MATLAB files (5 and 7.3) and HDF5, read in parts and written whole.

The kind of a file is told from its first bytes, not from its name. Nothing is unpickled. Large arrays are read on
demand: an array of an uncompressed npz archive is mapped into memory, one of HDF5 is read where it is sliced.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ris_hpo.atomic import replacing
from ris_hpo.errors import SceneFileError, reading

Array = NDArray[Any]
Kind = Literal["npz", "MATLAB 5", "MATLAB 7.3", "HDF5"]

SUFFIXES: Final = (".npz", ".mat", ".h5", ".hdf5")

_HDF5_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
_MATLAB_BLOCK: Final = 512  # MATLAB 7.3 is HDF5 behind a text header of this length


class LazyArray(Protocol):
    """What is known of an array before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its numbers."""

    def __getitem__(self, index: Any) -> Any: ...


class Arrays(Mapping[str, LazyArray]):
    """The arrays of one open file by name; close it, or use it in a ``with`` statement."""

    def __init__(
        self, path: Path, kind: Kind, arrays: Mapping[str, LazyArray], close: Callable[[], None] = lambda: None
    ) -> None:
        self.path = path
        self.kind = kind
        self.close = close
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> LazyArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __enter__(self) -> Arrays:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_arrays(path: Path) -> Arrays:
    """Open a file of named arrays.

    Raises:
        SceneFileError: missing, unreadable, damaged, or of a kind that is not read; the message says which kinds are.
    """
    with reading(path, SceneFileError), path.open("rb") as stream:
        head = stream.read(_MATLAB_BLOCK + len(_HDF5_SIGNATURE))
    if head.startswith(b"PK"):
        with _damage(path, "npz archive"):
            return Arrays(path, "npz", _npz(path))
    if head.startswith(_HDF5_SIGNATURE):
        return _hdf5(path, "HDF5")
    if head.startswith(b"MATLAB 7.3") or head[_MATLAB_BLOCK:].startswith(_HDF5_SIGNATURE):
        return _hdf5(path, "MATLAB 7.3")
    if head.startswith(b"MATLAB 5.0"):
        with _damage(path, "MATLAB 5 file"):
            return Arrays(path, "MATLAB 5", _matlab(path))
    if head.startswith(b"\x93NUMPY"):
        raise SceneFileError(f"{path}: a single array was found, expected an npz archive of named arrays")
    raise SceneFileError(f"{path}: not a readable npz archive, MATLAB file (5 or 7.3) or HDF5 file")


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write named arrays, whole or not at all; the suffix decides: ``.mat`` (MATLAB 5), ``.h5``, ``.hdf5``, else npz.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
    """
    suffix = path.suffix.lower()
    with replacing(path) as partial:
        if suffix == ".mat":
            from scipy.io import savemat

            with partial.open("wb") as stream:
                savemat(stream, {name: _text_or_array(value) for name, value in arrays.items()}, oned_as="column")
        elif suffix in (".h5", ".hdf5"):
            import h5py

            with h5py.File(partial, "w") as file:
                for name, value in arrays.items():
                    file.create_dataset(name, data=_text_or_array(value))
        else:
            with partial.open("wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]


def _text_or_array(value: Array) -> Any:
    return str(value) if value.dtype.kind == "U" else value


@contextmanager
def _damage(path: Path, what: str) -> Iterator[None]:
    """Turn what the readers raise on a damaged file into one line."""
    try:
        yield
    except (
        OSError, ValueError, TypeError, EOFError, LookupError, NotImplementedError, RuntimeError, MemoryError,
        OverflowError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SceneFileError(f"{path}: not a readable {what} ({reason})") from None


# -- npz -------------------------------------------------------------------------------------------------------------


def _npz(path: Path) -> dict[str, LazyArray]:
    with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        damaged = archive.testzip() if sum(member.file_size for member in archive.infolist()) < 1 << 26 else None
        if damaged is not None:
            raise ValueError(f"the check sum of '{damaged}' is wrong")
        return {
            member.filename.removesuffix(".npy"): _npz_member(path, archive, member) for member in archive.infolist()
        }


def _npz_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> LazyArray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are not read")
        header = stream.tell()
        if member.compress_type != zipfile.ZIP_STORED or member.file_size - header == 0:
            data = stream.read()
            flat = np.frombuffer(data, dtype, count=int(np.prod(shape, dtype=np.int64)))
            return cast(LazyArray, flat.reshape(shape, order="F" if fortran else "C"))
    return cast(
        LazyArray,
        np.memmap(
            path, dtype, "r", offset=_start_of(path, member) + header, shape=shape, order="F" if fortran else "C"
        ),
    )


def _start_of(path: Path, member: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes: its local header is 30 bytes and two fields whose lengths stand in it."""
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        local = stream.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise ValueError("a local header is damaged")
        return (
            member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        )


# -- MATLAB and HDF5 -------------------------------------------------------------------------------------------------


def _matlab(path: Path) -> dict[str, LazyArray]:
    from scipy.io import loadmat

    found = loadmat(path, appendmat=False)
    return {name: value for name, value in found.items() if not name.startswith("__") and isinstance(value, np.ndarray)}


def _hdf5(path: Path, kind: Literal["HDF5", "MATLAB 7.3"]) -> Arrays:
    import h5py

    with _damage(path, f"{kind} file"):
        file = h5py.File(path, "r")
        datasets = {name: node for name, node in file.items() if isinstance(node, h5py.Dataset)}
        return Arrays(path, kind, {name: _Dataset(path, node) for name, node in datasets.items()}, file.close)


class _Dataset:
    """A dataset of HDF5: axes as MATLAB shows them, pairs of numbers as complex ones, characters as text."""

    def __init__(self, path: Path, dataset: Any) -> None:
        import h5py

        self._path = path
        self._dataset = dataset
        matlab_class = dataset.attrs.get("MATLAB_class")
        self._reversed = matlab_class is not None
        self._is_text = matlab_class == b"char" or h5py.check_string_dtype(dataset.dtype) is not None
        fields = dataset.dtype.names
        self._pair = fields if fields is not None and len(fields) == 2 else None
        if self._is_text:
            self.shape: tuple[int, ...] = ()
            self.dtype: np.dtype[Any] = np.dtype("U1")
        else:
            self.shape = dataset.shape[::-1] if self._reversed else dataset.shape
            part = dataset.dtype[0] if self._pair else dataset.dtype
            self.dtype = np.result_type(part, np.complex64) if self._pair else part

    def __getitem__(self, index: Any) -> Any:
        with _damage(self._path, "HDF5 file"):
            if self._is_text:
                return np.array(self._text())
            if self._reversed and isinstance(index, slice):
                value = self._dataset[..., index]
            else:
                value = self._dataset[index]
            if self._pair:
                real, imaginary = self._pair
                joined = np.empty(value.shape, self.dtype)
                joined.real, joined.imag = value[real], value[imaginary]
                value = joined
            return np.transpose(value) if self._reversed else value

    def _text(self) -> str:
        if self._reversed:
            return "".join(chr(code) for code in np.ravel(self._dataset[()]))
        value = self._dataset[()]
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
