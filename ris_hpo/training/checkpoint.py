"""Checkpoints: one safetensors file with its JSON in the header, written whole or not at all. No pickle.

The header's ``state`` holds everything that is not a tensor; ``digest`` is a SHA-256 over the tensors' bytes and the
state, so that a flipped bit is told from a good file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ris_hpo.atomic import make_folder, replacing
from ris_hpo.errors import CheckpointError, ConfigError, OutputError, reading
from ris_hpo.learning.network import Network
from ris_hpo.learning.weights import load_weights
from ris_hpo.physics.device import find_device
from ris_hpo.training.config import RunConfig

FORMAT = "ris-hpo checkpoint 1"
LAST, BEST = "last.safetensors", "best.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write atomically: a temporary file beside the target, flushed to disk, then renamed over it.

    Raises:
        OutputError: the directory cannot be written; the checkpoint before is still whole.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state, separators=(",", ":"), allow_nan=False)
    header = {"format": FORMAT, "state": text, "digest": _digest(whole, text)}
    make_folder(path.parent)
    with replacing(path, durable=True) as partial:
        try:
            save_file(whole, partial, metadata=header)
        except SafetensorError as error:  # what it makes of a full disk
            raise OutputError(f"{path}: cannot be written ({error})") from None


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify.

    Raises:
        CheckpointError: missing, unreadable, of another format, truncated or altered.
    """
    with reading(path, CheckpointError):
        path.open("rb").close()  # safetensors takes every file that it cannot open for a missing one
    try:
        with safe_open(str(path), framework="pt") as stream:
            header = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: found format {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("digest") != _digest(tensors, header.get("state", "")):
        raise CheckpointError(f"{path}: contents do not match their digest; the file is damaged, use an older one")
    try:
        state = json.loads(header.get("state", ""))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: its state is not a JSON object; another program wrote it")
    return tensors, state


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Take up a run from what stands in ``path``; whatever does not fit there is the file's fault.

    Raises:
        CheckpointError: a part of the state is missing, or of another kind or shape.
    """
    try:
        yield
    except (AttributeError, ConfigError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path}: not the state of such a run ({reason}); use another directory") from error


def load_network(path: Path, device: str = "cpu") -> tuple[Network, RunConfig]:
    """Network in evaluation mode and its run configuration, from a run's directory or a weights file.

    Raises:
        CheckpointError: missing, damaged, or weights that do not fit their own configuration.
        DeviceError: the device is not there.
    """
    path = Path(path)
    file = path / BEST if path.is_dir() else path
    tensors, state = read(file)
    if "config" not in state:
        raise CheckpointError(f"{file}: holds no run configuration; not a checkpoint of a network")
    config = RunConfig.from_stored(state["config"], str(file))
    network = Network(config.network)
    weights = {name.removeprefix("network."): value for name, value in tensors.items()}
    load_weights(network, weights, str(file))
    return network.to(find_device(device)).eval(), config


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
