"""Named arrays in files: npz archives, MATLAB files (5 and 7.3) and HDF5, read and written in parts.

The kind of a file is told from its first bytes, not from its name. Nothing is unpickled. Large arrays are read on
demand: an array of an npz archive is mapped into memory, behind a temporary file where the archive is compressed; one
of HDF5 is read where it is sliced. A MATLAB 5 file is held whole.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ris_hpo.atomic import replacing
from ris_hpo.errors import OutputError, SceneFileError, reading

Array = NDArray[Any]
Kind = Literal["npz", "MATLAB 5", "MATLAB 7.3", "HDF5"]

SUFFIXES: Final = (".npz", ".mat", ".h5", ".hdf5")

_HDF5_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
_MATLAB_BLOCK: Final = 512  # MATLAB 7.3 is HDF5 behind a text header of this length
_MATLAB_BYTES: Final = 1 << 31  # an array of MATLAB 5 has fewer
_HELD_BYTES: Final = 1 << 26  # a compressed array larger than this is unpacked to disk, not to memory


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


def write_arrays(path: Path, parts: Iterable[Mapping[str, Array]], texts: Mapping[str, str] | None = None) -> None:
    """Write named arrays, whole or not at all; the suffix decides: ``.mat`` (MATLAB 5), ``.h5``, ``.hdf5``, else npz.

    Args:
        path: the file to make or replace.
        parts: arrays of the same names, which are joined along their first axis. One part is in memory at a time,
            but for MATLAB 5, which is written in one piece.
        texts: written beside them.

    Raises:
        OutputError: the file cannot be written, or a part has other names than the first; nothing is left behind.
    """
    suffix, texts, parts = path.suffix.lower(), texts or {}, _alike(path, parts)
    with replacing(path) as partial:
        if suffix == ".mat":
            _write_matlab(path, partial, parts, texts)
        elif suffix in (".h5", ".hdf5"):
            _write_hdf5(partial, parts, texts)
        else:
            _write_npz(partial, parts, texts)


def _alike(path: Path, parts: Iterable[Mapping[str, Array]]) -> Iterator[Mapping[str, Array]]:
    first: set[str] | None = None
    for part in parts:
        first = set(part) if first is None else first
        if set(part) != first:
            differing = ", ".join(sorted(first ^ set(part)))
            raise OutputError(f"{path}: cannot be written: not every part has {differing}")
        yield part


def _write_matlab(path: Path, partial: Path, parts: Iterable[Mapping[str, Array]], texts: Mapping[str, str]) -> None:
    from scipy.io import savemat

    pieces = list(parts)
    joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    largest = max(joined, key=lambda name: joined[name].nbytes)
    if joined[largest].nbytes >= _MATLAB_BYTES:
        size = f"'{largest}' takes {joined[largest].nbytes / 2**30:.1f} GiB"
        raise OutputError(f"{path}: {size}, a MATLAB 5 file holds less than 2 in an array; write .h5 instead")
    with partial.open("wb") as stream:
        savemat(stream, {**joined, **texts}, oned_as="column")


def _write_hdf5(partial: Path, parts: Iterable[Mapping[str, Array]], texts: Mapping[str, str]) -> None:
    import h5py

    with h5py.File(partial, "w") as file:
        for part in parts:
            for name, value in part.items():
                if name not in file:
                    file.create_dataset(name, data=value, maxshape=(None, *value.shape[1:]))
                    continue
                dataset = file[name]
                dataset.resize(len(dataset) + len(value), axis=0)
                dataset[-len(value) :] = value
        for name, text in texts.items():
            file.create_dataset(name, data=text)


def _write_npz(partial: Path, parts: Iterable[Mapping[str, Array]], texts: Mapping[str, str]) -> None:
    """Each array goes to a temporary file first, since the members of an archive are written one after the other."""
    with tempfile.TemporaryDirectory(prefix=".", dir=partial.parent) as folder:
        joined: dict[str, tuple[Path, int, Array]] = {}  # the bytes so far, the length, and something of the same type
        for part in parts:
            for name, value in part.items():
                file, length, _ = joined.get(name, (Path(folder) / name, 0, value))
                with file.open("ab") as stream:
                    stream.write(np.ascontiguousarray(value).data)
                joined[name] = (file, length + len(value), value[:0])
        with zipfile.ZipFile(partial, "w") as archive:
            for name, (file, length, empty) in joined.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member, file.open("rb") as stream:
                    header = np.lib.format.header_data_from_array_1_0(empty)
                    header |= {"shape": (length, *empty.shape[1:]), "fortran_order": False}
                    np.lib.format.write_array_header_1_0(member, header)
                    shutil.copyfileobj(stream, member, 1 << 20)
                file.unlink()
            for name, text in texts.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(text))


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
        order: Literal["F", "C"] = "F" if fortran else "C"
        if member.compress_type != zipfile.ZIP_STORED and member.file_size > _HELD_BYTES:
            with tempfile.TemporaryFile() as file:  # without a name; the mapped array keeps it
                _unpack(stream, member, file)
                return cast(LazyArray, np.memmap(file, dtype, "r", shape=shape, order=order))
        if member.compress_type != zipfile.ZIP_STORED or member.file_size - header == 0:
            flat = np.frombuffer(stream.read(), dtype, count=int(np.prod(shape, dtype=np.int64)))
            return cast(LazyArray, flat.reshape(shape, order=order))
    offset = _start_of(path, member) + header
    return cast(LazyArray, np.memmap(path, dtype, "r", offset=offset, shape=shape, order=order))


def _unpack(stream: IO[bytes], member: zipfile.ZipInfo, file: IO[bytes]) -> None:
    """Copy what is left to read of a member."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if member.file_size > free:
        raise OSError(f"unpacked '{member.filename}' takes {member.file_size:,} bytes, {free:,} are free for it")
    shutil.copyfileobj(stream, file, 1 << 20)
    file.flush()


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
