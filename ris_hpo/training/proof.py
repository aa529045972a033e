"""Phase 0: a network of one form must memorise a few scenes before studies of that form run.

The loss is the NMSE of R_pred alone, with beta 0 and without weight decay, dropout, averaged weights or mixed
precision; the training set is the validation set. The proof passes at NMSE <= 0.1, after self-tests of the labels, the
loss and the gradients. Its certificate holds for one version of the code and one form of the network.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_hpo.atomic import make_folder, write_text
from ris_hpo.config import fingerprint
from ris_hpo.errors import ProofError
from ris_hpo.learning.hybrid import Covariances, covariances
from ris_hpo.learning.losses import LossSpec, label_factor, loss_terms, nmse
from ris_hpo.learning.network import Network
from ris_hpo.training.config import RunConfig
from ris_hpo.training.data import CHUNK, training_scenes
from ris_hpo.training.stability import movement
from ris_hpo.training.trainer import Trainer

LEARNING_CODE = ("physics", "estimators", "scoring", "learning", "training")
PASSING_NMSE = 0.1
FULL_SCENES, SMALL_SCENES = 512, 16


@dataclass(frozen=True)
class Certificate:
    """The record of a proof that passed.

    Attributes:
        code: fingerprint of the package's learning code.
        form: fingerprint of the network's form and of the scenes' geometry.
        scenes: how many were memorised.
        nmse: of the memorised scenes.
        epochs: passes over the scenes until then.
        seconds: the proof took.
        checks: figure of each self-test.
        parameters: of the backbone and of the heads.
        device: that it ran on.
        torch: its version.
        machine: processor architecture.
    """

    code: str
    form: str
    scenes: int
    nmse: float
    epochs: int
    seconds: float
    checks: dict[str, float]
    parameters: dict[str, int]
    device: str
    torch: str
    machine: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def code_fingerprint(rooms: Sequence[str] = LEARNING_CODE) -> str:
    """Sixteen hexadecimal digits over the source of the package's sub-packages ``rooms``."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for room in rooms:
        for file in sorted((root / room).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def form_fingerprint(config: RunConfig) -> str:
    """Fingerprint of what a proof holds for: the network's form and the scenes' geometry, whatever its sizes."""
    network = config.network.model_dump(mode="json")
    form = {name: network[name] for name in ("front_end", "covariance_head", "factor_basis", "count_head")}
    scene = config.scene
    geometry = scene.geometry.model_dump(mode="json", exclude_none=True)  # as before elements could be listed
    return fingerprint(form | {"geometry": geometry, "antennas": scene.num_antennas})


def proof_config(config: RunConfig, scenes: int, epochs: int) -> RunConfig:
    """The configuration of a proof: whatever could hide that the network does not learn is switched off."""
    loss = LossSpec().only(covariance_pred=1.0)
    plain = RunConfig(seed=config.seed, scene=config.scene, network=config.network, loss=loss)
    fewest, most = config.scene.num_sources
    return plain.replaced(
        {
            "scene.num_sources": (max(1, fewest), most),  # a scene without a source has no covariance to memorise
            "inference.hybrid.beta": 0.0,
            "inference.hybrid.shrinkage": 0.0,
            "optimizer.weight_decay": 0.0,
            "optimizer.ema_decay": 0.0,
            "optimizer.precision": "fp32",
            "optimizer.batch_size": max(1, min(32, scenes // 4)),
            "optimizer.learning_rate": 2e-3 if config.network.front_end == "spectra" else 1e-3,
            "network.dropout": 0.0,
            "budget.scenes": epochs * scenes,
            "budget.validate_every": scenes * min(10, epochs),
            "budget.fixed_scenes": scenes,
            "budget.pipeline_scenes": 0,
        }
    )


def small_form(config: RunConfig) -> RunConfig:
    """The same form at a size that memorises a few scenes in seconds."""
    sizes = {"width": 32, "depth": 2, "heads": 4, "candidates": 32, "covariance_atoms": 16}
    if config.network.front_end == "spectra":
        sizes |= {"residual_passes": 1, "cell_width": 16}
    return config.replaced({f"network.{name}": value for name, value in sizes.items()})


def self_tests(config: RunConfig, loss: LossSpec) -> dict[str, float]:
    """Checks that need no training.

    Args:
        config: of the proof.
        loss: the weights that the form will be trained with; with them every parameter must get a gradient.

    Raises:
        ProofError: naming the check, its figure and what was expected.
    """
    scenes = training_scenes(config, range(16))
    label = label_factor(scenes.require_truth(), config.scene.geometry)
    covariance = label @ label.mH
    torch.manual_seed(config.seed)
    network = Network(config.network)
    features = network.features(scenes)
    silent = {name for name, p in network.named_parameters() if p.requires_grad}
    untrained, trace = 1.0, torch.zeros(())
    for step in range(3):  # a layer that starts at zero passes no gradient on before the first step
        network.zero_grad()
        outputs = network(*features)
        predicted = covariances(outputs, scenes, config.inference.hybrid, 0.0).predicted
        error = nmse(predicted, covariance).mean()
        terms = loss_terms(loss, network, outputs, Covariances(predicted, predicted), scenes)
        torch.stack([error, *terms.values()]).sum().backward()
        silent &= set(_without_gradient(network))
        if step == 0:
            untrained = float(error.detach())
            trace = predicted.detach().diagonal(dim1=-2, dim2=-1).real.sum(-1)
        with torch.no_grad():
            for p in network.parameters():
                if p.grad is not None:
                    p.sub_(1e-3 * p.grad)
    without = sorted(silent)
    if without:
        raise ProofError(f"{len(without)} trained parameters get no gradient, first: {without[0]}")
    checks = {
        "nmse_of_truth": float(nmse(covariance, covariance).max()),
        "nmse_of_zero": float(nmse(torch.zeros_like(covariance), covariance).mean()),
        "oracle_loss": float(nmse(_oracle(label), covariance).max()),
        "trace_over_elements": float(trace.mean()) / config.scene.geometry.num_elements,
        "untrained_nmse": untrained,
        "parameters_without_gradient": float(len(without)),
    }
    expected = {"nmse_of_truth": 0.0, "nmse_of_zero": 1.0, "oracle_loss": 0.0, "trace_over_elements": 1.0}
    for name, target in expected.items():
        if not abs(checks[name] - target) < 1e-5:
            raise ProofError(f"self-test '{name}': found {checks[name]:.3g}, expected {target:g}")
    return checks


def prove(
    config: RunConfig,
    directory: Path,
    *,
    scenes: int = FULL_SCENES,
    epochs: int = 150,
    device: str = "cpu",
    progress: Callable[[int, float], None] = lambda epoch, nmse: None,
) -> Certificate:
    """Memorise ``scenes`` scenes and certify it.

    Args:
        config: the run whose network form is to be proved.
        directory: certificates and the proof run's telemetry go here.
        scenes: number of scenes; 512 for the full form.
        epochs: most passes over them; the proof ends at the first check that passes.
        device: where to train.
        progress: called with (epoch, NMSE) at every check.

    Raises:
        ProofError: a self-test failed (a trained parameter without gradient is one), parameters did not move, or the
            NMSE stayed above 0.1; with the diagnosis.
    """
    plain = proof_config(config, scenes, epochs)
    checks = self_tests(plain, config.loss)
    run = directory / f"proof-{code_fingerprint()}-{form_fingerprint(config)}-{plain.fingerprint()}"
    torch.manual_seed(plain.seed)
    untrained = Network(plain.network)
    trainer = Trainer(plain, run, device=device)
    began = time.monotonic()
    epoch = trainer.scenes_seen // scenes
    figure = memorised_nmse(trainer) if trainer.finished else 1.0  # a finished proof is repeated
    for validation in trainer.run():
        epoch = validation.scenes_seen // scenes
        figure = memorised_nmse(trainer)
        progress(epoch, figure)
        if figure <= PASSING_NMSE:
            break
    weights = ([p.detach().cpu() for p in network.parameters()] for network in (untrained, trainer.network))
    moved = float(movement(*weights))
    checks["movement"] = moved
    if not moved > 0:
        raise ProofError(f"no parameter moved in {epoch} epochs; {trainer.diagnosis()}")
    if figure > PASSING_NMSE:
        raise ProofError(f"NMSE {figure:.3f} after {epoch} epochs, expected <= {PASSING_NMSE}; {trainer.diagnosis()}")
    certificate = Certificate(
        code=code_fingerprint(),
        form=form_fingerprint(config),
        scenes=scenes,
        nmse=figure,
        epochs=epoch,
        seconds=time.monotonic() - began,
        checks=checks,
        parameters=trainer.network.parameter_counts(),
        device=device,
        torch=torch.__version__,
        machine=platform.machine(),
    )
    path = certificate_path(directory, config)
    write_text(make_folder(directory) / path.name, json.dumps(certificate.as_dict(), indent=2) + "\n")
    return certificate


@torch.no_grad()
def memorised_nmse(trainer: Trainer) -> float:
    """Mean NMSE of R_pred on the validation set with the evaluation weights."""
    scenes, features, _ = trainer.data.frozen()
    config, total = trainer.config, 0.0
    with trainer.learner.evaluation_weights() as network:
        for start, part in zip(range(0, len(scenes), CHUNK), features, strict=True):
            few = scenes[start : start + CHUNK]
            label = label_factor(few.require_truth(), config.scene.geometry)
            predicted = covariances(network(*part), few, config.inference.hybrid, 0.0).predicted
            total += float(nmse(predicted, label @ label.mH).sum())
    return total / len(scenes)


def certificate_path(directory: Path, config: RunConfig) -> Path:
    """Path of the certificate for this code and form."""
    return directory / f"certificate-{code_fingerprint()}-{form_fingerprint(config)}.json"


def find_certificate(directory: Path, config: RunConfig) -> Certificate | None:
    """A valid certificate for this code and form, or None."""
    path = certificate_path(directory, config)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Certificate(**values)
    except (OSError, ValueError, TypeError):  # none, or not whole
        return None


def _oracle(label: Tensor) -> Tensor:
    """R from the true factor, computed as a prediction is."""
    return (label / 2) @ (label / 2).mH * 4


def _without_gradient(network: Network) -> list[str]:
    def silent(gradient: Tensor | None) -> bool:
        return gradient is None or not bool((gradient != 0).any())

    return [name for name, p in network.named_parameters() if p.requires_grad and silent(p.grad)]
