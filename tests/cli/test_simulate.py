from __future__ import annotations

from pathlib import Path

import torch

from ris_hpo.physics.files import load_scenes


def test_scenes_go_to_a_file_and_come_back(cli, tmp_path: Path) -> None:
    outcome = cli(
        "simulate", "--num-scenes", 700, "--seed", 3, "--num-sources", 2, "--snr-db", 10, "--out", "s.npz", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["scenes"] == 700
    scenes = load_scenes(tmp_path / "s.npz")
    assert len(scenes) == 700
    assert torch.equal(scenes.require_truth().num_sources, torch.full((700,), 2))
    assert scenes.snr_db is not None
    assert torch.all(scenes.snr_db == 10)


def test_the_same_seed_gives_the_same_scenes_whatever_their_number(cli, tmp_path: Path) -> None:
    assert cli("simulate", "--num-scenes", 5, "--out", "a.npz").code == 0
    assert cli("simulate", "--num-scenes", 600, "--out", "b.npz").code == 0
    assert torch.equal(load_scenes(tmp_path / "a.npz").y, load_scenes(tmp_path / "b.npz").y[:5])


def test_files_of_a_folder_hold_the_same_scenes_as_one_file(cli, tmp_path: Path) -> None:
    assert cli("simulate", "--num-scenes", 7, "--out", "s.h5").code == 0
    outcome = cli("simulate", "--num-scenes", 7, "--per-file", 3, "--out", "shards", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["bytes"] == sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    assert len(list((tmp_path / "shards").iterdir())) == 3
    assert torch.equal(load_scenes(tmp_path / "shards").y, load_scenes(tmp_path / "s.h5").y)
    found = cli("localize", "shards", "--estimator", "spectrum-maxima", "--out", "found.mat", "--json")
    assert (found.code, found.json["scenes"]) == (0, 7), found.err
    again = cli("simulate", "--num-scenes", 7, "--per-file", 3, "--out", "shards")
    assert "already there; name a new folder" in again.err


def test_settings_come_from_a_file_and_from_the_line(cli, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[scene]\nnum_snapshots = 8\nnum_antennas = 4\n")
    outcome = cli("simulate", "--num-scenes", 3, "--config", "run.toml", "--set", "num_antennas=6", "--out", "s.npz")
    assert outcome.code == 0, outcome.err
    assert load_scenes(tmp_path / "s.npz").y.shape == (3, 8, 6)


def test_plain_output_names_the_file_and_the_next_command(cli) -> None:
    outcome = cli("simulate", "--num-scenes", 3, "--out", "s.npz")
    assert "s.npz" in outcome.out
    assert "next: ris-hpo localize s.npz" in outcome.err
