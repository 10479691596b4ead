"""Charts in rows, as SVG: a grid of sites by rounds, and values with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grandrounds.study.report.charts import LEFT, RIGHT, Interval, legend, tick_texts
from grandrounds.study.report.svg import (
    CHARACTER,
    LINE,
    MOST_MARKS,
    STYLES,
    WIDTH,
    Axis,
    Marks,
    Scale,
    box,
    document,
    element,
    label,
    shape,
    shortened,
)
from grandrounds.study.tables import NONE

MOST_CHARACTERS = 22
"""Of a site's name beside its row of a grid."""

KINDS = {"took": "took part", "failed": "failed", "ground": "not selected"}
"""Class of a grid's cell → its name in the legend; `failed` gets a cross besides its colour."""


@dataclass(frozen=True)
class Cell:
    """One cell of a grid."""

    site: int
    round: int
    kind: str
    """A key of `KINDS`."""
    label: str


@dataclass(frozen=True)
class Dot:
    """A value in a row, with its interval."""

    value: float
    label: str
    interval: Interval | None = None
    style: int = 0


@dataclass(frozen=True)
class Row:
    """One row of an interval chart."""

    name: str
    dots: Sequence[Dot]
    heading: str = ""
    """A line above the row, where a group begins."""
    value: str = ""
    """Text at the end of the row; a row without dots gets `NONE`."""


# --- Grid -----------------------------------------------------------------------------------------


def grid_chart(
    title: str, sites: Mapping[int, str], rounds: int, cells: Sequence[Cell], done: int
) -> str:
    """Return a grid of sites by rounds 1 to `rounds`.

    Parameters
    ----------
    sites
        Site → its name at the row, in order.
    done
        Rounds that are finished; later ones have no background yet.
    """
    named, top = legend([(name, f"fill {kind}") for kind, name in KINDS.items()])
    top += LINE + 8
    high = max(2.0, min(14.0, 340 / max(1, len(sites))))
    rows = [shortened(name, MOST_CHARACTERS) for name in sites.values()]
    left = max(float(LEFT), 12 + CHARACTER * max(map(len, rows), default=0))
    wide = (WIDTH - left - RIGHT) / max(1, rounds)
    gap = min(2.0, 0.15 * min(high, wide))
    bottom = top + high * len(sites)
    parts = [
        label("site", 0, top - 11, class_="name"),
        element("path", d=box(left, top, wide * done, bottom - top), class_="ground"),
    ]
    for i in range(0, len(sites), max(1, math.ceil(11 / high))):
        parts.append(label(rows[i], left - 6, top + high * (i + 0.5) + 4, "end"))
    for j in range(0, rounds, max(1, math.ceil(rounds / 12))):
        parts.append(label(str(j + 1), left + wide * (j + 0.5), bottom + 15, "middle"))
    parts.append(label("round", WIDTH - RIGHT, bottom + 31, "end", class_="name"))
    marks = Marks(len(cells) <= MOST_MARKS)
    w, h = wide - gap, high - gap
    row_of = {site: i for i, site in enumerate(sites)}
    body = []
    for kind in KINDS:
        places = [
            (left + wide * (c.round - 1) + gap / 2, top + high * row_of[c.site] + gap / 2, c.label)
            for c in cells
            if c.kind == kind
        ]
        if places:
            body.append(marks.draw([(box(x, y, w, h), t) for x, y, t in places], f"cell {kind}"))
        if kind == "failed" and places:
            crosses = [shape(4, x + w / 2, y + h / 2, 0.35 * min(w, h)) for x, y, _ in places]
            body.append(element("path", d="".join(crosses), class_="cross"))
    frame = element("g", *parts, class_="axes", aria_hidden="true")
    return document(bottom + 36, title, named, frame, *body)


# --- Intervals ------------------------------------------------------------------------------------


def interval_chart(
    title: str,
    rows: Sequence[Row],
    x_axis: Axis,
    *,
    zero_line: bool = False,
    names: Sequence[tuple[str, int]] = (),
) -> str:
    """Return values in rows, with their intervals.

    Parameters
    ----------
    zero_line
        Whether to draw a line at 0.
    names
        (name, style) of the dots, where rows have several.
    """
    named, top = legend([(name, f"dot {style}") for name, style in names])
    dots = [dot for row in rows for dot in row.dots]
    values = [v for d in dots for v in (d.value, *(d.interval or ()))] + [0.0] * zero_line
    name_width = min(170.0, 12 + CHARACTER * max((len(r.name) for r in rows), default=0))
    texts = [row.value if row.dots else NONE for row in rows]
    text_width = 12 + CHARACTER * max((len(t) for t in texts), default=0)
    xs = x_axis.scale(values, name_width, WIDTH - text_width)
    marks = Marks(len(dots) <= MOST_MARKS)
    y, body = top + 4, []
    for row, text in zip(rows, texts, strict=True):
        if row.heading:
            y += 22
            body.append(label(shortened(row.heading, 60), 0, y - 4, class_="name"))
        y += 20
        most = max(1, int((name_width - 8) / CHARACTER))
        name = label(shortened(row.name, most), name_width - 8, y - 4, "end")
        value = label(text, WIDTH, y - 4, "end", class_="value") if text else ""
        body.append(element("g", name, value, *(_dot(dot, xs, y - 8, marks) for dot in row.dots)))
    bottom = y + 6
    ground = [element("path", d=f"M{xs(0):.1f} {top:.1f}V{bottom:.1f}", class_="zero")] * zero_line
    ticks = xs.ticks(5)
    for tick, said in zip(ticks, tick_texts(ticks), strict=True):
        place = f"M{xs(tick):.1f} {top + 4:.1f}V{bottom:.1f}"
        ground.append(label(said, xs(tick), bottom + 15, "middle"))
        ground.append(element("path", d=place, class_="rule"))
    ground.append(label(x_axis.label, WIDTH, bottom + 32, "end", class_="name"))
    frame = element("g", *ground[::-1], class_="axes", aria_hidden="true")
    return document(bottom + 38, title, named, frame, *body)


def _dot(dot: Dot, xs: Scale, y: float, marks: Marks) -> str:
    whisker = ""
    if dot.interval:
        low, high = map(xs, dot.interval)
        ends = f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"
        whisker = element("path", d=ends, class_="whisker")
    mark = marks.draw([(shape(dot.style, xs(dot.value), y, 4), dot.label)], "dot")
    return element("g", whisker, mark, class_=f"s{dot.style % STYLES}")
