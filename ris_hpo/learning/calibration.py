"""Fitting the weights with which a trained network's count head and the refined evidence are combined."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ris_hpo.estimators.counting import mixed
from ris_hpo.estimators.maximum_likelihood import order_evidence
from ris_hpo.learning.inference import InferenceSpec, predict, refinement
from ris_hpo.learning.network import CountMixing, Network, count_weights
from ris_hpo.physics.scene import Scenes

_PENALTIES = 20.0, 2.0  # nats, over all scenes, on squared weights of the standardised context and squared bias changes
_STEPS = 200


def fit_count_mixing(network: Network, scenes: Scenes, spec: InferenceSpec) -> float:
    """Fit the network's :class:`CountMixing` on scenes whose counts are known, and return its cross-entropy in nats.

    The evidence comes from the same refinement as in ``localize``, so that the posterior of the count is calibrated for
    its results. Nothing is drawn at random.

    Args:
        network: trained, with the count head ``evidence``; its buffers are changed in place.
        scenes: with truth, like those that the network will be used on, and not used in training or validation.
        spec: settings of the refinement.
    """
    mixing = network.heads["mixing"]
    assert isinstance(mixing, CountMixing)
    outputs = predict(network, scenes)
    scores = order_evidence(*refinement(network, scenes, spec, outputs), outputs.log_count)
    scores[:, 0] = torch.inf  # whether there is any source is for the evidence alone
    context = torch.cat([network.features(scenes[i : i + 64]).context for i in range(0, len(scenes), 64)])
    count, log_prior = scenes.require_truth().num_sources, outputs.log_count.double()
    tried = (
        scores.gather(1, count.unsqueeze(-1)).squeeze(-1).isfinite()
    )  # without evidence of the true count there is nothing to fit
    shift, scale = context.mean(0), 1 / context.std(0).clamp(min=1e-3)
    standard = ((context - shift) * scale)[tried].double()
    scores, count, log_prior = scores[tried], count[tried], log_prior[tried]

    weight = torch.zeros_like(mixing.get_buffer("weight"), dtype=torch.float64).requires_grad_()
    constants = mixing.get_buffer("bias").double().clone()
    bias = constants.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def nats() -> Tensor:
        return F.cross_entropy(mixed(scores, log_prior, count_weights(F.linear(standard, weight, bias))), count)

    def closure() -> float:
        optimizer.zero_grad()
        penalty = _PENALTIES[0] * weight.square().sum() + _PENALTIES[1] * (bias - constants).square().sum()
        loss = nats() + penalty / len(count)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    with torch.no_grad():
        slope = weight * scale
        mixing.get_buffer("weight").copy_(slope)
        mixing.get_buffer("bias").copy_(bias - slope @ shift.double())
        return float(nats())
