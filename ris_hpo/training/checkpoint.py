"""Checkpoints: one safetensors file with its JSON in the header, written whole or not at all. No pickle.

The header's ``state`` holds everything that is not a tensor; ``digest`` is a SHA-256 over the tensors' bytes and the
state, so that a flipped bit is told from a good file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ris_hpo.errors import CheckpointError
from ris_hpo.learning.network import Network
from ris_hpo.training.config import RunConfig

FORMAT = "ris-hpo checkpoint 1"
LAST, BEST = "last.safetensors", "best.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write atomically: a temporary file beside the target, flushed to disk, then renamed over it.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state, separators=(",", ":"), allow_nan=False)
    header = {"format": FORMAT, "state": text, "digest": _digest(whole, text)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, temporary, metadata=header)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path}: cannot be written ({error}); free or change the directory") from None


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify.

    Raises:
        CheckpointError: missing, of another format, truncated or altered.
    """
    try:
        with safe_open(str(path), framework="pt") as stream:
            header = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: found format {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("digest") != _digest(tensors, header.get("state", "")):
        raise CheckpointError(f"{path}: contents do not match their digest; the file is damaged, use an older one")
    return tensors, json.loads(header["state"])


def load_network(path: Path, device: str = "cpu") -> tuple[Network, RunConfig]:
    """Network in evaluation mode and its run configuration, from a run's directory or a weights file.

    Raises:
        CheckpointError: missing, damaged, or weights that do not fit their own configuration.
    """
    path = Path(path)
    file = path / BEST if path.is_dir() else path
    tensors, state = read(file)
    config = RunConfig.parse(state["config"], source=str(file))
    network = Network(config.network)
    weights = {name.removeprefix("network."): value for name, value in tensors.items()}
    own = {name: p.shape for name, p in network.named_parameters()}
    misfits = [n for n, shape in own.items() if n not in weights or weights[n].shape != shape]
    if misfits:
        name = misfits[0]
        found = tuple(weights[name].shape) if name in weights else "nothing"
        raise CheckpointError(
            f"{file}: '{name}' has {found}, expected {tuple(own[name])}; a checkpoint of another network"
        )
    network.load_state_dict({name: weights[name] for name in own}, strict=False)
    return network.to(device).eval(), config


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
