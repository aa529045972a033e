"""Figures: well-formed, escaped, finite, small, themed, and with names where they can be read."""

import itertools
import math
import re
import time
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_hpo import drawing
from ris_hpo.drawing import LIGHT, as_svg, bulk, dots, frames, legend, levels, logarithmic, room_for, write
from ris_hpo.errors import OutputError
from ris_hpo.text import short_number

VALUES = st.floats(-1e6, 1e6)
LEVELS = [(1.0, "floor 1.00", "mark"), (1.01, "ml 1.01", "warn"), (1.02, "base 1.02", "soft")]


def drawn(draw, width=720, height=300, describe="a figure", **options):
    svg = as_svg(draw, width, height, describe, **options)
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "nan" not in svg
    return svg, root


def texts(root):
    return {each.text: each for each in root.iter("{http://www.w3.org/2000/svg}text")}


def line(figure, **options):
    (axes,) = frames(figure, x="scenes", y="k_loc", **options)
    axes.plot([0, 1, 2], [3.0, 2.0, 1.5], color=LIGHT["accent"], label="network")
    return axes


@given(st.lists(st.tuples(VALUES, VALUES), max_size=30))
def test_any_points_make_well_formed_text(points):
    def draw(figure):
        (axes,) = frames(figure, x="x", y="y", heading="points")
        dots(axes, [x for x, _ in points], [y for _, y in points], "good", 5, "some")
        axes.set_xlim(*bulk([x for x, _ in points], 1.0))
        axes.set_ylim(*bulk([y for _, y in points]))
        legend(figure)
        levels(axes, [(0.0, "zero", "mark")])

    drawn(draw)


@given(st.floats(1e-5, 1e5), st.floats(1.01, 1e6))
def test_a_logarithmic_axis_has_ticks_within_its_ends(low, ratio):
    ticks = drawing.log_ticks(low, low * ratio).tick_values(low, low * ratio)
    inside = [each for each in ticks if low <= each <= low * ratio]
    assert len(inside) <= 10
    assert inside or ratio < 2.6  # 1, 2, 5: the widest gap


def test_text_is_escaped_and_never_read_as_mathematics():
    svg, root = drawn(lambda figure: line(figure, heading="a < b & $x^2$"), describe='"quoted" <b>')
    assert "a < b & $x^2$" in texts(root)
    assert root.get("aria-label") == '"quoted" <b>'
    assert "<b>" not in svg


def test_colours_follow_the_page_and_a_file_brings_its_style():
    svg, root = drawn(line)
    assert "var(--accent)" in svg
    assert not re.search("#[0-9a-f]{6}", svg)
    assert not list(root.iter("{http://www.w3.org/2000/svg}style"))
    alone, _ = drawn(line, standalone=True)
    assert drawing.STYLE in alone
    assert all(f"--{name}:{colour}" in drawing.STYLE for name, colour in LIGHT.items())
    assert set(LIGHT) == set(drawing.DARK)


def test_the_same_figure_is_the_same_text_and_two_figures_share_no_names():
    def names(svg):
        return set(re.findall(r'id="([^"]+)"', svg))

    first, again, other = (drawn(line, describe=text)[0] for text in ("one", "one", "two"))
    assert first == again
    assert names(first)
    assert not names(first) & names(other)


def test_names_of_close_levels_stand_apart():
    def draw(figure):
        axes = line(figure, right=room_for(LEVELS))
        axes.set_ylim(0, 7)
        levels(axes, LEVELS)

    found = texts(drawn(draw)[1])
    heights = sorted(float(found[name].get("y")) for _, name, _ in LEVELS)
    assert all(b - a >= 12.9 for a, b in itertools.pairwise(heights))


def test_a_level_outside_the_axis_is_named_at_its_edge():
    def draw(figure):
        axes = line(figure)
        axes.set_ylim(2, 4)
        levels(axes, [(1.0, "floor", "mark"), (9.0, "worst", "bad"), (3.0, "base", "soft")])

    svg, root = drawn(draw)
    assert {"floor ↓", "worst ↑", "base"} <= set(texts(root))
    assert svg.count("stroke: var(--mark)") == 0
    assert svg.count("stroke: var(--soft); stroke-dasharray") + svg.count("stroke-dasharray") >= 1


@pytest.mark.parametrize(("width", "rows"), [(960, 1), (200, 3)])
def test_a_legend_takes_the_rows_it_needs(width, rows):
    def draw(figure):
        (axes,) = frames(figure, x="x", y="y")
        for name in ("complete trials", "pruned trials", "best so far"):
            axes.plot([0, 1], [0, 1], label=name)
        legend(figure)

    found = texts(drawn(draw, width)[1])
    heights = {round(float(found[name].get("y"))) for name in ("complete trials", "pruned trials", "best so far")}
    assert len(heights) == rows


def test_panels_stand_in_rows_with_their_titles():
    def draw(figure):
        frames(figure, ["a", "b", "c", "d"], x="x", y="y", columns=2)

    found = texts(drawn(draw, 800, 600)[1])
    places = {name: (float(found[name].get("x")), float(found[name].get("y"))) for name in "abcd"}
    assert places["a"][1] == places["b"][1] < places["c"][1] == places["d"][1]
    assert places["a"][0] == places["c"][0] < places["b"][0] == places["d"][0]


@pytest.mark.parametrize("ends", [(5.1073, 5.1081), (0.0, 7.0), (-0.2, 0.1), (1000.0, 1002.0), (0.0, 400_000.0)])
def test_neighbouring_ticks_have_texts_of_their_own(ends):
    def draw(figure):
        (axes,) = frames(figure, x="x", y="y")
        axes.set_xticks([])
        axes.set_ylim(*ends)

    shown = [text for text in texts(drawn(draw)[1]) if text not in ("x", "y")]
    root = drawn(draw)[1]
    labels = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text") if each.text not in ("x", "y")]
    assert len(labels) == len(shown) > 2  # a dictionary would have swallowed a double
    assert max(map(len, labels)) <= 7


def test_an_axis_shows_the_bulk_and_every_mark():
    low, high = bulk([1.0] * 5 + [2.0] * 4 + [100.0])
    assert 0.9 < low < 1
    assert 2 < high < 2.2
    assert bulk([1.0, 2.0], marks=[5.0])[1] > 5
    assert bulk([math.nan, math.inf, 1.0], 1.0)[1] < 2
    assert bulk([]) == (0.0, 1.0)


def test_many_points_stay_small_and_quick():
    def draw(figure):
        (axes,) = frames(figure, x="x", y="y")
        axes.set_xlim(0, 1000)
        axes.set_ylim(-1, 1)
        dots(axes, range(1000), [math.sin(x) for x in range(1000)], "accent", 4)

    svg, _ = drawn(draw)
    assert len(svg) < 40_000
    assert svg.count("M ") > 1000
    begun = time.process_time()  # whatever else the machine does
    for _ in range(5):
        drawn(line)
    assert (time.process_time() - begun) / 5 < 0.5


def test_a_logarithmic_panel_and_categories():
    def draw(figure):
        first, second = frames(figure, ["log", "names"], x="x", y="y")
        first.plot([1, 2], [0.01, 10])
        logarithmic(first, "y", 0.01, 10)
        second.plot([0, 1], [1, 2])
        drawing.categories(second, ["spectra", "a category whose name is much too long for the room that it has"])

    found = set(texts(drawn(draw, 500)[1]))
    assert {"0.01", "0.1", "1", "10", "spectra"} <= found
    assert any(text.endswith("…") for text in found if text)


@pytest.mark.parametrize(("name", "head"), [("f.png", b"\x89PNG"), ("f.pdf", b"%PDF"), ("f.svg", b"<?xml")])
def test_files_of_every_kind(tmp_path, name, head):
    write(line, 400, 200, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(head)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(OutputError):
        write(line, 400, 200, tmp_path / "missing" / name)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1e-5, "1e-05"), (50_000, "50k"), (2e6, "2M"), (-3.0, "-3")],
)
def test_short_numbers(value, text):
    assert short_number(value) == text
