"""The fit of the count mixing, on evidence made from a mixing that is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ris_hpo.estimators.counting import mixed
from ris_hpo.estimators.maximum_likelihood import order_evidence
from ris_hpo.learning import calibration
from ris_hpo.learning.calibration import fit_count_mixing
from ris_hpo.learning.inference import InferenceSpec, predict, refinement
from ris_hpo.learning.network import Network, NetworkSpec, count_weights
from ris_hpo.physics.scene import SceneSpec, simulate

SCENES = 4000


@pytest.fixture
def made(monkeypatch):
    """A network whose parts are replaced by draws: context, evidence and head, and counts drawn from their mixture."""
    generator = torch.Generator().manual_seed(3)
    network = Network(NetworkSpec(width=16, depth=1, heads=2, residual_passes=0, count_head="evidence"))
    width = network.spec.num_context
    context = 2 + 3 * torch.randn(SCENES, width, generator=generator)
    scores = (20 * torch.rand(SCENES, 6, generator=generator)).double()
    scores[:, 0] = math.inf  # whether there is any source at all is not fitted
    log_count = torch.log_softmax(2 * torch.randn(SCENES, 6, generator=generator), -1)
    raw = torch.zeros(SCENES, 9)
    raw[:, 0] = -0.5 + 0.2 * context[:, 0]  # the evidence counts for more where the first number is high
    raw[:, 1] = 2.0
    raw[:, 2] = 0.3
    raw[:, 3 + 1] = 1.5  # one source is likelier than either says
    posterior = mixed(scores, log_count.double(), count_weights(raw)).softmax(-1)
    counts = torch.multinomial(posterior, 1, generator=generator).squeeze(-1)
    mask = torch.arange(5) < counts.unsqueeze(-1)
    scenes = simulate(SceneSpec(), 1, torch.zeros(SCENES, dtype=torch.int64))
    scenes.truth.mask.copy_(mask)
    at = iter(range(0, SCENES, 64))
    monkeypatch.setattr(network, "features", lambda part: SimpleNamespace(context=context[next(at) :][: len(part)]))
    monkeypatch.setattr(calibration, "predict", lambda *_: SimpleNamespace(log_count=log_count))
    monkeypatch.setattr(calibration, "refinement", lambda *_: (None, None, None))
    monkeypatch.setattr(calibration, "order_evidence", lambda *_: scores)
    return network, scenes, (scores, log_count.double(), counts, context, raw)


def test_the_fit_finds_the_mixing_that_the_counts_were_drawn_from(made):
    network, scenes, (scores, log_count, counts, context, raw) = made
    mixing = network.heads["mixing"]

    def nats(weights):
        return float(F.cross_entropy(mixed(scores, log_count, count_weights(weights)), counts))

    unfitted, best = nats(mixing(context)), nats(raw)
    found = fit_count_mixing(network, scenes, InferenceSpec())
    fitted = nats(mixing(context))
    assert found == pytest.approx(fitted, abs=1e-4)  # in the context's own units, not the standardised ones
    assert unfitted > best + 0.05
    assert fitted < best + 0.005
    assert not any(value.requires_grad for value in network.heads["mixing"].buffers())
    assert torch.allclose(mixing(context)[:, 0].exp(), raw[:, 0].exp(), rtol=0.5, atol=0.2)


def test_scenes_whose_count_was_not_tried_are_left_out(made):
    network, scenes, (scores, _, counts, _, _) = made
    lost = torch.arange(SCENES) % 2 == 0
    scores[lost, counts[lost]] = math.inf
    assert math.isfinite(fit_count_mixing(network, scenes, InferenceSpec()))


def test_fitted_mixing_counts_better_than_either_part():
    """Cross-entropy of the count on scenes not fitted on: below that of each part, and of the weights at the start."""
    torch.manual_seed(0)
    network = Network(NetworkSpec(width=16, depth=2, heads=2, cell_width=16, residual_passes=1, count_head="evidence"))
    network.eval()
    fitting, held = (simulate(SceneSpec(), seed, range(64)) for seed in (21, 22))
    outputs, truth = predict(network, held), held.truth.num_sources
    prior = outputs.log_count.double()
    scores = order_evidence(*refinement(network, held, InferenceSpec(), outputs), outputs.log_count)
    unfitted = mixed(scores, prior, count_weights(outputs.count_mixing))
    fitted = fit_count_mixing(network, fitting, InferenceSpec())
    posterior = mixed(scores, prior, count_weights(predict(network, held).count_mixing))
    parts = {"both": posterior, "unfitted": unfitted, "evidence": -scores, "head": prior}
    nats = {name: float(F.cross_entropy(logits, truth)) for name, logits in parts.items()}
    assert nats["both"] < min(nats["unfitted"], nats["evidence"], nats["head"]) - 0.05
    assert nats["both"] < fitted + 0.3  # what was learned holds on other scenes
