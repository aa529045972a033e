"""Slots, masks, threads, memory of shared GPUs, and the doctor."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from ris_hpo.errors import DeviceError
from ris_hpo.results import doctor
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.trials.failures import is_out_of_memory
from ris_hpo.workers import devices
from ris_hpo.workers.devices import Slot, plan_slots
from ris_hpo.workers.local import LocalProcesses
from tests.postgres import Postgres

from .conftest import IMPORTABLE, id_of, make_spec
from .pools import supervisor_of

GPUS = [("GPU-aaaa", "Big One", 80_000, 70_000), ("GPU-bbbb", "Big One", 80_000, 2_000)]
MIB = 2**20


class Driver:
    """What NVIDIA's library answers on a machine with two GPUs; ``lost`` is one that does not answer any more."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        self.open = 0
        self.lost: int | None = None

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(GPUS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        if handle == self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(total=GPUS[handle][2] * MIB, free=GPUS[handle][3] * MIB)

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return GPUS[handle][0]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return GPUS[handle][1]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(devices, "pynvml", made)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "cores", lambda: 16)
    return made


def test_the_driver_is_asked_and_left_closed(driver: Driver) -> None:
    first, second = devices.gpus()
    assert first == devices.Gpu("0", "GPU-aaaa", "Big One", 80_000 * MIB, 70_000 * MIB)
    assert devices.free_memory("1") == devices.free_memory("GPU-bbbb") == (2_000 * MIB, 80_000 * MIB)
    assert devices.free_memory("7") is None
    driver.lost = 0
    assert devices.gpus() == [second]
    assert driver.open == 0


def test_without_gpus_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", list)
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert plan_slots() == [Slot(0, "cpu", "", 8)]
    assert [slot.threads for slot in plan_slots(3)] == [2, 2, 2]
    assert [slot.threads for slot in plan_slots(12)] == [1] * 12
    assert plan_slots(2, threads=5)[0].threads == 5


@pytest.mark.usefixtures("driver")
def test_gpus_get_one_worker_each_and_then_the_second() -> None:
    assert [(slot.mask, slot.rank) for slot in plan_slots(per_gpu=2)] == [("0", 0), ("1", 0), ("0", 1), ("1", 1)]
    assert [slot.mask for slot in plan_slots(chosen=["1"])] == ["1"]
    assert plan_slots(2, chosen=[])[1] == Slot(1, "cpu", "", 8)
    assert {slot.threads for slot in plan_slots(per_gpu=2)} == {4}


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("mask", "expected"), [("3,5", ["3", "5"]), ("GPU-aaaa", ["GPU-aaaa"]), ("", [""]), ("-1", [""])]
)
def test_the_parents_own_mask_is_kept(mask: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert [slot.mask for slot in plan_slots()] == expected


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chosen": ["2"]}, "no GPU '2': this process sees 2"),
        ({"chosen": ["x"]}, "no GPU 'x'"),
        ({"workers": 5, "chosen": ["0", "1"], "per_gpu": 2}, "5 workers do not fit on 2 GPUs"),
        ({"workers": 0}, "must be at least 1"),
        ({"per_gpu": 0}, "must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        plan_slots(**options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("driver")
def test_a_second_worker_waits_for_memory(tmp_path: Path) -> None:
    slots = plan_slots(per_gpu=2)
    processes = LocalProcesses(slots, tmp_path)
    free = [slot for slot in slots if processes.has_room(slot, lambda: 0)]
    assert [(slot.mask, slot.rank) for slot in free] == [("0", 0), ("1", 0), ("0", 1)]
    assert not processes.has_room(slots[2], lambda: 75 * 1024**3)  # a trial has taken more than is free
    assert processes.has_room(slots[0], lambda: 75 * 1024**3)  # the first on its GPU is let try


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH])
def test_a_driver_that_fails_is_no_gpu(driver: Driver, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(code)

    monkeypatch.setattr(driver, "nvmlDeviceGetCount", fail)
    assert devices.gpus() == []
    assert driver.open == 0
    monkeypatch.setattr(driver, "nvmlInit", fail)
    assert devices.gpus() == []
    assert devices.free_memory("0") is None
    assert plan_slots() == [Slot(0, "cpu", "", 16)]


def test_out_of_memory_is_known_by_its_names() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert is_out_of_memory(OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


# -- doctor ----------------------------------------------------------------------------------------------------------


def findings(url: str | None = None) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine(url)}


def test_the_doctor_looks_at_everything(store: Store) -> None:
    study = create_or_resume_study(store, make_spec(), score_version=1)
    fill_budget(store, study, 3)
    found = findings(store.address)
    assert {"python", "torch", "optuna", "cores", "memory", "gpus", "disk", "store", "schema", "latency"} <= set(found)
    assert found["study unit"].found == "3 waiting"
    assert all(finding.ok for finding in found.values())


def test_the_doctor_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(f"sqlite:///{tmp_path}/none.db")["store"].severity == "note"
    (tmp_path / "notes.db").write_bytes(b"no database at all" * 100)
    store = findings(f"sqlite:///{tmp_path}/notes.db")["store"]
    assert not store.ok
    assert store.advice
    refused = findings("postgresql://me:secret@127.0.0.1:1/db")["store"]
    assert not refused.ok
    assert "secret" not in str(refused)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage())
    assert not findings(f"sqlite:///{tmp_path}/none.db")["disk"].ok


class Usage:
    free = 1000


@pytest.mark.postgres
def test_a_workers_command_line_and_attributes_hold_no_password(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "canary-4711"
    address = postgres.url().replace("postgres:@", f"postgres:{canary}@")  # the server trusts local users anyway
    assert canary in address
    monkeypatch.setenv("PYTHONPATH", IMPORTABLE)
    store = open_store(address)
    study = create_or_resume_study(store, make_spec(), score_version=1, command=f"run --storage {address}")
    fill_budget(store, study, 2)
    lines = set()
    for snapshot in supervisor_of(store, study, tmp_path, 1).run(interval=0.05):
        assert canary not in repr(snapshot)
        for view in snapshot.workers:
            if view.pid is not None:
                with suppress(psutil.Error):
                    lines.add(" ".join(psutil.Process(view.pid).cmdline()))
    assert lines
    assert not any(canary in line for line in lines)
    assert canary not in repr(store.get_all_studies())
    assert canary not in repr(store.get_all_trials(id_of(store, study)))
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or canary.encode() not in file.read_bytes()
    assert "***" in study.user_attrs[names.COMMAND]
    store.close()
