"""The schedule without a horizon: branches that decay toward each rung, a trunk that goes on as if there were none."""

from __future__ import annotations

import itertools

import pytest
import torch

from ris_hpo.errors import ConfigError
from ris_hpo.training import telemetry
from ris_hpo.training.config import RunConfig
from ris_hpo.training.operations import _counted, operations_per_scene
from ris_hpo.training.trainer import Trainer

from .conftest import TINY
from .test_step import events, run

# a branch begins after 24 of 32 scenes and after 48 of 64: whole steps of 8
WSD = {
    "optimizer.schedule": "wsd",
    "optimizer.decay_share": 0.25,
    "optimizer.warmup": 0.0,
    "optimizer.warmup_floor": 1.0,
    "budget.scenes": 64,
    "budget.validate_every": 16,
    "budget.validation_scenes": 4,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with a rung at 32 scenes, without one, and planned to end there."""
    config = RunConfig().replaced(TINY | WSD)
    changes = {"rung": {"budget.rungs": [32]}, "none": {}, "planned": {"budget.scenes": 32}}
    folders = {name: tmp_path_factory.mktemp(name) for name in changes}
    return {name: (run(config.replaced(changes[name]), folders[name]), folders[name]) for name in changes}


def curve(trainer):
    return {validation.scenes_seen: validation.network for validation in trainer.history}


def test_the_score_at_a_rung_is_that_of_a_run_planned_to_end_there(runs):
    whole, planned = curve(runs["rung"][0]), curve(runs["planned"][0])
    assert list(whole) == [16, 32, 48, 64]
    assert {step: whole[step] for step in planned} == planned


def test_the_trunk_goes_on_as_if_there_had_been_no_branch(runs):
    one, other = curve(runs["rung"][0]), curve(runs["none"][0])
    assert one[32] != other[32]
    assert (one[48], one[64]) == (other[48], other[64])


def test_the_rate_falls_in_branches_alone(runs):
    steps = events(runs["rung"][1], telemetry.STEP)
    rates = [(step["scenes_seen"], step["rate_heads"]) for step in steps]
    highest = max(rate for _, rate in rates)
    shares = [(scenes, round(rate / highest, 2)) for scenes, rate in rates]
    trunk = [(scenes, 1.0) for scenes in (8, 16, 24, 32, 40, 48)]
    assert shares == [*trunk[:3], (32, 0.02), *trunk[3:], (56, 0.51), (64, 0.02)]


def test_stops_anywhere_change_nothing(tiny, runs, tmp_path):
    config = tiny.replaced(WSD | {"budget.rungs": [32]})
    trainer = Trainer(config, tmp_path)
    while not trainer.finished:
        asked = itertools.count(1)
        trainer = Trainer(config, tmp_path)
        list(trainer.run(lambda asked=asked: next(asked) > 1))  # after each step: on the trunk, in a branch, behind it
    assert curve(trainer) == curve(runs["rung"][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget.rungs": [64, 32]}, "must rise"),
        ({"budget.rungs": [96]}, "within budget.scenes 96"),
        ({"optimizer.schedule": "wsd", "phases": [{"name": "one", "share": 1}]}, "without phases"),
        ({"optimizer.schedule": "wsd", "optimizer.ema_decay": 0.0, "optimizer.swa_start": 0.5}, "use ema_decay"),
    ],
)
def test_what_has_no_meaning_is_refused(changes, message, tiny):
    with pytest.raises(ConfigError, match=message):
        tiny.replaced(changes)


def test_operations_are_counted_alike_and_grow_with_the_network(tiny):
    small = operations_per_scene(tiny)
    assert small == operations_per_scene(tiny.replaced({"optimizer.learning_rate": 0.1, "seed": 5}))
    wide = operations_per_scene(tiny.replaced({"network.width": 32}))
    deep = operations_per_scene(tiny.replaced({"network.depth": 3}))
    assert 1e6 < small < deep
    assert small < wide
    before = torch.get_rng_state()
    _counted.cache_clear()
    assert operations_per_scene(tiny) == small
    assert torch.equal(before, torch.get_rng_state())
