"""Scene files, estimates, checkpoints and bundles with anything in them: read, or refused in one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from ris_hpo.estimators.estimate import estimate
from ris_hpo.learning import bundle
from ris_hpo.learning.bundle import MANIFEST, load_bundle, save_bundle
from ris_hpo.learning.network import Network
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.files import load_estimates, load_scenes, save_estimates, save_scenes
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.scoring.metrics import score
from ris_hpo.training import checkpoint
from ris_hpo.training.config import RunConfig
from ris_hpo.training.finished import load_network
from ris_hpo.training.trainer import Trainer
from tests.training.conftest import TINY

from .fuzzing import Whole, damaged_bytes, damaged_trees, fuzz, junk, numbers, outcome

Arrays = dict[str, NDArray[Any]]

SMALL = SceneSpec(geometry=Geometry(num_horizontal=4, num_vertical=3), num_antennas=4, num_snapshots=3)
KINDS = ["complex64", "complex128", "float32", "float64", "int64", "int8", "bool", "U3", "S3", "O", "M8[s]"]


def arrays_of(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


@st.composite
def damaged_arrays(draw: st.DrawFn, whole: Whole[Arrays]) -> bytes:
    """An npz file whose arrays are of another shape, kind or range, are missing or have another name."""
    arrays = dict(whole.value)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(arrays)))
        value = arrays[name]
        match draw(st.sampled_from(["value", "value", "kind", "shape", "slice", "scale", "remove", "rename", "other"])):
            case "value" if value.size and value.dtype.kind in "cfi":
                value = value.copy()
                place = tuple(draw(st.integers(0, size - 1)) for size in value.shape)
                with np.errstate(all="ignore"):
                    value[place] = np.array(draw(numbers.filter(lambda v: abs(v) < 2**63 or v != v))).astype(
                        value.dtype
                    )
            case "kind":
                with np.errstate(all="ignore"):
                    value = np.zeros(value.shape, draw(st.sampled_from(KINDS)))
            case "shape":
                value = value.reshape(draw(st.sampled_from([(-1,), (1, *value.shape), (*value.shape, 1)])))
            case "slice" if value.ndim:
                axis = draw(st.integers(0, value.ndim - 1))
                value = value.take(range(draw(st.integers(0, value.shape[axis]))), axis)
            case "scale" if value.dtype.kind in "cf":
                with np.errstate(all="ignore"):
                    value = (value * draw(st.sampled_from([0, -1, 1e-30, 1e-20, 1e15, 1e30, 1e38]))).astype(value.dtype)
            case "remove":
                del arrays[name]
                name = next(iter(arrays))
                value = arrays[name]
            case "rename":
                del arrays[name]
                name = draw(st.sampled_from([f"{name}s", "power", "symbols", "true_channel", "geometry_json", "x"]))
            case "other":
                value = np.array(json.dumps(draw(junk)))
        arrays[name] = value
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def test_scene_files(tmp_path: Path) -> None:
    path = tmp_path / "scenes.npz"
    save_scenes(path, simulate(SMALL.replaced({"channel_error_db": (-10.0, -10.0)}), 1, range(3)))
    content, arrays = path.read_bytes(), arrays_of(path)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        scenes = outcome(lambda: load_scenes(path, SMALL.geometry))
        if scenes is None:
            return
        found = outcome(lambda: estimate("spectrum-maxima", scenes))
        if found is None:
            return
        save_estimates(tmp_path / "found.npz", found)
        back = load_estimates(tmp_path / "found.npz")  # what is written can be read
        if scenes.truth is not None:
            assert np.isfinite(score(back.padded(scenes.truth.max_sources), scenes.truth).k_loc)

    fuzz(check, damaged_arrays(Whole(arrays)) | damaged_bytes(Whole(content)))


def test_estimate_files(tmp_path: Path) -> None:
    scenes = simulate(SMALL, 1, range(4))
    path = tmp_path / "estimates.npz"
    truth = scenes.require_truth()
    save_estimates(path, truth)
    content, arrays = path.read_bytes(), arrays_of(path)
    arrays["covariance_m2"] = np.zeros((4, truth.max_sources, 3, 3), np.float32)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = outcome(lambda: load_estimates(path))
        if found is not None and len(found) == len(truth):
            assert np.isfinite(score(found.padded(truth.max_sources), truth).k_loc)

    fuzz(check, damaged_arrays(Whole(arrays)) | damaged_bytes(Whole(content)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(RunConfig().replaced({**TINY, "budget.scenes": 32}), folder)
    list(trainer.run())
    return trainer


def test_damaged_checkpoints(run: Trainer, tmp_path: Path) -> None:
    contents = [Whole((run.directory / name).read_bytes()) for name in (checkpoint.LAST, checkpoint.BEST)]

    def check(data: bytes) -> None:
        for name in (checkpoint.LAST, checkpoint.BEST):
            (tmp_path / name).write_bytes(data)
        outcome(lambda: load_network(tmp_path))
        outcome(lambda: Trainer(run.config, tmp_path))

    fuzz(check, st.one_of([damaged_bytes(content) for content in contents]))


@st.composite
def forged(draw: st.DrawFn, good: Whole[tuple[dict[str, torch.Tensor], dict[str, Any]]]) -> Callable[[Path], None]:
    """A checkpoint that is whole by its digest and was written by some other program, or with ill will."""
    tensors, state = good.value
    chosen = dict(tensors)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(chosen)))
        value = chosen.pop(name)
        match draw(st.sampled_from(["remove", "rename", "shape", "kind", "nan"])):
            case "rename":
                chosen[draw(st.sampled_from([f"{name}.x", "optimizer.x.y", "optimizer", "random.cpu"]))] = value
            case "shape":
                chosen[name] = value.reshape(-1)[: draw(st.integers(0, 3))].clone()
            case "kind":
                chosen[name] = value.to(draw(st.sampled_from([torch.float16, torch.int64, torch.bool])))
            case "nan" if value.dtype.is_floating_point:
                chosen[name] = value * float("nan")
    told = draw(st.just(state) | damaged_trees(Whole(state)))
    text = json.dumps(told) if draw(st.integers(0, 5)) else draw(st.text(max_size=20))

    def write(path: Path) -> None:
        header = {"format": checkpoint.FORMAT, "state": text, "digest": checkpoint._digest(chosen, text)}
        save_file(chosen, path, metadata=header)

    return write


def test_forged_checkpoints(run: Trainer, tmp_path: Path) -> None:
    good = [Whole(checkpoint.read(run.directory / name)) for name in (checkpoint.LAST, checkpoint.BEST)]

    def check(write: Callable[[Path], None]) -> None:
        write(tmp_path / checkpoint.LAST)
        (tmp_path / checkpoint.BEST).write_bytes((tmp_path / checkpoint.LAST).read_bytes())
        outcome(lambda: load_network(tmp_path))
        outcome(lambda: Trainer(run.config, tmp_path))

    fuzz(check, st.one_of([forged(each) for each in good]))


def test_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_program", lambda *_: None)  # not read here, and slow to make
    monkeypatch.setattr(torch.export, "save", lambda program, path: path.write_bytes(b""))
    config = RunConfig().replaced(TINY)
    folder = tmp_path / "bundle"
    save_bundle(folder, Network(config.network), config.inference, config.scene)
    manifest = folder / MANIFEST
    content = manifest.read_bytes()

    def check(data: bytes) -> None:
        manifest.write_bytes(data)
        outcome(lambda: load_bundle(folder, form="weights"))

    trees = damaged_trees(Whole(json.loads(content))).map(lambda tree: json.dumps(tree).encode())
    fuzz(check, damaged_bytes(Whole(content)) | trees)
