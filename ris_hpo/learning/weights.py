"""Loading stored weights into a network, with a check that they belong to one of its form."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ris_hpo.errors import CheckpointError
from ris_hpo.learning.network import Network


def load_weights(network: Network, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights and buffers into a network; other tensors among them are ignored.

    Args:
        network: takes them.
        weights: by the names of the network's own state.
        source: where they were read, for the message.

    Raises:
        CheckpointError: one is missing or has another shape.
    """
    own = network.state_dict()
    for name, value in own.items():
        if name not in weights or weights[name].shape != value.shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise CheckpointError(
                f"{source}: '{name}' has {found}, expected {tuple(value.shape)}; a checkpoint of another network"
            )
    network.load_state_dict({name: weights[name] for name in own})
