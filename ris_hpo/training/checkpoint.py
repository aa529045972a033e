"""Checkpoints: one safetensors file with JSON in its header, written whole or not at all. No pickle.

The header's ``state`` holds everything that is not a tensor; ``digest`` is a SHA-256 over the tensors' bytes and the
state, which a damaged file does not match.
"""

from __future__ import annotations

import dataclasses
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
from ris_hpo.training.config import RunConfig

FORMAT, FIRST_FORMAT = "ris-hpo checkpoint 2", "ris-hpo checkpoint 1"
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
    """Read and verify; a file of the first format is returned as one of today's.

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
    if header.get("format") not in (FORMAT, FIRST_FORMAT):
        raise CheckpointError(f"{path}: found format {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("digest") != _digest(tensors, header.get("state", "")):
        raise CheckpointError(f"{path}: contents do not match their digest; the file is damaged, use an older one")
    try:
        state = json.loads(header.get("state", ""))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: its state is not a JSON object; another program wrote it")
    if header["format"] == FIRST_FORMAT:
        with restoring(path):
            state = _from_first_format(path, state)
    return tensors, state


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Context in which a run is restored from ``path``: what does not fit becomes one line about that file.

    Raises:
        CheckpointError: a part of the state is missing, or of another kind or shape.
    """
    try:
        yield
    except (AttributeError, ConfigError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path}: not the state of such a run ({reason}); use another directory") from error


def read_network(file: Path) -> tuple[Network, RunConfig, dict[str, Any]]:
    """Return the network of a weights file, its run configuration, and the rest of the file's state.

    Raises:
        CheckpointError: missing, damaged, or weights that do not fit their own configuration.
    """
    tensors, state = read(file)
    if "config" not in state:
        raise CheckpointError(f"{file}: holds no run configuration; not a checkpoint of a network")
    config = RunConfig.from_stored(state["config"], str(file))
    network = Network(config.network)
    weights = {name.removeprefix("network."): value for name, value in tensors.items()}
    load_weights(network, weights, str(file))
    return network, config, state


def refuse_another_run(file: Path, state: Mapping[str, Any], config: RunConfig, data: str | None) -> None:
    """Refuse a checkpoint that another run has written.

    Args:
        file: it was read from.
        state: of the checkpoint.
        config: of this run.
        data: fingerprint of the user's scenes that this run trains on, None for simulated ones.

    Raises:
        CheckpointError: another configuration, or other scenes.
    """
    made_for = RunConfig.from_stored(state["config"], str(file))
    if made_for != config:
        theirs, ours = made_for.fingerprint(), config.fingerprint()
        raise CheckpointError(f"{file}: belongs to configuration {theirs}, not {ours}; use another directory")
    if state["data"] != data:
        found, given = (
            f"scenes with fingerprint {mark}" if mark else "simulated scenes" for mark in (state["data"], data)
        )
        raise CheckpointError(
            f"{file}: was trained on {found}, this run is given {given}; give the same scenes or another directory"
        )


def _from_first_format(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint as today's version writes it.

    The first format had no verdicts, did not name its scenes, and kept the current phase with its start and extensions.

    Raises:
        CheckpointError: a run within phases that would begin and end elsewhere today.
    """
    state = state | {"data": None}
    if "validation" in state:  # best weights
        state["validation"] = state["validation"] | {"verdicts": []}
    if "history" in state:  # a whole run
        index, start, extended = (state.pop(f"phase_{name}") for name in ("index", "start", "extensions"))
        begun = RunConfig.from_stored(state["config"], str(path)).plan()
        extensions = [extended if i == index else 0 for i in range(len(begun.phases))]
        plan = dataclasses.replace(begun, extensions=tuple(extensions))
        if not state["finished"] and (index, start) != (plan.index(state["scenes_seen"]), plan.start(index)):
            raise CheckpointError(
                f"{path}: begun by an earlier version, which planned the phases otherwise; use another directory"
            )
        state["history"] = [validation | {"verdicts": []} for validation in state["history"]]
        state["initial"] = state["initial"] and state["initial"] | {"verdicts": []}
        state |= {"extensions": extensions, "failure": None}
    return state


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
