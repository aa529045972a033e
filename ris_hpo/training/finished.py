"""From a run's weights to the network that a user gets: the one way, for trials, ``best``, ``export`` and ``localize``.

The best weights alone are not that network where its count head is ``evidence``: how the head and the refined evidence
are weighed is fitted to them after training (:mod:`ris_hpo.learning.calibration`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ris_hpo.errors import CheckpointError
from ris_hpo.learning.calibration import fit_count_mixing
from ris_hpo.learning.network import Network
from ris_hpo.physics.device import find_device
from ris_hpo.physics.scene import Scenes
from ris_hpo.training import checkpoint
from ris_hpo.training.checkpoint import BEST
from ris_hpo.training.config import RunConfig
from ris_hpo.training.data import calibration_scenes

FITTED = "count_mixing_nats"  # in a checkpoint's state: cross-entropy of the fitted count


def load_network(path: Path, device: str = "cpu") -> tuple[Network, RunConfig]:
    """Network ready for use, in evaluation mode, and its run configuration.

    What has not been fitted to the weights yet is fitted here, to the same values as at the end of the run; the file
    is left as it is.

    Args:
        path: a run's directory or a weights file.
        device: where the network goes.

    Raises:
        CheckpointError: missing, damaged, weights that do not fit their own configuration, or a run on a user's own
            scenes that has not ended and whose count head needs them.
        DeviceError: the device is not there.
    """
    path = Path(path)
    file = path / BEST if path.is_dir() else path
    network, config, state = checkpoint.read_network(file)
    network = network.to(find_device(device)).eval()
    if _unfitted(config, state):
        with checkpoint.restoring(file):
            own = state["data"]
        if own is not None:
            raise CheckpointError(
                f"{file}: the count head 'evidence' is fitted on the run's own scenes at its end; finish the run first"
            )
        fit_count_mixing(network, calibration_scenes(config, device), config.inference)
    return network, config


def finish(directory: Path, device: torch.device, calibration: Callable[[], Scenes | None]) -> Network:
    """Fit what is fitted after training to a run's best weights, once, and keep it in their file.

    For the process that owns the run; others use :func:`load_network`.

    Args:
        directory: of the run.
        device: where the network goes.
        calibration: gives scenes that were neither trained nor validated on, where they are needed.

    Raises:
        CheckpointError: there are no best weights, or they are damaged.
    """
    file = directory / BEST
    network, config, state = checkpoint.read_network(file)
    network = network.to(device).eval()
    if _unfitted(config, state):
        scenes = calibration()
        if scenes is None:
            raise CheckpointError(f"{file}: no scenes to fit the count head 'evidence' on")
        nats = fit_count_mixing(network, scenes, config.inference)
        checkpoint.write(file, network.state_dict(), {**state, FITTED: nats})
    return network


def _unfitted(config: RunConfig, state: dict[str, object]) -> bool:
    return config.network.count_head == "evidence" and FITTED not in state
