"""A run on a user's own scenes: everything on them, divided by a seed, checked whole, and known again on a resume."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ris_hpo.errors import CheckpointError, ConfigError
from ris_hpo.learning.calibration import fit_count_mixing
from ris_hpo.physics.scene import simulate
from ris_hpo.scoring.metrics import floor_scores
from ris_hpo.training import checkpoint
from ris_hpo.training.checkpoint import BEST
from ris_hpo.training.data import OwnScenes, fingerprint
from ris_hpo.training.finished import load_network
from ris_hpo.training.trainer import Trainer


@pytest.fixture(scope="module")
def scenes():
    from ris_hpo.training.config import RunConfig

    return simulate(RunConfig().scene, 77, range(40))


def marks(scenes):
    """What tells scenes apart."""
    return sorted(scenes.noise_power.tolist())


def changed(scenes, **fields):
    return dataclasses.replace(scenes, truth=dataclasses.replace(scenes.truth, **fields))


def test_scenes_are_divided_by_the_validation_seed(tiny, scenes):
    own = OwnScenes.divide(tiny, scenes)
    assert (len(own.training), len(own.validation), own.calibration) == (32, 8, None)
    assert marks(own.training) + marks(own.validation) != marks(scenes)
    assert sorted(marks(own.training) + marks(own.validation)) == marks(scenes)
    assert marks(OwnScenes.divide(tiny, scenes).validation) == marks(own.validation)
    assert marks(OwnScenes.divide(tiny.replaced({"seed": 9}), scenes).validation) == marks(own.validation)
    other = OwnScenes.divide(tiny.replaced({"budget.validation_seed": 1}), scenes)
    assert marks(other.validation) != marks(own.validation)
    few = OwnScenes.divide(tiny.replaced({"budget.validation_scenes": 3}), scenes)
    assert (len(few.training), len(few.validation)) == (37, 3)


def test_the_count_is_calibrated_on_scenes_of_its_own(tiny, scenes):
    own = OwnScenes.divide(tiny.replaced({"network.count_head": "evidence"}), scenes)
    assert (len(own.training), len(own.validation), len(own.calibration)) == (24, 8, 8)
    parts = (own.training, own.validation, own.calibration)
    assert sorted(mark for part in parts for mark in marks(part)) == marks(scenes)


def test_validation_scenes_may_be_given_apart(tiny, scenes):
    own = OwnScenes.divide(tiny, scenes[:30], scenes[30:])
    assert (marks(own.training), marks(own.validation)) == (marks(scenes[:30]), marks(scenes[30:]))
    assert not own.divided
    few = OwnScenes.divide(tiny.replaced({"budget.validation_scenes": 4}), scenes[:30], scenes[30:])
    assert marks(few.validation) == marks(scenes[30:34])
    assert len({o.fingerprint for o in (own, OwnScenes.divide(tiny, scenes), OwnScenes.divide(tiny, scenes[:30]))}) == 3


def test_a_fingerprint_is_of_every_value(scenes):
    same = dataclasses.replace(scenes, y=scenes.y.clone())
    assert fingerprint(same) == fingerprint(scenes)
    changes = [scenes[:39], scenes[torch.arange(39, -1, -1)], dataclasses.replace(scenes, symbols=None)]
    for name in ("y", "bs_ris_channel", "ris_codes", "noise_power"):
        value = getattr(scenes, name).clone()
        value[7] *= 1.0001
        changes.append(dataclasses.replace(scenes, **{name: value}))
    changes.append(changed(scenes, range_m=scenes.truth.range_m + 1e-3))
    found = {fingerprint(each) for each in [scenes, *changes]}
    assert len(found) == 1 + len(changes)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: dataclasses.replace(s, truth=None), "carry no truth"),
        (lambda s: s[:0], "no training scenes are given"),
        (lambda s: s[:4], "4 training scenes are too few to hold one in 5 out"),
        (
            lambda s: dataclasses.replace(s, geometry=s.geometry.replaced({"num_horizontal": 16})),
            "of another surface: num_horizontal 16, not 12; set scene.geometry",
        ),
        (
            lambda s: changed(s, mask=s.truth.mask & (torch.arange(40) % 10 != 3)[:, None]),
            r"4 of 40 training scenes hold no source \(the first is scene 3\)",
        ),
        (
            lambda s: changed(s, azimuth=s.truth.azimuth + 1.5 * (torch.arange(40) == 5)[:, None]),
            r"1 of 40 training scenes hold a source outside the searched region \(the first is scene 5\)",
        ),
    ],
)
def test_scenes_that_cannot_be_trained_on_are_refused_whole(tiny, scenes, tmp_path, break_it, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(tiny, tmp_path / "run", scenes=break_it(scenes))
    if "too few" not in message:
        with pytest.raises(ConfigError, match=message.replace("training", "validation")):
            Trainer(tiny, tmp_path / "run", scenes=scenes, validation=break_it(scenes))
    assert not (tmp_path / "run").exists()


def test_more_sources_than_the_network_has_slots_are_refused(tiny, tmp_path):
    scenes = simulate(tiny.scene, 77, range(40))
    spec = {"scene.max_sources": 2, "scene.num_sources": (1, 2), "network.max_sources": 2}
    with pytest.raises(ConfigError, match=r"of 40 training scenes hold more than 2 sources \(the first is scene \d+\)"):
        Trainer(tiny.replaced(spec), tmp_path, scenes=scenes)


def test_padding_beyond_the_slots_is_taken_off(tiny, scenes):
    wide = dataclasses.replace(scenes, truth=scenes.truth.padded(9).take(torch.arange(8, -1, -1).expand(40, 9)))
    wide = dataclasses.replace(wide, symbols=torch.cat([scenes.symbols, torch.zeros(40, 16, 4)], -1).flip(-1))
    own, plain = OwnScenes.divide(tiny, wide), OwnScenes.divide(tiny, scenes)
    assert own.training.truth.max_sources == 5
    mask = own.training.truth.mask
    assert torch.equal(mask.sum(-1), plain.training.truth.mask.sum(-1))
    for scene in range(4):
        found = own.training.truth.azimuth[scene][mask[scene]].sort().values
        expected = plain.training.truth.azimuth[scene][plain.training.truth.mask[scene]].sort().values
        assert torch.equal(found, expected)
    power = own.training.symbols.abs().square().mean(1)
    assert ((power > 0) >= mask).all()


def test_fixed_simulated_scenes_exclude_own_ones(tiny, scenes, tmp_path):
    with pytest.raises(ConfigError, match="fixed_scenes is for simulated scenes"):
        Trainer(tiny.replaced({"budget.fixed_scenes": 8}), tmp_path, scenes=scenes)


def test_validation_scenes_alone_are_refused(tiny, scenes, tmp_path):
    with pytest.raises(ConfigError, match="without scenes to train on"):
        Trainer(tiny, tmp_path, validation=scenes)


def test_own_scenes_are_trained_validated_and_scored_on(tiny, scenes, tmp_path):
    trainer = Trainer(tiny.replaced({"budget.pipeline_scenes": 4}), tmp_path, scenes=scenes)
    assert sorted(trainer.data.epoch(0).tolist()) == list(range(32))
    assert not torch.equal(trainer.data.epoch(0), trainer.data.epoch(1))
    seen = torch.cat([trainer.data.batch(start, 8)[0].noise_power for start in range(0, 32, 8)])
    own = trainer.data.own
    assert sorted(seen.tolist()) == marks(own.training)  # an epoch is every scene once
    batch, features = trainer.data.batch(29, 6)  # over the end of an epoch, from the kept features
    assert torch.equal(features.maps, trainer.network.features(batch).maps)
    list(trainer.run())
    assert trainer.finished
    assert trainer.history[0].floor == floor_scores(own.validation)
    conclusion = trainer.conclude()
    assert conclusion.network.num_scenes == 8
    assert conclusion.pipeline_floor == floor_scores(own.validation[:4])
    again = Trainer(trainer.config, tmp_path / "again", scenes=scenes)
    list(again.run())
    assert [v.network for v in again.history] == [v.network for v in trainer.history]


def test_the_count_of_own_scenes_is_fitted_at_the_end_of_the_run(tiny, scenes, tmp_path):
    config = tiny.replaced({"network.count_head": "evidence", "budget.scenes": 32})
    trainer = Trainer(config, tmp_path, scenes=scenes)
    list(trainer.run())
    with pytest.raises(CheckpointError, match="fitted on the run's own scenes at its end; finish the run first"):
        load_network(tmp_path)
    fitted = trainer.finished_network()
    network, _, state = checkpoint.read_network(tmp_path / BEST)
    plain = Trainer(config, tmp_path / "plain", scenes=scenes)
    list(plain.run())
    expected = checkpoint.read_network(tmp_path / "plain" / BEST)[0].eval()
    assert state["count_mixing_nats"] == fit_count_mixing(expected, trainer.data.own.calibration, config.inference)
    for found in (fitted, network, load_network(tmp_path)[0]):
        assert torch.equal(found.heads["mixing"].bias, expected.heads["mixing"].bias)
    assert (expected.heads["mixing"].weight != 0).any()


@pytest.mark.parametrize("first", [True, False])
def test_a_run_is_resumed_on_its_own_scenes_alone(tiny, scenes, tmp_path, first):
    given = scenes if first else None
    trainer = Trainer(tiny, tmp_path, scenes=given)
    for _ in trainer.run():
        break
    assert Trainer(tiny, tmp_path, scenes=given).scenes_seen == 32
    mark = fingerprint(scenes) if first else "simulated scenes"
    others = [scenes[:39], None] if first else [scenes]
    for other in others:
        with pytest.raises(
            CheckpointError, match=f"was trained on .*{mark}, this run is given .*; give the same scenes"
        ):
            Trainer(tiny, tmp_path, scenes=other)
    assert checkpoint.read(tmp_path / BEST)[1]["data"] == (fingerprint(scenes) if first else None)


def test_scenes_without_a_source_are_trained_on_and_eight_sources_too(tiny, tmp_path):
    changes = {"scene.max_sources": 8, "scene.num_sources": (0, 8), "budget.scenes": 32, "optimizer.batch_size": 4}
    many = tiny.replaced(changes)
    own = simulate(many.scene, 78, range(40), num_sources=torch.arange(40) % 9)
    for name, options in {"drawn": {}, "own": {"scenes": own}}.items():
        trainer = Trainer(many, tmp_path / name, **options)
        (only,) = trainer.run()
        assert math.isfinite(only.loss)
        assert 0 in trainer.data.frozen().scenes.truth.num_sources
