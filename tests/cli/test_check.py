"""The command ``check``, a missing noise power, and files that are taken part by part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from ris_hpo.cli import scene_files
from ris_hpo.errors import SceneFileError
from ris_hpo.estimators.noise import estimated_noise_power
from ris_hpo.physics.files import load_estimates, load_scenes, save_scenes
from ris_hpo.physics.scene import SceneSpec, grid_of_cells
from tests.estimators.conftest import SMALL

KIND = SceneSpec(geometry=SMALL.geometry, num_antennas=8, num_snapshots=16)


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, np.ndarray]:
    save_scenes(tmp_path / "scenes.npz", grid_of_cells(KIND, 5, [15.0], [1, 2], 3))
    return dict(np.load(tmp_path / "scenes.npz"))


def test_a_file_is_told_whole(cli, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    found = cli("check", "scenes.npz", "--json")
    assert found.code == 0, found.err
    told = found.json
    assert (told["scenes"], told["snapshots"], told["antennas"]) == (6, 16, 8)
    assert told["surface"].startswith("8 x 8 elements")
    assert (told["surface_stated"], told["noise_power"]) == ("in the file", "in the file")
    assert (told["truth"], told["sources_a_scene"]) == ("complete", "1 to 2")
    assert told["scenes_with_all_sources_in_the_region"] == "6 of 6"
    assert told["fit"] == "the model fits them"
    assert "scenes.npz" in cli("check", "scenes.npz").out


def test_what_would_be_assumed_and_what_does_not_fit_is_told(
    cli, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    wrong = {**arrays, "bs_ris_channel": arrays["bs_ris_channel"].conj(), "comment": np.arange(2)}
    np.savez(tmp_path / "wrong.npz", **wrong)
    told = cli("check", "wrong.npz", "--json").json
    assert told["not_read"] == ["comment"]
    assert "the model does not fit 6 of 6 scenes" in told["fit"]
    for name in ("noise_power", "geometry_json", "num_sources"):
        del arrays[name]
    surface = tmp_path / "mine.toml"
    numbers = SMALL.geometry.model_dump(exclude={"wave"}, exclude_none=True)
    surface.write_text("[geometry]\n" + "".join(f"{name} = {value}\n" for name, value in numbers.items()))
    np.savez(tmp_path / "silent.npz", **{n: v for n, v in arrays.items() if n in ("y", "bs_ris_channel", "ris_codes")})
    found = cli("check", "silent.npz", "--surface", surface, "--json")
    assert found.code == 0, found.err
    assert found.json["surface_stated"] == "by --surface"
    assert found.json["noise_power"].startswith("missing")
    assert found.json["fit"].startswith("not known")
    assert found.json["truth"].startswith("none")
    assert cli("check", "silent.npz").code == SceneFileError.exit_code


def test_a_missing_noise_power_is_estimated_and_said(cli, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    scenes = load_scenes(tmp_path / "scenes.npz")
    off_db = 10 * (estimated_noise_power(scenes) / scenes.noise_power).log10()
    assert float(off_db.abs().max()) < 1.5
    assert float(off_db.mean().abs()) < 0.5
    del arrays["noise_power"]
    np.savez(tmp_path / "silent.npz", **arrays)
    found = cli("evaluate", "--scenes", "silent.npz", "--estimator", "spectrum-maxima", "--json")
    assert found.code == 0, found.err
    assert "has no noise power; it is estimated" in found.err
    assert found.json["overall"]["scores"]["k_acc"] >= 0.8


def test_a_file_taken_part_by_part_gives_the_same(
    cli, arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", "--scenes", "scenes.npz", "--estimator", "spectrum-maxima", "--json"]
    whole = cli(*command).json
    assert cli("localize", "scenes.npz", "--estimator", "spectrum-maxima", "--out", "whole.npz").code == 0
    monkeypatch.setattr(scene_files.OwnScenes.parts, "__defaults__", (4,))
    monkeypatch.setattr(scene_files, "PART", 4)
    parts = cli(*command).json
    assert parts["overall"]["scores"] == pytest.approx(whole["overall"]["scores"], rel=1e-2)
    assert parts["overall"]["floor"]["success"] == pytest.approx(whole["overall"]["floor"]["success"], abs=0.3)
    assert [row["label"] for row in parts["by_count"]] == [row["label"] for row in whole["by_count"]]
    assert cli("localize", "scenes.npz", "--estimator", "spectrum-maxima", "--out", "parts.npz").code == 0
    found, expected = (load_estimates(tmp_path / f"{name}.npz") for name in ("parts", "whole"))
    torch.testing.assert_close(found.azimuth, expected.azimuth, equal_nan=True)
    scored = cli("evaluate", "--scenes", "scenes.npz", "--estimates", "whole.npz", "--json").json
    assert scored["overall"]["scores"]["k_acc"] == whole["overall"]["scores"]["k_acc"]


def test_the_file_that_the_documents_write_from_matlab_is_right(
    cli, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The ten lines of docs/how-to/own-data.md, by scipy's writer of MATLAB files: columns, and one channel."""
    names = ("y", "bs_ris_channel", "ris_codes", "num_sources", "azimuth", "elevation", "range_m")
    written = {name: arrays[name].astype(np.result_type(arrays[name], np.float64)) for name in names}
    written |= {"noise_power": arrays["noise_power"].astype(np.float64), "geometry_json": str(arrays["geometry_json"])}
    savemat(tmp_path / "scenes.mat", written, oned_as="column")
    found, expected = cli("check", "scenes.mat", "--json").json, cli("check", "scenes.npz", "--json").json
    different = {"kind", "remarks", "not_read"}
    assert {n: v for n, v in found.items() if n not in different} == {
        n: v for n, v in expected.items() if n not in different
    }
    assert found["kind"] == "MATLAB 5"
