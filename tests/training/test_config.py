"""A run configuration as it is written: whatever a file leaves out stays as its owner has it."""

import pytest

from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError
from ris_hpo.training.config import BalanceSpec, BudgetSpec, DataSpec, PhaseSpec, RunConfig
from ris_hpo.training.stability import OptimizerSpec

LITTLE = 1e-9
LIMITS: list[tuple[Spec, dict[str, tuple[list[float], list[float]]]]] = [  # accepted, refused
    (RunConfig(), {"seed": ([0, 2**63 - 1], [-1, 2**63])}),
    (
        BudgetSpec(),
        {
            **dict.fromkeys(("scenes", "validate_every", "validation_scenes"), ([1], [0])),
            **dict.fromkeys(("pipeline_scenes", "validation_seed", "patience", "fixed_scenes"), ([0], [-1])),
            "calibration_scenes": ([64], [63]),
        },
    ),
    (DataSpec(), dict.fromkeys(("simulated_share", "simulated_first"), ([0, 1 - LITTLE], [-LITTLE, 1]))),
    (BalanceSpec(), {"rate": ([LITTLE, 1], [0, 1 + LITTLE]), "asymmetry": ([0, 5], [-LITTLE, 5 + LITTLE])}),
    (
        PhaseSpec(name="a", share=0.5),
        {
            "share": ([LITTLE, 1], [0, 1 + LITTLE]),
            "ramp_share": ([0.05, 0.15], [0.05 - LITTLE, 0.15 + LITTLE]),
            "beta": ([0, 0.9], [-LITTLE, 0.9 + LITTLE]),
            "backbone_rate": ([0, 1], [-LITTLE, 1 + LITTLE]),
            "patience": ([0], [-1]),
        },
    ),
    (
        OptimizerSpec(ema_decay=0),
        {
            "learning_rate": ([LITTLE, 1], [0, 1 + LITTLE]),
            "head_multiplier": ([LITTLE, 100], [0, 100 + LITTLE]),
            "weight_decay": ([0, 1], [-LITTLE, 1 + LITTLE]),
            "batch_size": ([1, 65536], [0, 65537]),
            "accumulate": ([1, 1024], [0, 1025]),
            "warmup": ([0, 0.9], [-LITTLE, 0.9 + LITTLE]),
            "warmup_floor": ([LITTLE, 1], [0, 1 + LITTLE]),
            "final_rate": ([0, 1], [-LITTLE, 1 + LITTLE]),
            "clip": ([LITTLE], [0]),
            "ema_decay": ([0, 1 - LITTLE], [-LITTLE, 1]),
            "swa_start": ([0, 1], [-LITTLE, 1 + LITTLE]),
            "skips_allowed": ([1], [0]),
        },
    ),
]


@pytest.mark.parametrize(("spec", "limits"), LIMITS, ids=lambda each: type(each).__name__)
def test_a_setting_is_accepted_up_to_its_limits_and_refused_beyond(
    spec: Spec, limits: dict[str, tuple[list[float], list[float]]]
) -> None:
    for name, (accepted, refused) in limits.items():
        for value in accepted:
            assert getattr(spec.replaced({name: value}), name) == value
        for value in refused:
            with pytest.raises(ConfigError, match=name):
                spec.replaced({name: value})


def test_a_table_with_one_key_leaves_its_neighbours_alone() -> None:
    """`inference.likelihood` has defaults of its own, which a plain LikelihoodSpec has not."""
    written = RunConfig.parse({"inference": {"likelihood": {"search": {"greedy_steps": 7}}}})
    assert written == RunConfig().replaced({"inference.likelihood.search.greedy_steps": 7})
    assert written.inference.likelihood.batch == RunConfig().inference.likelihood.batch


def test_what_is_written_in_full_comes_back() -> None:
    changed = RunConfig().replaced({"inference.likelihood.double": True, "inference.likelihood.batch": 16})
    assert RunConfig.parse(changed.model_dump(mode="json")) == changed
