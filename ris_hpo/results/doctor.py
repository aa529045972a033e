"""``ris-hpo doctor``: what this machine and its store can do, and what to do where they cannot."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy

from ris_hpo.errors import RisHpoError
from ris_hpo.process import storage_directory
from ris_hpo.search import counting
from ris_hpo.search.files import list_studies
from ris_hpo.store.cache import Store
from ris_hpo.store.credentials import redact
from ris_hpo.store.database import OPTUNA, SCHEMA
from ris_hpo.store.folders import leftovers
from ris_hpo.store.open import default_url, file_system_of, open_store
from ris_hpo.workers import devices

_GIB = 1024**3
_LOW_DISK = 2 * _GIB
_LOW_MEMORY = 2 * _GIB
_SLOW_WRITE_S = 0.1


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is as it should be, what was found, and what to do if not.

    ``severity``: ``ok``, ``note`` (works, worth knowing), or ``problem``.
    """

    name: str
    severity: str
    found: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing has to be done."""
        return self.severity != "problem"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


def examine(url: str | None = None) -> list[Finding]:
    """Look at versions, disk, memory, devices and the store; never raises for what it finds."""
    return [*_versions(), *_machine(), *_gpus(), *_disk(), *_studies(), *_store(url or default_url())]


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    for package in ("torch", "optuna", "sqlalchemy"):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding(package, "problem", "not installed", f"pip install {package}")
            continue
        if package == "optuna" and not found.startswith(f"{OPTUNA}."):
            yield Finding(package, "problem", found, f"pip install 'optuna=={OPTUNA}.*'")
        else:
            yield Finding(package, "ok", found)
    for extra, module in (("postgres", "psycopg"), ("ray", "ray")):
        if find_spec(module) is None:
            yield Finding(module, "note", "not installed", f"pip install 'ris-hpo[{extra}]' if you need it")
        else:
            yield Finding(module, "ok", metadata.version(module))


def _machine() -> Iterator[Finding]:
    yield Finding("cores", "ok", str(devices.cores()))
    free = psutil.virtual_memory().available
    advice = "use fewer workers, or close something" if free < _LOW_MEMORY else ""
    yield Finding("memory", "note" if advice else "ok", f"{free / _GIB:.1f} GiB free", advice)


def _gpus() -> Iterator[Finding]:
    known = devices.gpus()
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not known:
        yield Finding("gpus", "note", "none", "trials run on the CPU; with a GPU, check that nvidia-smi answers")
        return
    for gpu in known:
        yield Finding("gpu " + gpu.index, "ok", f"{gpu.name}, {gpu.free_bytes / _GIB:.1f} GiB free")
    if mask is not None:
        yield Finding("gpu mask", "note", f"CUDA_VISIBLE_DEVICES={mask}", "--gpus counts within this mask")


def _disk() -> Iterator[Finding]:
    folder = storage_directory().absolute()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    kind = file_system_of(existing) or "unknown file system"
    found = f"{folder}: {free / _GIB:.1f} GiB free, {kind}"
    if not os.access(existing, os.W_OK):
        yield Finding("disk", "problem", found, f"no right to write in {existing}; set RIS_HPO_STORAGE_DIR elsewhere")
    elif free < _LOW_DISK:
        yield Finding("disk", "problem", found, "make room, or set RIS_HPO_STORAGE_DIR to another disk")
    else:
        yield Finding("disk", "ok", found)


def _studies() -> Iterator[Finding]:
    try:
        yield Finding("study files", "ok", ", ".join(list_studies()))
    except RisHpoError as error:
        yield Finding("study files", "problem", "none", str(error))


def _latency(store: Store) -> Finding:
    began = time.perf_counter()
    with store.tickets.transaction() as connection:
        connection.execute(sqlalchemy.text("SELECT 1"))
        dialect, version = connection.dialect.name, connection.dialect.server_version_info
    seconds = time.perf_counter() - began
    found = f"{dialect} {'.'.join(str(part) for part in version or ())}, write lock in {1000 * seconds:.1f} ms"
    if seconds > _SLOW_WRITE_S:
        return Finding("latency", "note", found, "many workers are writing, or the disk or network is slow")
    return Finding("latency", "ok", found)


def _store(url: str) -> Iterator[Finding]:
    if ("://" not in url or url.startswith("sqlite:///")) and not Path(url.removeprefix("sqlite:///")).exists():
        yield Finding("store", "note", f"{redact(url)}: not there yet", "'ris-hpo run' makes it")
        return
    try:
        store = open_store(url, create=False)
    except RisHpoError as error:
        yield Finding("store", "problem", str(error), "check the address, the password and that the server is running")
        return
    try:
        yield from _opened_store(store)
    except RisHpoError as error:
        yield Finding("store", "problem", str(error), "see the message; finished trials are safe")
    finally:
        store.close()


def _opened_store(store: Store) -> Iterator[Finding]:
    yield Finding("store", "ok", store.redacted)
    yield Finding("schema", "ok", SCHEMA)  # another one is refused when the store is opened
    if store.read_only:
        yield Finding("access", "note", "its file may be read but not written", "run studies as its owner")
    else:
        yield _latency(store)
    for folder in leftovers(store):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found = f"{folder}: {size / _GIB:.2f} GiB of a study that this store does not have any more"
        yield Finding("left over", "note", found, "ris-hpo clean")
    for frozen in store.get_all_studies():
        study_id = store.get_study_id_from_name(frozen.study_name)
        counts = counting.tally(store.get_all_trials(study_id, deepcopy=False))
        found = ", ".join(f"{count} {name}" for name, count in counts.as_dict().items() if count)
        if counts.running:
            yield Finding(f"study {frozen.study_name}", "note", found, "lost trials come back when a worker looks")
        else:
            yield Finding(f"study {frozen.study_name}", "ok", found or "empty")
