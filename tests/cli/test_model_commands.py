from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ris_hpo.errors import CheckpointError, ConfigError, DeviceError, GateError, OutputError, ProofError, SceneFileError
from ris_hpo.physics.files import load_estimates
from ris_hpo.training import checkpoint
from tests.waiting import until

SMALL = """
[budget]
scenes = 64
validate_every = 32
validation_scenes = 16
pipeline_scenes = 4

[network]
width = 8
depth = 1
heads = 2
head_width = 16
residual_passes = 0
cell_width = 0

[optimizer]
batch_size = 16
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small configuration, a network trained by it, and a scene file."""
    from ris_hpo.cli import execute

    folder = tmp_path_factory.mktemp("workshop")
    (folder / "small.toml").write_text(SMALL)
    assert execute(["train", "--config", str(folder / "small.toml"), "--out", str(folder / "run")]) == 0
    fixed = ["--num-scenes", "6", "--snr-db", "15", "--out", str(folder / "scenes.npz")]
    assert execute(["simulate", *fixed]) == 0
    return folder


def test_training_ends_with_both_paths_and_the_next_command(cli, workshop: Path) -> None:
    outcome = cli("train", "--config", workshop / "small.toml", "--out", workshop / "run")  # finished: concludes again
    assert outcome.code == 0, outcome.err
    assert "continuing at 64 of 64 scenes" in outcome.err
    assert "network" in outcome.out
    assert "pipeline" in outcome.out
    assert f"next: ris-hpo evaluate --checkpoint {workshop / 'run'}" in outcome.err


def test_a_curriculum_tells_the_evidence_of_each_gate(cli, tmp_path: Path) -> None:
    gate = "gates = [{ metric = 'k_acc', direction = 'up', margin = -1.0 }]"
    phases = "".join(f"[[phases]]\nname = '{name}'\nshare = 0.5\n{gate}\n" for name in ("first", "second"))
    (tmp_path / "phased.toml").write_text(SMALL + phases)
    outcome = cli("train", "--config", "phased.toml", "--out", "run", "--plot", "curve.png")
    assert outcome.code == 0, outcome.err
    for name in ("first", "second"):
        assert outcome.err.count(f"phase '{name}': k_acc should go up by -1: ") == 1
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_gate_that_fails_has_an_exit_code_of_its_own_each_time(cli, tmp_path: Path) -> None:
    gate = "patience = 1\ngates = [{ metric = 'k_loc', direction = 'down', margin = 9.0 }]"
    phases = f"[[phases]]\nname = 'first'\nshare = 0.5\n{gate}\n[[phases]]\nname = 'second'\nshare = 0.5\n"
    (tmp_path / "phased.toml").write_text(SMALL + phases)
    for attempt in range(2):
        outcome = cli("train", "--config", "phased.toml", "--out", "run")
        assert outcome.code == GateError.exit_code
        last = outcome.err.splitlines()[-1]
        assert "phase 'first' failed its gate: k_loc should go down by 9: " in last
        assert last.endswith("; phases not run: second")
        assert outcome.err.count("not passed") == (2, 0)[attempt]
        assert ("phase 'first' is extended; the run now takes 96 scenes" in outcome.err) == (attempt == 0)
        assert "phases, in scenes seen: 'first' to " in outcome.err


def test_own_scenes_are_divided_and_kept_apart(cli, workshop: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        assert cli("simulate", "--num-scenes", 20, "--seed", seed, "--out", f"{name}.npz").code == 0
    run = ["train", "--config", workshop / "small.toml", "--out", "run", "--scenes"]
    first = cli(*run, "a.npz", "--json")
    assert first.code == 0, first.err
    assert "own scenes: 16 to train on, 4 to validate on (held out by budget.validation_seed = 7001)" in first.err
    assert first.json["network"]["num_scenes"] == 4
    assert len(first.json["data_fingerprint"]) == 16
    other = cli(*run, "b.npz")
    assert other.code == CheckpointError.exit_code
    assert f"was trained on scenes with fingerprint {first.json['data_fingerprint']}, this run is given" in other.err
    assert other.err.count("\n") == 1
    apart = cli(
        "train", "--config", workshop / "small.toml", "--out", "apart", "--scenes", "a.npz", "--validation", "b.npz"
    )
    assert "own scenes: 20 to train on, 16 to validate on\n" in apart.err
    assert cli("train", "--out", "none", "--validation", "b.npz").code == 2


def test_training_tells_programs_the_same(cli, workshop: Path) -> None:
    found = cli("train", "--config", workshop / "small.toml", "--out", workshop / "run", "--json").json
    assert found["scenes"] == 64
    assert {"k_loc", "floor", "success"} <= set(found["network"])
    assert found["pipeline"]["num_scenes"] == 4


def test_files_go_through_localize_and_evaluate(cli, workshop: Path, tmp_path: Path) -> None:
    found = cli("localize", workshop / "scenes.npz", "--checkpoint", workshop / "run", "--out", "e.npz", "--json").json
    assert found["scenes"] == len(load_estimates(tmp_path / "e.npz")) == 6
    direct = cli("evaluate", "--checkpoint", workshop / "run", "--scenes", workshop / "scenes.npz", "--json").json
    by_file = cli("evaluate", "--estimates", "e.npz", "--scenes", workshop / "scenes.npz", "--json").json
    assert direct["overall"]["scores"]["k_loc"] == pytest.approx(by_file["overall"]["scores"]["k_loc"], abs=1e-4)
    assert direct["overall"]["floor"]["k_loc"] == by_file["overall"]["floor"]["k_loc"]


def test_the_fast_path_is_one_path_for_localize_and_evaluate(cli, workshop: Path, tmp_path: Path) -> None:
    scenes, run = workshop / "scenes.npz", ["--checkpoint", workshop / "run"]
    found = cli("localize", scenes, *run, "--fast", "--out", "fast.npz")
    assert found.code == 0, found.err
    assert "not measured for this network" in found.err
    direct = cli("evaluate", *run, "--scenes", scenes, "--path", "fast", "--json").json
    by_file = cli("evaluate", "--estimates", "fast.npz", "--scenes", scenes, "--json").json
    assert direct["method"].endswith("(fast)")
    assert direct["overall"]["scores"]["k_loc"] == pytest.approx(by_file["overall"]["scores"]["k_loc"], abs=1e-4)
    one = ["--fast", "--set", "likelihood.num_sources=[1, 1]"]  # settings of one's own go on top
    assert cli("localize", scenes, *run, *one, "--out", "one.npz").code == 0
    assert load_estimates(tmp_path / "one.npz").num_sources.tolist() == [1] * 6
    refused = cli("localize", scenes, "--estimator", "ml", "--fast", "--out", "ml.npz")
    assert refused.code == 2
    assert "the fast path is a network's" in refused.err


def test_what_is_known_of_a_fast_path_is_told(cli, workshop: Path, tmp_path: Path) -> None:
    tensors, state = checkpoint.read(workshop / "run" / "best.safetensors")
    rates = {"fast": {"k_loc": 2.5, "scenes_per_second": 90.0}, "pipeline": {"k_loc": 2.4, "scenes_per_second": 30.0}}
    state["provenance"] = {"paths": {**rates, "scenes": 1000}}
    checkpoint.write(tmp_path / "own.safetensors", tensors, state)
    told = cli("localize", workshop / "scenes.npz", "--checkpoint", "own.safetensors", "--fast", "--out", "e.npz").err
    assert "k_loc 2.50 where the thorough path has 2.40, at 3.0 times its rate (1,000 scenes" in told


def test_evaluate_draws_its_own_scenes_per_cell(cli, tmp_path: Path) -> None:
    drawn = ["--snr-db", "10,20", "--counts", "1,2", "--per-cell", 2]
    outcome = cli("evaluate", "--estimator", "spectrum-maxima", *drawn, "--plot", "errors.png")
    assert outcome.code == 0, outcome.err
    for part in ("10 dB", "20 dB", "K = 1", "K = 2", "RMSE azimuth, deg", "efficiency", "scenes/s"):
        assert part in outcome.out
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["errors.png"]


def test_a_known_count_is_used(cli, workshop: Path, tmp_path: Path) -> None:
    scenes = workshop / "scenes.npz"
    told = ["--estimator", "spectrum-maxima", "--num-sources"]
    assert cli("localize", scenes, *told, "2", "--out", "e.npz").code == 0
    assert set(load_estimates(tmp_path / "e.npz").num_sources.tolist()) == {2}
    assert cli("evaluate", "--scenes", scenes, *told, "truth", "--json").json["overall"]["scores"]["k_acc"] == 1
    assert cli("localize", scenes, *told, "many", "--out", "e.npz").code == 2


def damaged(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a scene file with arrays replaced, or taken out where None."""
    with np.load(source) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    for name, value in changes.items():
        if value is None:
            kept.pop(name)
        else:
            kept[name] = value(kept[name])  # type: ignore[operator]
    np.savez(target, **kept)  # type: ignore[arg-type]
    return target


def test_what_is_known_of_the_truth_is_scored(cli, workshop: Path, tmp_path: Path) -> None:
    scenes, method = workshop / "scenes.npz", ["--estimates", "e.npz"]
    cli("localize", scenes, "--checkpoint", workshop / "run", "--out", "e.npz")
    whole = cli("evaluate", "--scenes", scenes, *method, "--json").json["overall"]
    damaged(scenes, tmp_path / "angles.npz", range_m=None)
    damaged(scenes, tmp_path / "counts.npz", range_m=None, azimuth=None, elevation=None)
    for name, known in (("angles", {"k_acc", "rmse_azimuth_deg", "success"}), ("counts", {"k_acc"})):
        found = cli("evaluate", "--scenes", f"{name}.npz", *method, "--json").json["overall"]
        assert found["floor"] is None
        assert found["scores"]["k_acc"] == whole["scores"]["k_acc"]
        for figure in ("k_acc", "rmse_azimuth_deg", "success", "k_loc", "rmse_range_m"):
            assert (found["scores"][figure] is not None) == (figure in known), (name, figure)
        plot = ["--plot", "errors.png"] if name == "counts" else []
        shown = cli("evaluate", "--scenes", f"{name}.npz", *method, *plot)
        assert shown.code == 0, shown.err
        assert "the truth is not complete" in shown.err
        assert "nan" not in shown.out
    by_count = ["--checkpoint", workshop / "run", "--num-sources", "truth", "--json"]
    assert cli("evaluate", "--scenes", "counts.npz", *by_count).json["overall"]["scores"]["k_acc"] == 1


def test_localize_looks_at_no_truth(cli, workshop: Path, tmp_path: Path) -> None:
    damaged(workshop / "scenes.npz", tmp_path / "odd.npz", num_sources=lambda a: a - 9, range_m=None)
    outcome = cli("localize", "odd.npz", "--checkpoint", workshop / "run", "--out", "e.npz")
    assert outcome.code == 0, outcome.err
    cli("localize", workshop / "scenes.npz", "--checkpoint", workshop / "run", "--out", "plain.npz")
    found, plain = (load_estimates(tmp_path / name) for name in ("e.npz", "plain.npz"))
    assert found.range_m.equal(plain.range_m)
    assert cli("localize", "odd.npz", "--estimator", "ml", "--num-sources", "truth", "--out", "e.npz").code == 5
    oracle = ["--estimator", "music", "--set", "covariance=truth"]
    assert cli("localize", workshop / "scenes.npz", *oracle, "--out", "e.npz").code == 0


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[0] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"y": None}, "'y' is missing"),
        ({"y": lambda a: a[:, :, :3]}, "'bs_ris_channel' has shape (6, 16, 144), expected (6, 3, N)"),
        ({"y": lambda a: a.real}, "'y' has dtype float32, expected complex64"),
        ({"y": with_nan}, "'y': every value must be finite"),
        ({"noise_power": lambda a: -a}, "'noise_power'"),
    ],
)
def test_a_scene_file_that_cannot_be_used_names_the_array(
    cli, workshop: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    damaged(workshop / "scenes.npz", tmp_path / "bad.npz", **change)
    for command in (["localize", "bad.npz", "--out", "e.npz"], ["evaluate", "--scenes", "bad.npz"]):
        outcome = cli(*command, "--estimator", "spectrum-maxima")
        assert outcome.code == SceneFileError.exit_code
        assert said in outcome.err
        assert outcome.err.count("\n") == 1
    assert not (tmp_path / "e.npz").exists()


@pytest.mark.parametrize("content", [None, b"", b"not an archive at all"])
def test_a_scene_file_that_is_missing_or_no_archive(cli, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bad.npz").write_bytes(content)
    outcome = cli("localize", "bad.npz", "--estimator", "ml", "--out", "e.npz")
    assert outcome.code == SceneFileError.exit_code
    assert outcome.err.count("\n") == 1


def test_scenes_without_truth_cannot_be_scored(cli, workshop: Path, tmp_path: Path) -> None:
    truth = dict.fromkeys(("num_sources", "azimuth", "elevation", "range_m", "power", "symbols"))
    damaged(workshop / "scenes.npz", tmp_path / "blind.npz", **truth)
    outcome = cli("evaluate", "--scenes", "blind.npz", "--estimator", "spectrum-maxima")
    assert outcome.code == ConfigError.exit_code
    assert "carry no truth" in outcome.err
    assert cli("localize", "blind.npz", "--estimator", "spectrum-maxima", "--out", "e.npz").code == 0


def test_a_checkpoint_of_another_network_is_refused(cli, workshop: Path, tmp_path: Path) -> None:
    wider = ["--config", workshop / "small.toml", "--set", "network.width=16"]
    outcome = cli("train", *wider, "--out", workshop / "run")
    assert outcome.code == CheckpointError.exit_code
    assert "use another directory" in outcome.err


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "foreign"])
def test_a_checkpoint_that_cannot_be_used(cli, workshop: Path, tmp_path: Path, damage: str) -> None:
    content = bytearray((workshop / "run" / "best.safetensors").read_bytes())
    file = tmp_path / "best.safetensors"
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-5] ^= 0xFF
        file.write_bytes(content)
    elif damage == "foreign":
        file.write_text("weights of something else")
    outcome = cli("localize", workshop / "scenes.npz", "--checkpoint", tmp_path, "--out", "e.npz")
    assert outcome.code == CheckpointError.exit_code
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "e.npz").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[network]\nwidht = 8\n", "unknown key 'network.widht'; did you mean 'width'?"),
        ("[network]\nwidth = -8\n", "network.width"),
        ("[scene]\nsnr_db = [20, -5]\n", "lower bound"),
        ("seed = \n", "not valid TOML"),
    ],
)
def test_a_run_configuration_that_cannot_be_used(cli, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    outcome = cli("train", "--config", "run.toml", "--out", "run")
    assert outcome.code == ConfigError.exit_code
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_outputs_and_devices_are_checked_before_any_work(cli, workshop: Path, tmp_path: Path) -> None:
    scenes, method = workshop / "scenes.npz", ["--estimator", "ml"]
    assert cli("localize", scenes, *method, "--out", "nowhere/e.npz").code == OutputError.exit_code
    assert cli("localize", scenes, *method, "--out", tmp_path).code == OutputError.exit_code
    assert cli("localize", scenes, *method, "--out", "e.txt").code == OutputError.exit_code
    (tmp_path / "file").write_text("")
    assert cli("train", "--out", "file").code == OutputError.exit_code
    assert cli("train", "--out", "file/run").code == OutputError.exit_code
    assert cli("localize", scenes, *method, "--device", "abacus", "--out", "e.npz").code == DeviceError.exit_code
    assert cli("localize", scenes, "--estimator", "mll", "--out", "e.npz").code == ConfigError.exit_code
    assert cli("localize", scenes, *method, "--checkpoint", workshop / "run", "--out", "e.npz").code == 2
    assert cli("evaluate", *method, "--snr-db", "ten").code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.system
def test_training_told_to_stop_saves_and_goes_on_to_the_same_end(cli, tmp_path: Path) -> None:
    (tmp_path / "long.toml").write_text(SMALL.replace("scenes = 64", "scenes = 256", 1))
    command = ["train", "--config", "long.toml", "--json", "--out"]
    whole = cli(*command, "whole")
    assert whole.code == 0, whole.err
    with subprocess.Popen(
        [sys.executable, "-m", "ris_hpo", *command, "cut"],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as training:
        telemetry = tmp_path / "cut" / "telemetry.jsonl"

        def is_under_way() -> bool:
            return training.poll() is not None or (telemetry.exists() and telemetry.read_text().count("\n") >= 4)

        until(is_under_way, "progress of the training")
        training.send_signal(signal.SIGTERM)
        said = training.communicate(timeout=60)[1]
        assert training.returncode == 130, said
    assert "saved; the same command continues" in said
    rest = cli(*command, "cut")
    assert rest.code == 0, rest.err
    assert "continuing at" in rest.err
    assert rest.json["network"] == whole.json["network"]
    assert rest.json["pipeline"] == whole.json["pipeline"]


def test_a_bundle_finds_the_same_sources_as_its_checkpoint(cli, workshop: Path, tmp_path: Path) -> None:
    made = cli("package", "--checkpoint", workshop / "run", "--out", "bundle", "--json")
    assert made.code == 0, made.err
    assert set(made.json["files"]) == {"bundle.json", "network.pt2", "weights.safetensors"}
    for name in ("bundle", workshop / "run"):
        outcome = cli("localize", workshop / "scenes.npz", "--checkpoint", name, "--out", f"{Path(name).name}.npz")
        assert outcome.code == 0, outcome.err
    first, second = load_estimates(tmp_path / "bundle.npz"), load_estimates(tmp_path / "run.npz")
    assert first.num_sources.tolist() == second.num_sources.tolist()
    assert (first.positions() - second.positions()).abs().max() < 1e-4
    assert cli("package", "--checkpoint", workshop / "run", "--out", "bundle").code == OutputError.exit_code
    assert cli("package", "--checkpoint", "nothing", "--out", "other").code == CheckpointError.exit_code


def test_a_network_that_cannot_memorise_gets_no_certificate(cli, workshop: Path) -> None:
    outcome = cli("prove", "--config", workshop / "small.toml", "--num-scenes", 16, "--epochs", 1)
    assert outcome.code == ProofError.exit_code
    assert "expected <= 0.1" in outcome.err.splitlines()[-1]


def test_weights_that_do_not_ship_are_named(cli, workshop: Path) -> None:
    outcome = cli("localize", workshop / "scenes.npz", "--weights", "nonsense", "--out", "e.npz")
    assert outcome.code == CheckpointError.exit_code
    assert "no weights 'nonsense'" in outcome.err


def test_the_surface_is_stated_by_the_file_or_on_the_command_line(cli, tmp_path: Path) -> None:
    row = ["--surface", "linear-64", "--set", "elevation_deg=[-30, 30]"]
    assert cli("simulate", "--num-scenes", 2, *row, "--num-sources", 1, "--snr-db", 20, "--out", "stated.npz").code == 0
    arrays = dict(np.load(tmp_path / "stated.npz"))
    del arrays["geometry_json"]
    np.savez(tmp_path / "silent.npz", **arrays)
    quick = ["--estimator", "spectrum-maxima", "--out", "e.npz"]
    assert "does not say" not in cli("localize", "stated.npz", *quick).err
    refused = cli("localize", "silent.npz", *quick)
    assert refused.code == SceneFileError.exit_code
    assert "state it with --surface" in refused.err
    named = cli("localize", "silent.npz", "--surface", "linear-64", *quick)
    assert named.code == 0, named.err
    assert "does not say" not in named.err
    other = cli("localize", "stated.npz", "--surface", "default", *quick)
    assert other.code == SceneFileError.exit_code
    assert "64 x 1 elements" in other.err
    assert "12 x 12 elements" in other.err


def test_an_assumed_surface_is_the_first_line(cli, workshop: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(workshop / "scenes.npz"))
    del arrays["geometry_json"]
    np.savez(tmp_path / "silent.npz", **arrays)
    found = cli("localize", "silent.npz", "--checkpoint", workshop / "run", "--out", "e.npz")
    assert found.code == 0, found.err
    assert found.err.startswith("silent.npz does not say its surface; assumed is that of ")
    assert "12 x 12 elements, 0.5 wavelengths apart, wavelength 0.3 m" in found.err


def test_a_run_on_another_surface_states_it_once(cli, workshop: Path, tmp_path: Path) -> None:
    row = ["--set", "scene.geometry.num_horizontal=16", "--set", "network.grid.num_v=9"]
    found = cli("train", "--config", workshop / "small.toml", *row, "--num-scenes", 32, "--out", "run")
    assert found.code == 0, found.err
    assert "warning: network.grid: num_v = 9 puts cells 1.7 beam widths apart" in found.err
