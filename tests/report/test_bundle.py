"""Bundles: every form of the network, any batch, no training code, and no damaged file taken for a good one."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from ris_hpo.errors import CheckpointError, OutputError
from ris_hpo.learning.bundle import FORMAT, MANIFEST, PROGRAM, WEIGHTS, is_bundle, load_bundle, save_bundle
from ris_hpo.learning.inference import InferenceSpec, localize, predict
from ris_hpo.learning.network import Network, NetworkSpec
from ris_hpo.physics.files import load_estimates, save_scenes
from ris_hpo.physics.scene import SceneSpec, simulate

SMALL = {"width": 16, "depth": 1, "heads": 2, "head_width": 16}
FORMS = {
    "structured": SMALL,
    "atoms, noise unknown": {**SMALL, "covariance_head": "factor", "noise_known": False},
    "tokens, free, ordinal": {
        **SMALL, "front_end": "tokens", "covariance_head": "factor", "factor_basis": "free", "count_head": "ordinal",
    },
}  # fmt: skip
SCENE = SceneSpec()
SCENES = simulate(SCENE, 11, range(5))


def same(first, second):
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert (a is None and b is None) or torch.equal(a, b), field.name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(3)
    network = Network(NetworkSpec.parse(SMALL)).eval()
    path = tmp_path_factory.mktemp("bundles") / "plain"
    save_bundle(path, network, InferenceSpec(), SCENE, {"trial": 7})
    return network, path


@pytest.fixture(scope="module")
def loaded(made):
    network, path = made
    return network, load_bundle(path)


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_the_outputs_of_the_network_at_any_batch(request, tmp_path, form):
    if FORMS[form] == SMALL:
        network, bundle = request.getfixturevalue("loaded")
    else:
        torch.manual_seed(1)
        network = Network(NetworkSpec.parse(FORMS[form])).eval()
        save_bundle(tmp_path / "bundle", network, InferenceSpec(), SCENE)
        bundle = load_bundle(tmp_path / "bundle")
    assert not bundle.training  # dropout and the like are off
    for count in (1, 2, 5):
        few = SCENES[:count]
        for a, b in zip(predict(network, few), predict(bundle, few), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("form", ["program", "weights"])
def test_it_is_on_the_device_that_was_asked_for(made, form):
    """Torch's device without values stands for one that this machine may not have."""
    bundle = load_bundle(made[1], device="meta", form=form)
    assert {each.device.type for each in bundle._call.parameters()} == {"meta"}


def test_sources_are_those_of_localize(made, loaded, monkeypatch):
    network, bundle = loaded
    rebuilt = load_bundle(made[1], form="weights")
    few = SCENES[:2]
    known = few.require_truth().num_sources
    for localizer, counts in (("polish", None), ("polish", known), ("music", None)):
        inference = InferenceSpec(localizer=localizer)
        for form in (bundle, rebuilt):
            monkeypatch.setattr(form, "inference", inference)
        expected = localize(network, few, inference, num_sources=counts)
        same(expected, bundle.localize(few, num_sources=counts))
        same(expected, rebuilt.localize(few, num_sources=counts))


@pytest.mark.system
def test_it_loads_and_locates_without_the_training_code(made, tmp_path):
    network, path = made
    save_scenes(tmp_path / "scenes.npz", SCENES)
    program = f"""
import sys
for name in ("ris_hpo.training", "ris_hpo.search", "ris_hpo.cli", "optuna", "sqlalchemy", "matplotlib"):
    sys.modules[name] = None
from pathlib import Path
from ris_hpo.learning.bundle import load_bundle
from ris_hpo.physics.files import load_scenes, save_estimates
bundle = load_bundle(Path({str(path)!r}))
folder = Path({str(tmp_path)!r})
save_estimates(folder / "estimates.npz", bundle.localize(load_scenes(folder / "scenes.npz")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = load_estimates(tmp_path / "estimates.npz")
    expected = localize(network, SCENES, InferenceSpec())
    assert torch.equal(found.mask, expected.mask)
    mask = found.mask
    torch.testing.assert_close(found.azimuth[mask], expected.azimuth[mask].to(found.azimuth.dtype), rtol=0, atol=1e-6)


def test_the_manifest_tells_where_it_came_from(made):
    _, path = made
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["format"] == FORMAT
    assert manifest["provenance"] == {"trial": 7}
    assert NetworkSpec.parse(manifest["network"]) == NetworkSpec.parse(SMALL)
    assert SceneSpec.parse(manifest["scene"]) == SCENE
    assert is_bundle(path)
    assert not is_bundle(path.parent)


@pytest.mark.parametrize("name", [WEIGHTS, PROGRAM])
def test_a_damaged_file_is_found(made, tmp_path, name):
    _, path = made
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    whole = bytearray((copy / name).read_bytes())
    whole[len(whole) // 2] ^= 1
    (copy / name).write_bytes(whole)
    with pytest.raises(CheckpointError, match="do not match their digest"):
        load_bundle(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_bundle(copy)


def test_files_of_a_bundle_have_the_permissions_that_umask_gives(made, tmp_path):
    (tmp_path / "file").touch()
    assert {file.stat().st_mode for file in made[1].iterdir()} == {(tmp_path / "file").stat().st_mode}
    (tmp_path / "folder").mkdir()
    assert made[1].stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_what_is_no_bundle(made, tmp_path):
    network, path = made
    with pytest.raises(CheckpointError, match="no bundle there"):
        load_bundle(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "not a bundle"), ('{"format": "other"}', "not a bundle")):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_bundle(tmp_path)
    with pytest.raises(OutputError, match="already there"):
        save_bundle(path, network, InferenceSpec(), SCENE)
    with pytest.raises(OutputError, match="cannot be written"):
        save_bundle(tmp_path / "no" / "bundle", network, InferenceSpec(), SCENE)
    assert [file.name for file in path.parent.iterdir()] == ["plain"]  # no partial folder is left
