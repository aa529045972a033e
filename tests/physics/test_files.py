"""Scene and estimate files: round trips, and one clear line for every way a file can be wrong."""

import dataclasses
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from ris_hpo.errors import ConfigError, OutputError, SceneFileError
from ris_hpo.physics import containers
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.containers import open_arrays
from ris_hpo.physics.files import load_estimates, load_scenes, open_scenes, save_estimates, save_scenes
from ris_hpo.physics.scene import Scenes, SceneSpec, simulate
from ris_hpo.physics.sources import Sources

SPEC = SceneSpec(geometry=Geometry(num_horizontal=4, num_vertical=3), num_antennas=4, num_snapshots=3)


@pytest.fixture
def scenes() -> Scenes:
    return simulate(SPEC, 1, range(6))


@pytest.fixture
def arrays(scenes: Scenes, tmp_path: Path) -> dict[str, np.ndarray]:
    save_scenes(tmp_path / "good.npz", scenes)
    with np.load(tmp_path / "good.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def test_scenes_round_trip_with_everything_known(scenes, tmp_path):
    save_scenes(tmp_path / "s.npz", scenes)
    back = load_scenes(tmp_path / "s.npz")
    assert back.geometry == scenes.geometry
    for name in ("y", "bs_ris_channel", "ris_codes", "noise_power", "snr_db", "symbols"):
        assert torch.equal(getattr(back, name), getattr(scenes, name)), name
    mask = scenes.truth.mask
    assert torch.equal(back.truth.mask, mask)
    for name in ("azimuth", "elevation", "range_m", "power"):
        assert torch.equal(getattr(back.truth, name)[mask], getattr(scenes.truth, name)[mask])
        assert torch.isfinite(getattr(back.truth, name)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_the_file_is_as_documented(arrays):
    expected = {
        "y": ("complex64", (6, 3, 4)),
        "bs_ris_channel": ("complex64", (6, 4, 12)),
        "ris_codes": ("complex64", (6, 3, 12)),
        "noise_power": ("float32", (6,)),
        "num_sources": ("int64", (6,)),
        "azimuth": ("float32", (6, 5)),
        "elevation": ("float32", (6, 5)),
        "range_m": ("float32", (6, 5)),
        "snr_db": ("float32", (6,)),
    }
    for name, (dtype, shape) in expected.items():
        assert (arrays[name].dtype.name, arrays[name].shape) == (dtype, shape), name
    beyond = np.arange(5) >= arrays["num_sources"][:, None]
    assert np.isnan(arrays["range_m"]).tolist() == beyond.tolist()


def test_a_file_without_truth_or_geometry_is_enough(arrays, tmp_path):
    bare = {name: arrays[name] for name in ("y", "bs_ris_channel", "ris_codes", "noise_power")}
    np.savez(tmp_path / "bare.npz", **bare)
    back = load_scenes(tmp_path / "bare.npz", SPEC.geometry)
    assert back.truth is None
    assert back.geometry == SPEC.geometry
    with pytest.raises(SceneFileError, match=r"'bs_ris_channel' has N = 12 elements, expected 12 x 12 = 144"):
        load_scenes(tmp_path / "bare.npz")


def test_what_is_known_beforehand_travels_along(tmp_path):
    scenes = simulate(SPEC.replaced({"elevation_deg": (0.0, 0.0)}), 1, range(3))
    save_scenes(tmp_path / "s.mat", scenes)
    assert torch.equal(load_scenes(tmp_path / "s.mat").truth.given, scenes.truth.given)


def test_the_true_channel_travels_along(tmp_path):
    scenes = simulate(SPEC.replaced({"channel_error_db": (-10.0, -10.0)}), 1, range(2))
    save_scenes(tmp_path / "s.npz", scenes)
    assert torch.equal(load_scenes(tmp_path / "s.npz").true_channel, scenes.true_channel)


def test_the_true_noise_power_travels_along(tmp_path):
    scenes = simulate(SPEC.replaced({"noise_power_error_db": 6.0}), 1, range(3))
    save_scenes(tmp_path / "s.npz", scenes)
    back = load_scenes(tmp_path / "s.npz")
    assert torch.equal(back.true_noise_power, scenes.true_noise_power)
    assert torch.equal(back.noise_power, scenes.noise_power)


@pytest.mark.parametrize("lacking", [("range_m",), ("azimuth", "elevation"), ("azimuth", "elevation", "range_m")])
def test_a_truth_may_be_incomplete(lacking, scenes, arrays, tmp_path):
    """A coordinate that is not in the file is NaN for every source, and is not written back."""
    for name in lacking:
        del arrays[name]
    np.savez(tmp_path / "partial.npz", **arrays)
    back = load_scenes(tmp_path / "partial.npz")
    assert back.truth is None
    known = back.partial_truth
    assert torch.equal(known.num_sources, scenes.truth.num_sources)
    for name in ("azimuth", "elevation", "range_m"):
        value = getattr(known, name)[known.mask]
        if name in lacking:
            assert value.isnan().all()
        else:
            assert torch.equal(value, getattr(scenes.truth, name)[scenes.truth.mask])
    save_scenes(tmp_path / "again.npz", back)
    with np.load(tmp_path / "again.npz") as again:
        assert {"num_sources", "azimuth", "elevation", "range_m"} - set(again.files) == set(lacking)
    joined = Scenes.cat([back[:2], back[2:]])
    assert torch.equal(joined.known_truth().mask, known.mask)
    with pytest.raises(ConfigError, match=f"lacks {', '.join(lacking)}"):
        back.require_truth()


def test_counts_alone_have_one_width_in_every_part_of_a_file(arrays, tmp_path):
    for name in ("azimuth", "elevation", "range_m", "power", "symbols"):
        del arrays[name]
    arrays["num_sources"] = np.array([1, 1, 2, 4, 1, 1])
    np.savez(tmp_path / "counts.npz", **arrays)
    with open_scenes(tmp_path / "counts.npz") as file:
        parts = Scenes.cat(list(file.parts(2)))
    assert parts.known_truth().num_sources.tolist() == [1, 1, 2, 4, 1, 1]


def test_a_truth_can_be_left_aside(arrays, tmp_path):
    """Whatever it is: a method that needs none must not fail because of it."""
    arrays["azimuth"] = np.array(["north"])
    arrays["num_sources"] = np.full(6, -1)
    np.savez(tmp_path / "odd.npz", **arrays)
    back = load_scenes(tmp_path / "odd.npz", truth=False)
    assert back.truth is None
    assert back.partial_truth is None
    with pytest.raises(SceneFileError, match="azimuth"):
        load_scenes(tmp_path / "odd.npz")


def changed(name: str, function):
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = function(arrays[name])

    return change


def with_value(value, *index):
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return change


def removed(name: str):
    return lambda arrays: arrays.pop(name)


MALFORMED = {
    "y missing": (removed("y"), r"array 'y' is missing"),
    "codes missing": (removed("ris_codes"), r"array 'ris_codes' is missing"),
    "y wrong rank": (changed("y", lambda a: a[0]), r"'y' has shape \(3, 4\), expected \(B, L, M\)"),
    "y empty": (changed("y", lambda a: a[:0]), r"'y' has shape \(0, 3, 4\)"),
    "y real": (changed("y", lambda a: a.real), r"'y' has dtype float32, expected complex64"),
    "y nan": (changed("y", with_value(np.nan, 0, 0, 0)), r"'y': every value must be finite; 1 of 72"),
    "y inf": (changed("y", with_value(np.inf, 1, 0, 0)), r"'y': every value must be finite"),
    "channel scenes": (
        changed("bs_ris_channel", lambda a: a[:2]),
        r"'bs_ris_channel' has shape \(2, 4, 12\), expected \(6, 4, N\)",
    ),
    "channel antennas": (changed("bs_ris_channel", lambda a: a[:, :3]), r"'bs_ris_channel' has shape \(6, 3, 12\)"),
    "codes elements": (
        changed("ris_codes", lambda a: a[..., :5]),
        r"'ris_codes' has shape \(6, 3, 5\), expected \(6, 3, 12\) = \[B, L, N\]",
    ),
    "noise zero": (changed("noise_power", with_value(0, 0)), r"'noise_power': every value must be positive"),
    "noise shape": (changed("noise_power", lambda a: a[:, None]), r"'noise_power' has shape \(6, 1\)"),
    "count large": (changed("num_sources", with_value(9, 0)), r"'num_sources': every value must lie within 0..5"),
    "count missing": (removed("num_sources"), r"array 'num_sources' is missing; a truth needs it"),
    "azimuth degrees": (changed("azimuth", with_value(45.0, 0, 0)), r"'azimuth': radians"),
    "azimuth nan": (changed("azimuth", with_value(np.nan, 0, 0)), r"'azimuth': values of a source must be finite"),
    "no slots": (
        lambda arrays: arrays.update({name: arrays[name][:, :0] for name in ("azimuth", "elevation", "range_m")}),
        r"'azimuth' has shape \(6, 0\): no place for a source",
    ),
    "range negative": (changed("range_m", with_value(-1.0, 0, 0)), r"'range_m': every range must be positive"),
    "range width": (changed("range_m", lambda a: a[:, :4]), r"'range_m' has shape \(6, 4\), expected \(6, 5\)"),
    "snr shape": (changed("snr_db", lambda a: a[:3]), r"'snr_db' has shape \(3,\), expected \(6\)"),
    "symbols shape": (changed("symbols", lambda a: a[..., :2]), r"'symbols' has shape \(6, 3, 2\)"),
    "power negative": (changed("power", with_value(-1.0, 0, 0)), r"'power': no value may be negative"),
    "geometry text": (changed("geometry_json", lambda a: np.array("{")), r"'geometry_json' does not describe"),
    "geometry key": (changed("geometry_json", lambda a: np.array('{"n": 1}')), r"unknown key 'n'"),
    "geometry type": (changed("geometry_json", lambda a: np.zeros(3)), r"'geometry_json' has shape \(3,\)"),
    "geometry size": (
        changed("geometry_json", lambda a: np.array('{"num_horizontal": 5}')),
        r"N = 12 elements, expected 5 x 12 = 60",
    ),
    "pickled": (changed("y", lambda a: np.array([{"x": 1}], dtype=object)), r"not a readable npz archive"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_every_misfit_is_named(case, arrays, tmp_path):
    change, message = MALFORMED[case]
    change(arrays)
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(SceneFileError, match=message) as caught:
        load_scenes(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_archive_is_refused(tmp_path):
    with pytest.raises(SceneFileError, match="no such file"):
        load_scenes(tmp_path / "none.npz")
    with pytest.raises(SceneFileError, match=r"no file in it ends in"):
        load_scenes(tmp_path)
    path = tmp_path / "x.npz"
    for content in (b"", b"plain text", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(SceneFileError, match="not a readable"):
            load_scenes(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(SceneFileError, match="single array"):
        load_scenes(tmp_path / "one.npy")


def test_a_truncated_archive_is_refused(scenes, tmp_path):
    path = tmp_path / "s.npz"
    save_scenes(path, scenes)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(SceneFileError):
            load_scenes(path)


def test_an_unwritable_place_leaves_nothing(scenes, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        save_scenes(tmp_path / "no" / "such" / "s.npz", scenes)
    with pytest.raises(OutputError, match="cannot be written"):
        save_scenes(tmp_path, scenes)
    assert list(tmp_path.iterdir()) == []
    assert not [name for name in os.listdir(tmp_path.parent) if name.endswith(".tmp")]


def test_estimates_round_trip_with_present_sources_first(tmp_path):
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    mask = torch.tensor([[False, True, True], [False, False, False]])
    covariance = torch.eye(3).expand(2, 3, 3, 3) * values[..., None, None]
    save_estimates(tmp_path / "e.npz", Sources(values, -values, 1 + values, values, mask, values, covariance))
    back = load_estimates(tmp_path / "e.npz")
    assert back.num_sources.tolist() == [2, 0]
    torch.testing.assert_close(back.azimuth[0, :2], torch.tensor([0.2, 0.3]))
    torch.testing.assert_close(back.existence[0], torch.tensor([0.2, 0.3, 0.1]))
    torch.testing.assert_close(back.covariance_m2[0, 0], 0.2 * torch.eye(3))
    with np.load(tmp_path / "e.npz", allow_pickle=False) as archive:
        assert {"num_sources", "azimuth", "elevation", "range_m", "existence"} <= set(archive.files)
        assert np.isnan(archive["azimuth"][1]).all()


def test_estimates_without_optional_fields_and_malformed_ones(tmp_path):
    one = torch.ones(2, 3)
    path = tmp_path / "e.npz"
    save_estimates(path, Sources(one, one, one, one, one > 0))
    assert load_estimates(path).covariance_m2 is None
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["existence"] = arrays["existence"] * 2
    np.savez(path, **arrays)
    with pytest.raises(SceneFileError, match="'existence': every value must be a probability"):
        load_estimates(path)
    del arrays["existence"]
    np.savez(path, **arrays)
    with pytest.raises(SceneFileError, match="'existence' is missing"):
        load_estimates(path)


# -- files as people have them ---------------------------------------------------------------------------------------


def same_scenes(found: Scenes, expected: Scenes) -> None:
    for name in ("y", "bs_ris_channel", "ris_codes", "noise_power", "snr_db", "symbols"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    mask = expected.truth.mask
    assert torch.equal(found.truth.mask, mask)
    assert torch.equal(found.truth.range_m[mask], expected.truth.range_m[mask])
    assert found.geometry == expected.geometry


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".h5", ".hdf5"])
def test_every_kind_of_file_is_written_and_read(suffix, scenes, tmp_path):
    save_scenes(tmp_path / f"s{suffix}", scenes)
    same_scenes(load_scenes(tmp_path / f"s{suffix}"), scenes)
    save_estimates(tmp_path / f"e{suffix}", scenes.truth)
    assert load_estimates(tmp_path / f"e{suffix}").num_sources.tolist() == scenes.truth.num_sources.tolist()


def test_the_kind_is_told_from_the_contents_not_the_name(scenes, tmp_path):
    save_scenes(tmp_path / "s.mat", scenes)
    (tmp_path / "s.mat").rename(tmp_path / "s.npz")
    with open_scenes(tmp_path / "s.npz") as file:
        assert file.kind == "MATLAB 5"


def matlab_7_3(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """What MATLAB's ``save -v7.3`` writes: HDF5 behind a block of text, axes reversed, complex numbers as pairs."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in arrays.items():
            if value.dtype.kind == "U":
                value = np.array([[ord(letter)] for letter in str(value)], dtype=np.uint16)
                kind = "char"
            elif value.dtype.kind == "c":
                pairs = np.empty(value.shape, dtype=[("real", "<f8"), ("imag", "<f8")])
                pairs["real"], pairs["imag"] = value.real, value.imag
                value, kind = pairs, "double"
            else:
                value, kind = np.atleast_2d(value.astype(np.float64)), "double"
            file.create_dataset(name, data=value.T).attrs["MATLAB_class"] = np.bytes_(kind)
    with path.open("r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")


def test_matlab_7_3_files_are_read(arrays, scenes, tmp_path):
    matlab_7_3(tmp_path / "s.mat", arrays)
    with open_scenes(tmp_path / "s.mat") as file:
        assert file.kind == "MATLAB 7.3"
        same_scenes(file.read(), scenes)
        assert torch.equal(file.read(2, 4).y, scenes.y[2:4])


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (1, 3, 4, 2), (2, 1, 1, 5)], ids=str)
def test_matlab_drops_ones_at_the_end_of_a_shape(counts, tmp_path):
    batch, snapshots, antennas, slots = counts
    spec = SPEC.replaced(
        {"num_snapshots": snapshots, "num_antennas": antennas, "max_sources": slots, "num_sources": (1, 1)}
    )
    scenes = simulate(spec, 3, range(batch))
    save_scenes(tmp_path / "s.mat", scenes)
    same_scenes(load_scenes(tmp_path / "s.mat"), scenes)


@pytest.mark.parametrize(
    ("wide", "real", "whole"),
    [("complex128", "float64", "int32"), (">c8", ">f4", ">i8"), ("complex64", "float16", "float64")],
    ids=["double", "big endian", "half and doubles"],
)
def test_values_that_survive_a_cast_are_cast(wide, real, whole, arrays, scenes, tmp_path):
    for name, value in arrays.items():
        if name != "geometry_json":
            kind = wide if value.dtype.kind == "c" else whole if value.dtype.kind == "i" else real
            arrays[name] = np.asfortranarray(value.astype(kind))
    np.savez_compressed(tmp_path / "s.npz", **arrays)
    found = load_scenes(tmp_path / "s.npz")
    assert torch.equal(found.y, scenes.y)
    torch.testing.assert_close(found.noise_power, scenes.noise_power, rtol=1e-3, atol=1e-5)
    assert found.truth.num_sources.tolist() == scenes.truth.num_sources.tolist()


def test_values_that_a_cast_would_lose_are_refused(arrays, tmp_path):
    arrays["y"] = arrays["y"].astype(np.complex128) * 1e-60
    arrays["num_sources"] = arrays["num_sources"] + 0.5
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(SceneFileError, match=r"(?s)'y': every value must fit single precision.*'num_sources': whole"):
        load_scenes(tmp_path / "s.npz")


def test_one_channel_one_code_book_and_one_noise_power_serve_all_scenes(arrays, scenes, tmp_path):
    for name in ("bs_ris_channel", "ris_codes", "noise_power"):
        arrays[name] = arrays[name][0]
    for path in (tmp_path / "s.npz", tmp_path / "s.mat"):
        np.savez(path, **arrays) if path.suffix == ".npz" else matlab_7_3(path, arrays)
        with open_scenes(path) as file:
            found = file.read()
            assert sum("serves all scenes" in remark for remark in file.remarks) == 3
        assert len(found) == 6
        for scene in range(6):
            assert torch.equal(found[scene : scene + 1].bs_ris_channel[0], scenes.bs_ris_channel[0])
            assert torch.equal(found.ris_codes[scene], scenes.ris_codes[0])
            assert found.noise_power[scene] == scenes.noise_power[0]
        assert found.noise_power.shape == (6,)
        assert found.bs_ris_channel.stride(0) == 0  # one copy in memory


def test_a_refusal_lists_everything(arrays, tmp_path):
    arrays["y"] = arrays["y"].astype(str)
    arrays["bs_ris_channel"] = arrays["bs_ris_channel"].swapaxes(1, 2)[:, :, :3]
    arrays["ris_codes"] = arrays["ris_codes"][:, :2]
    del arrays["num_sources"]
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(SceneFileError) as caught:
        load_scenes(tmp_path / "s.npz")
    for name in ("'y'", "'bs_ris_channel'", "'ris_codes'", "'num_sources' is missing"):
        assert name in str(caught.value), name
    assert "\n" not in str(caught.value)


def test_exchanged_axes_are_named(arrays, tmp_path):
    arrays["bs_ris_channel"] = arrays["bs_ris_channel"].swapaxes(1, 2)
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(SceneFileError, match=r"it looks like \[B, N, M\]: exchange the last two axes"):
        load_scenes(tmp_path / "s.npz")


def test_what_a_file_does_not_say_is_known(arrays, tmp_path):
    del arrays["geometry_json"], arrays["noise_power"]
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(SceneFileError, match="state it with --surface"):
        open_scenes(tmp_path / "s.npz")
    with open_scenes(tmp_path / "s.npz", SPEC.geometry) as file:
        assert (file.states_surface, file.has_noise_power, file.has_truth) == (False, False, True)
        assert torch.isnan(file.read().noise_power).all()
    with pytest.raises(SceneFileError, match="'noise_power' is missing"):
        load_scenes(tmp_path / "s.npz", SPEC.geometry)


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".h5"])
def test_a_file_is_written_in_parts_as_in_one_piece(suffix, scenes, tmp_path):
    save_scenes(tmp_path / f"s{suffix}", (scenes[first : first + 4] for first in (0, 4)))
    same_scenes(load_scenes(tmp_path / f"s{suffix}"), scenes)
    assert [path.name for path in tmp_path.iterdir()] == [f"s{suffix}"]
    with pytest.raises(OutputError, match="not every part has snr_db"):
        save_scenes(tmp_path / f"t{suffix}", [scenes, dataclasses.replace(scenes, snr_db=None)])
    assert [path.name for path in tmp_path.iterdir()] == [f"s{suffix}"]


def test_a_few_parts_are_in_memory_however_many_are_written(scenes, tmp_path):
    alive = []

    def parts():
        for _ in range(9):
            part = scenes[:2]._map(torch.clone)
            alive.append(weakref.ref(part.y))
            yield part
            del part
            assert sum(reference() is not None for reference in alive) <= 3

    save_scenes(tmp_path / "s.npz", parts())
    assert len(load_scenes(tmp_path / "s.npz")) == 18


def test_what_matlab_5_cannot_hold_is_refused(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "_MATLAB_BYTES", 100)
    with pytest.raises(OutputError, match=r"a MATLAB 5 file holds less than 2 in an array; write \.h5 instead"):
        save_scenes(tmp_path / "s.mat", scenes)


def test_a_large_compressed_archive_is_unpacked_to_disk(arrays, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "_HELD_BYTES", 100)
    np.savez_compressed(tmp_path / "s.npz", **arrays)
    with open_scenes(tmp_path / "s.npz") as file:
        same_scenes(file.read(), scenes)
        assert torch.equal(file.read(2, 4).y, scenes.y[2:4])
    with open_arrays(tmp_path / "s.npz") as opened:
        assert isinstance(opened["y"], np.memmap)
    monkeypatch.setattr(containers.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(SceneFileError, match=r"unpacked 'y.npy' takes [\d,]+ bytes, 10 are free"):
        open_scenes(tmp_path / "s.npz")


def test_the_files_of_a_folder_are_read_as_one(scenes, tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    for name, part in (("b.h5", scenes[3:4]), ("a.npz", scenes[:3]), ("c.npz", scenes[4:])):
        save_scenes(folder / name, part)
    (folder / ".partial.npz").touch()
    (folder / "notes.txt").touch()
    with open_scenes(folder) as file:
        assert (len(file), file.kind) == (6, "folder of 3 files, npz")
        assert [len(part) for part in file.parts(4)] == [4, 2]
        same_scenes(file.read(), scenes)
        assert torch.equal(file.read(2, 5).y, scenes.y[2:5])
        assert len(file.read(4, 4)) == 0
    same_scenes(load_scenes(folder), scenes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_antennas": 3}, "size M is 3, that of a.npz is"),
        ({"geometry.wavelength_m": 0.2}, "surface is .* wavelength 0.2 m"),
        ({}, "truth is False, that of a.npz is True"),
    ],
    ids=["antennas", "surface", "truth"],
)
def test_a_folder_of_files_that_differ_is_refused(change, message, scenes, tmp_path):
    save_scenes(tmp_path / "a.npz", scenes)
    other = simulate(SPEC.replaced(change), 3, range(2))
    save_scenes(tmp_path / "b.npz", other if change else dataclasses.replace(other, truth=None, symbols=None))
    with pytest.raises(SceneFileError, match=rf"b\.npz: {message}"):
        open_scenes(tmp_path)


def test_a_folder_without_scene_files_is_refused(tmp_path):
    with pytest.raises(SceneFileError, match=r"no file in it ends in \.npz"):
        open_scenes(tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_file_is_read_in_parts(suffix, scenes, tmp_path):
    save_scenes(tmp_path / f"s{suffix}", scenes)
    with open_scenes(tmp_path / f"s{suffix}") as file:
        parts = list(file.parts(4))
    assert [len(part) for part in parts] == [4, 2]
    same_scenes(Scenes.cat(parts), scenes)


def test_an_uncompressed_archive_is_mapped_not_loaded(scenes, tmp_path):
    save_scenes(tmp_path / "s.npz", scenes)
    with open_arrays(tmp_path / "s.npz") as arrays:
        assert isinstance(arrays["y"], np.memmap)
        assert np.array_equal(arrays["y"], scenes.y.numpy())


def test_damaged_matlab_and_hdf5_files_are_refused(scenes, tmp_path):
    for name in ("s.mat", "s.h5"):
        save_scenes(tmp_path / name, scenes)
        whole = (tmp_path / name).read_bytes()
        for size in (len(whole) // 2, 700, 200):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(SceneFileError):
                load_scenes(tmp_path / name)
    (tmp_path / "s.mat").write_bytes(
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(384) + b"\x89HDF\r\n\x1a\n"
    )
    with pytest.raises(SceneFileError, match=r"not a readable MATLAB 7\.3 file"):
        load_scenes(tmp_path / "s.mat")
