"""Charts: values lie where they belong, texts are escaped, marks are reachable."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from grandrounds.study.report.charts import (
    Point,
    Reference,
    Series,
    column_chart,
    legend,
    line_chart,
    tick_texts,
)
from grandrounds.study.report.page import template
from grandrounds.study.report.row_charts import Cell, Dot, Row, grid_chart, interval_chart
from grandrounds.study.report.svg import (
    MOST_MARKS,
    STYLES,
    Axis,
    Scale,
    element,
    log_ticks,
    nice_ticks,
    shape,
)

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    """Return the root; raises where it is not well-formed."""
    return ElementTree.fromstring(svg)


def marks(svg: str) -> list[ElementTree.Element]:
    return [e for e in parsed(svg).iter(f"{SVG}path") if "mark" in e.get("class", "").split()]


def test_a_scale_places_its_ends_and_its_middle() -> None:
    scale = Scale(10, 20, 100, 0)
    assert [scale(v) for v in (10, 15, 20)] == [100, 50, 0]


def test_a_logarithmic_scale_places_powers_at_even_distances() -> None:
    scale = Scale(0.1, 10, 0, 100, log=True)
    assert [scale(v) for v in (0.1, 1, 10)] == pytest.approx([0, 50, 100])


def test_ticks_are_round_numbers_within_the_range() -> None:
    assert nice_ticks(0, 1.3, 6) == pytest.approx([0, 0.5, 1.0])
    assert nice_ticks(-0.4, 0.4, 5) == pytest.approx([-0.4, -0.2, 0, 0.2, 0.4])
    assert nice_ticks(0, 3, 8, whole=True) == [0, 1, 2, 3]
    assert log_ticks(0.05, 4) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(1e-6, 1e-2) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])


def test_an_axis_has_one_notation() -> None:
    assert tick_texts([1e-4, 1e-3, 1e-2, 0.1]) == ["0.0001", "0.001", "0.01", "0.1"]
    assert tick_texts(log_ticks(1e-5, 1e-2)) == [
        f"{k}e{d}" for d in (-5, -4, -3) for k in (1, 2, 5)
    ] + ["1e-2"]
    assert tick_texts([0, 5e-5, 1e-4, 1.5e-4]) == ["0", "5e-5", "1e-4", "1.5e-4"]
    assert tick_texts([-0.5, 0, 0.25]) == ["-0.5", "0", "0.25"]
    assert tick_texts([0, 5_000, 10_000, 15_000]) == ["0", "5k", "10k", "15k"]
    assert tick_texts([10, 1_000, 100_000]) == ["1e1", "1e3", "1e5"]
    assert tick_texts([]) == []
    points = [Point(0, 9e-3, ""), Point(1, 5e-6, "")]
    svg = line_chart("t", [Series("", points)], Axis("", log=True), 1)
    texts = [e.text or "" for e in parsed(svg).iter(f"{SVG}text")]
    assert [text for text in texts if text.startswith(("0.0", "1e"))] == [
        "1e-5",
        "1e-4",
        "1e-3",
        "1e-2",
    ]


def test_a_legend_leaves_each_name_room_before_the_next_marker() -> None:
    """In DejaVu Sans of 13 units, "common facts known" is 139 wide, by the font's own table."""
    svg, _ = legend([("common facts known", "line 0"), ("rare", "line 1")])
    first, second = parsed(f'<svg xmlns="{SVG[1:-1]}">{svg}</svg>').iter(f"{SVG}text")
    marker = float(second.get("x", 0)) - 30
    assert marker >= float(first.get("x", 0)) + 139 + 8


def test_a_wide_line_lies_below_the_line_that_covers_it() -> None:
    points = [Point(r, r, "") for r in range(3)]
    measured = Series("measured", points, 0)
    svg = line_chart("t", [measured, Series("plan", points, 5, "wide")], Axis(""), 2)
    drawn = [e.get("class") for e in parsed(svg).iter(f"{SVG}path")]
    lines = [name for name in drawn if name in ("line", "wide")]
    assert lines == ["line", "wide", "wide", "line"]  # the legend's samples, then the lines
    style = template("figures.css")
    widths = re.findall(r"\.figure \.(line|wide) \{[^}]*stroke-width: ([\d.]+)", style)
    assert float(dict(widths)["wide"]) > 3 * float(dict(widths)["line"])


@pytest.mark.parametrize("values", [[], [0.0], [5.0], [-1.0, -1.0], [math.nan, math.inf]])
@pytest.mark.parametrize("log", [False, True])
def test_a_scale_is_found_where_there_is_little_to_show(values: list[float], log: bool) -> None:
    scale = Axis("", log=log).scale(values, 0, 100)
    assert scale.low < scale.high
    assert len(scale.ticks()) < 20


def test_a_line_passes_through_its_points() -> None:
    points = [Point(r, 10 - r, f"round {r}") for r in range(3)]
    svg = line_chart("t", [Series("loss", points)], Axis("nats"), 2)
    line = re.findall(r'd="M([\d. L]+)" class="line"', svg)[-1]
    places = [tuple(map(float, pair.split())) for pair in line.split("L")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2)
    assert y2 - y1 == pytest.approx(y1 - y0, abs=0.2)
    assert x0 < x2
    assert y0 < y2  # a smaller value stands lower, and places count from the top


def test_the_first_mark_takes_the_tab_key_and_each_says_what_it_is() -> None:
    points = [Point(r, r, f"round {r}: loss {r}") for r in range(3)]
    svg = line_chart("t", [Series("a", points), Series("b", points, 1)], Axis("nats"), 2)
    found = marks(svg)
    assert [m.get("tabindex") for m in found] == ["0", "-1", "-1", "-1", "-1", "-1"]
    assert {m.get("role") for m in found} == {"img"}
    assert [m.findtext(f"{SVG}title") for m in found][:2] == ["round 0: loss 0", "round 1: loss 1"]


def test_series_differ_in_mark_and_dashes_as_well_as_colour() -> None:
    points = [Point(0, 1, "")]
    svg = line_chart("t", [Series(str(i), points, i) for i in range(STYLES)], Axis(""), 1)
    lines = [e for e in parsed(svg).iter(f"{SVG}path") if e.get("class") == "line"]
    assert len({e.get("stroke-dasharray") for e in lines}) == STYLES
    assert len({re.sub(r"[\d.]+", "", shape(i, 0, 0)) + shape(i, 0, 0) for i in range(7)}) == 7


def test_every_text_and_every_attribute_is_escaped() -> None:
    evil = "</title><script>alert(1)</script>\" onload='x"
    point, reference = Point(0, 1, evil, flag=evil), Reference(evil, 1, 1, (0, 2))
    columns, stacks = [(0, evil)], [(evil, [1.0]), (evil, [1.0])]
    dot = Dot(1, evil)
    svgs = [
        line_chart(evil, [Series(evil, [point])], Axis(evil), 1, [reference]),
        column_chart(evil, columns, stacks, x_label=evil, y_label=evil),
        grid_chart(evil, {0: evil}, 1, [Cell(0, 1, "took", evil)], 1),
        interval_chart(evil, [Row(evil, [dot], evil, evil)], Axis(evil), names=[(evil, 0)]),
    ]
    for svg in svgs:
        assert "<script" not in svg
        tags = {e.tag for e in parsed(svg).iter()}
        assert tags <= {f"{SVG}{t}" for t in ("svg", "g", "path", "text", "title")}
        assert not any("onload" in e.attrib for e in parsed(svg).iter())
    assert element("g", d='a"b<') == '<g d="a&quot;b&lt;"/>'


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    points = [Point(0, math.nan, ""), Point(1, 0.0, ""), Point(2, 1.0, "one")]
    svg = line_chart("t", [Series("a", points)], Axis("", log=True), 2)
    assert [m.findtext(f"{SVG}title") for m in marks(svg)] == ["one"]
    assert "nan" not in svg


def test_too_many_marks_are_drawn_without_words() -> None:
    points = [Point(r, r, f"round {r}") for r in range(MOST_MARKS + 1)]
    svg = line_chart("t", [Series("a", points)], Axis(""), MOST_MARKS)
    assert not marks(svg)
    assert svg.count('class="dot"') == 2  # all of them in one path, and the legend's


def test_a_stack_is_as_high_as_its_parts_together() -> None:
    svg = column_chart(
        "t", [(0, "")], [("a", [1.0]), ("b", [3.0])], x_label="", y_label="", top_value=4
    )
    heights = re.findall(r'd="M[\d.]+ [\d.]+h[\d.]+v([\d.]+)h-[\d.]+Z" class="cell f(\d)"/>', svg)
    drawn = {which: float(height) for height, which in heights[2:]}
    assert drawn["1"] == pytest.approx(3 * drawn["0"], abs=0.2)


def test_a_failed_cell_has_a_cross_besides_its_colour() -> None:
    cells = [Cell(4, 1, "took", "took part"), Cell(7, 2, "failed", "failed: no reply")]
    svg = grid_chart("t", {4: "4", 7: "7"}, 2, cells, 2)
    assert svg.count('class="cross"') == 1
    assert [m.findtext(f"{SVG}title") for m in marks(svg)] == ["took part", "failed: no reply"]


def test_a_row_without_a_value_is_shown_as_not_measured() -> None:
    svg = interval_chart("t", [Row("local", []), Row("base", [Dot(2, "two", (1, 3))])], Axis(""))
    texts = [e.text for e in parsed(svg).iter(f"{SVG}text")]
    assert texts[texts.index("local") + 1] == "-"
    assert len(marks(svg)) == 1
    assert svg.count("whisker") == 1
