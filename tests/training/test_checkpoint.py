from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ris_hpo.errors import CheckpointError, ConfigError, OutputError
from ris_hpo.training import checkpoint, telemetry
from ris_hpo.training.checkpoint import BEST, LAST
from ris_hpo.training.config import RunConfig
from ris_hpo.training.finished import load_network
from ris_hpo.training.trainer import Trainer
from tests.properties import examples

from .conftest import TINY

HARD = {"network.dropout": 0.1, "inference.hybrid.beta": 0.2, "inference.hybrid.beta_jitter": 0.05}
SHORT = {
    "budget.scenes": 48,
    "budget.validate_every": 16,
    "budget.validation_scenes": 12,
}  # six steps, three validations
FULL = RunConfig().replaced(TINY | HARD | SHORT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = Trainer(FULL, tmp_path_factory.mktemp("undisturbed"))
    list(trainer.run())
    return trainer


def without_clocks(directory):
    volatile = {"seconds", "scenes_per_second", "memory_bytes"}
    return [{k: v for k, v in event.items() if k not in volatile} for event in telemetry.read(directory)]


@pytest.mark.parametrize("death", range(6))
def test_stopped_at_any_step_the_curve_is_the_same_digit_for_digit(death, undisturbed, tmp_path):
    directory = tmp_path / "stopped"
    steps = iter(range(10**6))
    first = Trainer(FULL, directory)
    list(first.run(lambda: next(steps) >= death))
    assert not first.finished
    second = Trainer(FULL, directory)
    list(second.run())
    assert [v.network for v in second.history] == [v.network for v in undisturbed.history]
    assert [v.loss for v in second.history] == [v.loss for v in undisturbed.history]
    for a, b in zip(second.network.parameters(), undisturbed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert without_clocks(directory) == without_clocks(undisturbed.directory)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from ris_hpo.training.config import RunConfig
from ris_hpo.training.trainer import Trainer
torch.set_num_threads(1)
config = RunConfig.parse(__import__("json").loads(Path(sys.argv[1]).read_text()))
steps = iter(range(10**6))
def stop():
    if next(steps) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return False
for _ in Trainer(config, Path(sys.argv[2])).run(stop):
    pass
"""


def test_kill_9_in_the_middle_of_an_epoch_changes_nothing(undisturbed, tmp_path):
    (tmp_path / "config.json").write_text(FULL.model_dump_json())
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "config.json"), str(tmp_path / "run"), "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run(arguments, env=environment, check=False).returncode == -signal.SIGKILL
    resumed = Trainer(FULL, tmp_path / "run")
    assert resumed.scenes_seen == 16  # died between validations, so it goes back to the last one
    list(resumed.run())
    assert [v.network for v in resumed.history] == [v.network for v in undisturbed.history]
    assert without_clocks(tmp_path / "run") == without_clocks(undisturbed.directory)


def test_finished_run_stays_finished(undisturbed):
    again = Trainer(FULL, undisturbed.directory)
    assert again.finished
    assert list(again.run()) == []
    assert again.best == undisturbed.best


def test_two_runs_are_bit_identical(undisturbed, tmp_path):
    twin = Trainer(FULL, tmp_path)
    list(twin.run())
    assert [v.network for v in twin.history] == [v.network for v in undisturbed.history]


def test_checkpoint_of_another_configuration_is_refused(undisturbed):
    with pytest.raises(CheckpointError, match="belongs to configuration"):
        Trainer(FULL.replaced({"seed": 1}), undisturbed.directory)


def test_existing_run_is_not_overwritten(undisturbed):
    with pytest.raises(CheckpointError, match="already there"):
        Trainer(FULL, undisturbed.directory, resume=False)


@examples(25)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(place, bit, undisturbed, tmp_path_factory):
    damaged = tmp_path_factory.mktemp("damaged") / BEST
    content = bytearray((undisturbed.directory / BEST).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    damaged.write_bytes(content)
    try:
        checkpoint.read(damaged)
    except CheckpointError:
        return
    # the only bytes without meaning are the header's padding
    tensors, _ = checkpoint.read(damaged)
    sound, _ = checkpoint.read(undisturbed.directory / BEST)
    assert all(torch.equal(tensors[name], sound[name]) for name in sound)


@examples(15)
@given(share=st.floats(0, 0.999))
def test_truncated_checkpoint_is_one_line(share, undisturbed, tmp_path_factory):
    cut = tmp_path_factory.mktemp("cut") / LAST
    content = (undisturbed.directory / LAST).read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError) as failure:
        checkpoint.read(cut)
    assert "\n" not in str(failure.value)


def test_damaged_telemetry_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no telemetry"):
        list(telemetry.read(tmp_path))
    (tmp_path / telemetry.FILE_NAME).write_bytes(b'{"event": "start"}\n\xff\xfe\n{"cut')
    events = telemetry.read(tmp_path)
    assert next(events) == {"event": "start"}
    with pytest.raises(ConfigError, match="line 2 is not an event"):
        next(events)


def test_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_network(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_checkpoint_has_the_permissions_that_umask_gives(umask, tmp_path):
    before = os.umask(umask)
    try:
        for _ in range(2):  # made, and replaced
            checkpoint.write(tmp_path / BEST, {"x": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / BEST).stat().st_mode) == 0o666 & ~umask


def test_an_unreadable_checkpoint_is_not_said_to_be_missing(tmp_path, monkeypatch):
    checkpoint.write(tmp_path / BEST, {"x": torch.zeros(1)}, {})

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match=r"best.safetensors: cannot be read \(Permission denied\)"):
        load_network(tmp_path)


def test_foreign_safetensors_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="found format None"):
        load_network(tmp_path / "x.safetensors")


def test_weights_of_another_network_are_refused(undisturbed, tmp_path):
    tensors, state = checkpoint.read(undisturbed.directory / BEST)
    state["config"]["network"]["width"] = 32
    checkpoint.write(tmp_path / BEST, tensors, state)
    with pytest.raises(CheckpointError, match="checkpoint of another network"):
        load_network(tmp_path)


def test_a_run_of_the_first_format_is_read_as_one_of_today(undisturbed, tmp_path):
    """It had neither verdicts nor a mark of the scenes, and kept the current phase alone."""
    tensors, today = checkpoint.read(undisturbed.directory / LAST)
    first = {**today, "phase_index": 0, "phase_start": 0, "phase_extensions": 0}
    for name in ("data", "failure", "extensions"):
        del first[name]
    for validation in (first["initial"], *first["history"]):
        del validation["verdicts"]
    text = json.dumps(first)
    header = {"format": checkpoint.FIRST_FORMAT, "state": text, "digest": checkpoint._digest(tensors, text)}
    save_file(tensors, tmp_path / LAST, metadata=header)
    assert checkpoint.read(tmp_path / LAST)[1] == checkpoint.read(undisturbed.directory / LAST)[1]


def test_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "run").write_text("a file where a directory is needed")
    with pytest.raises(OutputError, match="cannot be made"):
        checkpoint.write(tmp_path / "run" / LAST, {"x": torch.zeros(1)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_loaded_network_predicts_what_was_saved(undisturbed):
    network, config = load_network(undisturbed.directory)
    assert config == FULL
    assert not network.training
    weights = undisturbed.learner.averaged.state(undisturbed.network)
    if undisturbed.best == undisturbed.history[-1]:
        assert all(torch.equal(p, weights[name]) for name, p in network.named_parameters())
