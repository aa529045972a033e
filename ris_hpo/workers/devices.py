"""Slots: which device, mask and thread count each worker gets, without importing torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
import pynvml

from ris_hpo.errors import DeviceError


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver reports it; memory in bytes."""

    index: str
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Slot:
    """Where one worker runs.

    Attributes:
        index: number of the slot within its run.
        device: torch device, as the worker sees it.
        mask: the worker's ``CUDA_VISIBLE_DEVICES``; None leaves what its surroundings have.
        threads: torch threads; None leaves torch's choice.
        rank: how many slots before this one share its GPU.
    """

    index: int
    device: str
    mask: str | None
    threads: int | None
    rank: int = 0


def cores() -> int:
    """Return the cores this process may use."""
    affinity = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    return len(affinity) if affinity else os.cpu_count() or 1


def gpus() -> list[Gpu]:
    """Return the GPUs that the NVIDIA driver reports; none where there is no driver, and none that is lost."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or one that does not fit its library
        return []
    found: list[Gpu] = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # a GPU that fell off the bus, or one that may not be asked
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
                found.append(Gpu(str(index), uuid, name, int(memory.total), int(memory.free)))
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
    return found


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, named as in its own ``CUDA_VISIBLE_DEVICES`` where it has one."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is not None:
        return [part.strip() for part in mask.split(",") if part.strip() and part.strip() != "-1"]
    return [gpu.index for gpu in gpus()]


def plan_slots(
    workers: int | None = None, chosen: Sequence[str] | None = None, per_gpu: int = 1, threads: int | None = None
) -> list[Slot]:
    """Plan one slot per worker.

    Args:
        workers: number of workers; by default ``per_gpu`` for each GPU, or one on the CPU.
        chosen: GPUs to use, counted within this process's own mask; None for all there are, empty for the CPU.
        per_gpu: workers that share a GPU.
        threads: torch threads per worker; by default the cores divided by the workers.

    Raises:
        DeviceError: a GPU that is not there, or more workers than the chosen GPUs take.
    """
    if per_gpu < 1 or (workers is not None and workers < 1):
        raise DeviceError("the number of workers and of workers per GPU must be at least 1")
    visible = visible_gpus()
    if chosen is None:
        names = visible
    else:
        names = []
        for choice in chosen:
            if not choice.isdigit() or int(choice) >= len(visible):
                raise DeviceError(f"no GPU '{choice}': this process sees {len(visible)} of them")
            names.append(visible[int(choice)])
    if names and workers is not None and workers > per_gpu * len(names) and chosen is not None:
        raise DeviceError(
            f"{workers} workers do not fit on {len(names)} GPUs with {per_gpu} each; raise --per-gpu or lower --workers"
        )
    places = [(name, rank) for rank in range(per_gpu) for name in names]
    count = workers or len(places) or 1
    share = threads or max(1, cores() // count)
    slots = []
    for index in range(count):
        if index < len(places):
            name, rank = places[index]
            slots.append(Slot(index, "cuda", name, share, rank))
        else:
            slots.append(Slot(index, "cpu", "", share))
    return slots


def free_memory(mask: str) -> tuple[int, int] | None:
    """Return free and total bytes of the GPU named by a mask; None where the driver does not say."""
    for gpu in gpus():
        if mask in (gpu.index, gpu.uuid):
            return gpu.free_bytes, gpu.total_bytes
    return None
