"""Where to compute."""

from __future__ import annotations

import torch

from ris_hpo.errors import DeviceError


def find_device(name: str) -> torch.device:
    """The device of that name, such as ``cpu``, ``cuda:1``, ``mps``.

    Raises:
        DeviceError: not a device, or not on this machine.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DeviceError(f"device '{name}' cannot be used: {reason}") from None
    return device
