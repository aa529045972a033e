"""One way from a run to the network that a user gets: fitted at the end, or where it is loaded, to the same values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ris_hpo.errors import CheckpointError
from ris_hpo.learning.inference import localize
from ris_hpo.physics.scene import simulate
from ris_hpo.scoring.metrics import score
from ris_hpo.training import checkpoint
from ris_hpo.training.checkpoint import BEST
from ris_hpo.training.config import RunConfig
from ris_hpo.training.finished import load_network
from ris_hpo.training.trainer import Trainer

from .conftest import TINY

EVIDENCE = RunConfig().replaced(
    TINY | {"network.count_head": "evidence", "budget.calibration_scenes": 64, "budget.pipeline_scenes": 8}
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = Trainer(EVIDENCE, tmp_path_factory.mktemp("run"))
    list(trainer.run())
    return trainer


@pytest.fixture(scope="module", autouse=True)
def unfitted(trained):
    """The best weights as training left them; read before any test fits the count."""
    return checkpoint.read_network(trained.directory / BEST)[0].eval()


def test_every_way_to_the_network_gives_the_fitted_one(trained, unfitted):
    file = trained.directory / BEST
    before = file.read_bytes()
    loaded, config = load_network(trained.directory)
    assert config == EVIDENCE
    assert file.read_bytes() == before  # another process may be training
    mixing = unfitted.heads["mixing"]
    assert not torch.equal(loaded.heads["mixing"].weight, mixing.weight)
    assert not torch.equal(loaded.heads["mixing"].bias, mixing.bias)

    conclusion = trained.conclude()
    kept, _, state = checkpoint.read_network(file)
    assert 0 < state["count_mixing_nats"] < 3
    written = file.read_bytes()
    for network in (kept, trained.finished_network(), load_network(file)[0]):
        for name, value in network.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
    assert file.read_bytes() == written  # once
    scenes = simulate(EVIDENCE.scene, EVIDENCE.budget.validation_seed, range(8))
    assert score(localize(loaded, scenes, EVIDENCE.inference), scenes.truth) == conclusion.pipeline
    assert trained.conclude().pipeline == conclusion.pipeline


def test_the_fit_lowers_the_cross_entropy_of_the_count(trained, unfitted):
    from ris_hpo.estimators.counting import mixed
    from ris_hpo.estimators.maximum_likelihood import order_evidence
    from ris_hpo.learning.inference import predict, refinement
    from ris_hpo.learning.network import count_weights
    from ris_hpo.training.data import calibration_scenes

    scenes, nats = calibration_scenes(EVIDENCE), []
    count = scenes.truth.num_sources
    for network in (unfitted, load_network(trained.directory)[0]):
        outputs = predict(network, scenes)
        scores = order_evidence(*refinement(network, scenes, EVIDENCE.inference, outputs), outputs.log_count)
        tried = scores.gather(1, count[:, None]).squeeze(1).isfinite()
        logits = mixed(scores, outputs.log_count.double(), count_weights(outputs.count_mixing))
        nats.append(float(F.cross_entropy(logits[tried], count[tried])))
    assert nats[1] < nats[0] - 0.05


def test_there_is_no_network_before_the_first_validation(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Trainer(tiny, tmp_path).finished_network()
