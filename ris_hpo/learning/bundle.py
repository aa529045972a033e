"""Inference bundles: a trained network in a folder, which locates sources without the training code.

    bundle.json          specifications, provenance, and the SHA-256 of the other two files
    weights.safetensors  the network's weights
    network.pt2          the learned part as a ``torch.export`` program with a dynamic batch, weights included

The fixed part of the front-end and everything after the network (refinement, evidence, count) are the functions that
``localize`` uses, so a bundle gives the same sources as the checkpoint it was made from. A ``.pt2`` program is code:
load only bundles from sources that you trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from ris_hpo.atomic import new_folder, replacing
from ris_hpo.config import SCHEMA, SCHEMA_KEY, migrated
from ris_hpo.errors import CheckpointError, ConfigError, reading
from ris_hpo.learning.inference import InferenceSpec, localize
from ris_hpo.learning.network import Network, Outputs
from ris_hpo.learning.settings import NetworkSettings
from ris_hpo.learning.weights import load_weights
from ris_hpo.physics.scene import Scenes, SceneSpec, simulate
from ris_hpo.physics.sources import Sources

FORMAT: Final = "ris-hpo bundle 1"
MANIFEST, WEIGHTS, PROGRAM = "bundle.json", "weights.safetensors", "network.pt2"

_FIELDS: Final = 11  # the first ones of Outputs; the dense maps that follow are for training
_LARGEST_BATCH: Final = 65_536


class Manifest(NetworkSettings):
    """What ``bundle.json`` says."""

    format: Literal["ris-hpo bundle 1"] = FORMAT
    torch: str
    digests: dict[str, str]
    provenance: dict[str, Any] = Field(default_factory=dict)


class Bundle:
    """A loaded network, for every function that takes a :class:`Network` and only computes its outputs."""

    def __init__(self, manifest: Manifest, call: Any) -> None:
        self.manifest = manifest
        self.spec, self.inference, self.scene = manifest.network, manifest.inference, manifest.scene
        self.training = False
        self._call = call

    def features(self, scenes: Scenes) -> Any:
        """Fixed part of the front-end, as :meth:`Network.features`."""
        return Network.features(cast(Network, self), scenes)

    def __call__(self, *features: Tensor) -> Outputs:
        """The learned part."""
        with torch.no_grad():
            return Outputs(*self._call(*features)[:_FIELDS])

    def train(self, mode: bool = True) -> Bundle:
        """Do nothing: a bundle is always in evaluation mode."""
        return self

    def eval(self) -> Bundle:
        """Do nothing, as :meth:`train`."""
        return self

    def localize(self, scenes: Scenes, *, num_sources: Tensor | None = None) -> Sources:
        """Sources of every scene by the ``pipeline`` path, as the command ``localize`` finds them."""
        return localize(cast(Network, self), scenes, self.inference, num_sources=num_sources)


def save_bundle(
    path: Path,
    network: Network,
    inference: InferenceSpec,
    scene: SceneSpec,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a bundle; after an error nothing is left behind.

    Args:
        path: a folder that does not exist yet.
        network: trained; moved to the CPU.
        inference: settings from outputs to sources.
        scene: the kind of scenes it was trained on.
        provenance: JSON types that go into the manifest as they are.

    Raises:
        OutputError: the path exists already, or cannot be written.
    """
    with new_folder(path) as partial:
        network = network.cpu().eval()
        with replacing(partial / WEIGHTS) as weights:
            save_file({name: value.contiguous() for name, value in network.state_dict().items()}, weights)
        torch.export.save(_program(network, scene), partial / PROGRAM)
        manifest = {
            "format": FORMAT,
            SCHEMA_KEY: SCHEMA,
            "network": network.spec.model_dump(mode="json"),
            "inference": inference.model_dump(mode="json"),
            "scene": scene.model_dump(mode="json"),
            "torch": str(torch.__version__),
            "digests": {name: _digest(partial / name) for name in (WEIGHTS, PROGRAM)},
            "provenance": dict(provenance or {}),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle."""
    return (path / MANIFEST).is_file()


def load_bundle(path: Path, *, device: str = "cpu", form: Literal["program", "weights"] = "program") -> Bundle:
    """Read a bundle.

    Args:
        path: its folder.
        device: where to compute.
        form: run the exported program, or build the network from this package's code and load the weights, which
            also works with a torch that cannot read the program.

    Raises:
        CheckpointError: not a bundle, damaged, or of another format.
    """
    try:
        tree = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no bundle there ({MANIFEST} is missing)") from None
    except OSError as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not valid JSON ({error})") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: not a bundle of format {FORMAT!r}")
    try:
        settings = ("network", "inference", "scene")
        stored = {name: tree[name] for name in (SCHEMA_KEY, *settings) if name in tree}
        current = migrated(stored, "training", str(path / MANIFEST))
        rest = {name: value for name, value in tree.items() if name not in stored}
        found = {name: current[name] for name in settings if name in stored}
        manifest = Manifest.parse(rest | found, str(path / MANIFEST))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    for name in (WEIGHTS, PROGRAM):
        file = path / name
        with reading(file, CheckpointError):
            digest = _digest(file)
        if digest != manifest.digests.get(name):
            raise CheckpointError(f"{file}: contents do not match their digest; the file is damaged, make it again")
    if form == "weights":
        network = Network(manifest.network)
        try:
            weights = load_file(path / WEIGHTS)
        except SafetensorError as error:
            raise CheckpointError(f"{path / WEIGHTS}: cannot be read ({error})") from None
        load_weights(network, weights, str(path / WEIGHTS))
        return Bundle(manifest, network.to(device).eval())
    program = torch.export.load(path / PROGRAM)
    return Bundle(manifest, (program if device == "cpu" else move_to_device_pass(program, device)).module())


class _LearnedPart(nn.Module):
    """The network as a function of tensors, without the dense maps, which only training uses."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, maps: Tensor, relief: Tensor, tokens: Tensor, context: Tensor) -> tuple[Tensor | None, ...]:
        outputs: Outputs = self.network(maps, relief, tokens, context)
        return outputs[:_FIELDS]


def _program(network: Network, scene: SceneSpec) -> torch.export.ExportedProgram:
    example = network.features(simulate(scene, 0, range(3)))
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    shapes = {name: {0: batch} for name in example._fields}
    with torch.no_grad():
        return torch.export.export(_LearnedPart(network).eval(), tuple(example), dynamic_shapes=shapes)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
