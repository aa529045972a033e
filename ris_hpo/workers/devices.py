"""Slots: which device, mask and thread count each worker gets, without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from ris_hpo.errors import DeviceError

_MIB = 1024 * 1024


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
    """Where one worker runs. ``mask`` is its ``CUDA_VISIBLE_DEVICES``; ``rank`` counts the slots that share its GPU."""

    index: int
    device: str
    mask: str
    threads: int
    rank: int = 0


def cores() -> int:
    """Return the cores this process may use."""
    affinity = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    return len(affinity) if affinity else os.cpu_count() or 1


def gpus() -> list[Gpu]:
    """Return the GPUs the driver knows; none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=index,uuid,name,memory.total,memory.free"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    found: list[Gpu] = []
    for line in done.stdout.splitlines():
        index, uuid, name, total, free = (part.strip() for part in line.split(","))
        if total.isdigit() and free.isdigit():
            found.append(Gpu(index, uuid, name, int(total) * _MIB, int(free) * _MIB))
    return found


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, in the words of its own ``CUDA_VISIBLE_DEVICES`` where it has one."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is not None:
        return [part.strip() for part in mask.split(",") if part.strip() and part.strip() != "-1"]
    return [gpu.index for gpu in gpus()]


def plan_slots(
    workers: int | None = None, chosen: Sequence[str] | None = None, per_gpu: int = 1, threads: int | None = None
) -> list[Slot]:
    """Lay out one slot per worker.

    Args:
        workers: number of workers; by default one per GPU place, or one on a CPU.
        chosen: GPUs to use, counted within this process's own mask; None for all there are, empty for the CPU.
        per_gpu: workers that share a GPU.
        threads: torch threads per worker; by default the cores divided by the workers.

    Raises:
        DeviceError: a GPU that is not there, or fewer places than workers.
    """
    if per_gpu < 1 or (workers is not None and workers < 1):
        raise DeviceError("workers and workers per GPU count from 1")
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
