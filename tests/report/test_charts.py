"""Charts: well-formed, escaped, finite, small, and with points where they belong."""

import itertools
import math
import re
import time
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_hpo.report import charts
from ris_hpo.report.charts import Axis, Canvas, Cells, Dots, Level, Line, Marks

STANDALONE = Canvas(standalone=True, title="Error & <noise>")
VALUES = st.floats(-1e6, 1e6)


def parsed(svg):
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "nan" not in svg
    assert "inf" not in re.sub(r">[^<]*<", "><", svg)
    return root


@given(st.lists(st.tuples(VALUES, VALUES), max_size=30), st.booleans())
def test_any_points_make_well_formed_text(points, log):
    series = [Line(points, label="a"), Dots(points, "good", "b"), Marks(points[:2], "bad", "c", "cross")]
    x = Axis.over("x", [a for a, _ in points], log=log)
    y = Axis("y", *charts.robust([b for _, b in points]))
    parsed(charts.plot(series, x, y, STANDALONE, [Level(0.0, "zero")]))


@given(st.floats(-1e5, 1e5), st.floats(1e-6, 1e6), st.integers(2, 12))
def test_ticks_lie_on_the_axis_and_are_round(low, length, about):
    axis = Axis("x", low, low + length)
    ticks = axis.ticks(about)
    assert all(axis.low - 1e-6 * length <= value <= axis.high + 1e-6 * length for value, _ in ticks)
    assert len(ticks) <= about + 2


def test_a_point_stands_where_its_value_says():
    axis = Axis("x", 10.0, 20.0)
    assert [axis.share(value) for value in (10, 15, 20, 5, 99)] == [0, 0.5, 1, 0, 1]
    assert Axis("x", 1e-4, 1e-2, log=True).share(1e-3) == pytest.approx(0.5)
    assert Axis("x", 1e-4, 1e-2, log=True).share(-1) == 0


def test_line_breaks_at_a_value_that_is_not_finite():
    svg = charts.plot([Line([(0, 1.0), (1, math.nan), (2, 2.0), (3, 3.0)])], Axis("x", 0, 3), Axis("y", 0, 3), Canvas())
    path = parsed(svg).findall(".//path[@class='line ']")[0].get("d")
    assert path.count("M") == 2
    assert path.count("L") == 1


def test_text_is_escaped_and_described():
    svg = charts.plot([Line([(0, 0)], label="<script>")], Axis('"x"', 0, 1), Axis("y & z", 0, 1), STANDALONE)
    root = parsed(svg)
    assert "<script>" not in svg
    assert root.get("aria-label") == "Error & <noise>"


def test_levels_that_are_close_keep_readable_names():
    levels = [Level(1.0, "floor"), Level(1.01, "ml"), Level(1.02, "base")]
    root = parsed(charts.plot([], Axis("x", 0, 1), Axis("y", 0, 7), Canvas(), levels))
    heights = sorted(float(text.get("y")) for text in root.iter("text") if text.text in {"floor", "ml", "base"})
    assert all(b - a >= 12.9 for a, b in itertools.pairwise(heights))


def test_every_kind_of_chart_is_well_formed():
    parsed(charts.matrix([[3, 1], [0, 0]], ["1", "2"], ["1", "2"], ("true", "estimated"), STANDALONE))
    parsed(charts.ruler([("floor", 1.0, "mark"), ("best", 1.0, "accent")], Axis("k_loc", 0, 7), STANDALONE))
    parsed(charts.intervals([("a", -math.inf, 0.1, math.inf, "good")], "difference", STANDALONE))
    axes = [Axis.over("a", [1e-5, 1], log=True), Axis.of("b", ["x", "y"]), Axis("k_loc", 0, 7)]
    parsed(charts.parallel(axes, [[1e-3, 1.0, 2.0], [1e-2, None, 3.0]], ["q1", "q2"], STANDALONE))
    small = charts.plot([], Axis("x", 0, 1), Axis("y", 0, 1), Canvas(200, 200))
    parsed(charts.side_by_side([small, small], STANDALONE))


def test_a_heat_map_covers_the_plane_and_stays_small():
    values = [[math.sin(x / 5) * math.cos(y / 5) for x in range(121)] for y in range(61)]
    svg = charts.plot([Cells(values)], Axis("x", -60, 60), Axis("y", -30, 30), STANDALONE)
    parsed(svg)
    assert len(svg) < 150_000
    flat = charts.plot([Cells([[1.0, 1.0]])], Axis("x", 0, 1), Axis("y", 0, 1), STANDALONE)
    parsed(flat)


def test_a_chart_costs_milliseconds():
    curve = [(20_000.0 * i, 5 * math.exp(-i / 10)) for i in range(50)]
    begun = time.process_time()  # whatever else the machine does
    for _ in range(20):
        charts.plot([Line(curve)], Axis("x", 0, 1e6), Axis("y", 0, 7), STANDALONE, [Level(1.0, "floor")])
    assert (time.process_time() - begun) / 20 < 0.02
