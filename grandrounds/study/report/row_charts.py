"""Charts in rows: a grid of cells, site by round, and values with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grandrounds.study.report.charts import LEFT, RIGHT, Legend, drawing, tick_texts
from grandrounds.study.report.drawing import (
    CHARACTER,
    LINE,
    MOST_MARKS,
    STYLES,
    WIDTH,
    Marks,
    Scale,
    box,
    element,
    label,
    scale_over,
    shape,
    shortened,
)
from grandrounds.study.report.figures import NONE, decimals_of, fixed


@dataclass(frozen=True)
class Cell:
    """One cell of a grid."""

    row: int
    column: int
    kind: int
    """Its place among the grid's kinds."""
    label: str


@dataclass(frozen=True)
class Dot:
    """A value in a row, its interval, and both in words."""

    value: float
    label: str
    low: float | None = None
    high: float | None = None
    style: int = 0


@dataclass(frozen=True)
class Row:
    """One row of an interval chart."""

    name: str
    dots: Sequence[Dot]
    heading: str = ""
    """A line above the row, where a group begins."""


# --- Grid -----------------------------------------------------------------------------------------


def grid_chart(
    title: str,
    rows: Sequence[str],
    columns: Sequence[int],
    cells: Sequence[Cell],
    kinds: Sequence[tuple[str, str]],
    *,
    x_label: str,
    y_label: str,
    done: int,
) -> str:
    """Return a grid of rows and rounds; a cell that nobody fills stays empty.

    Parameters
    ----------
    kinds
        (name, class) of the kinds of cells; the class `failed` gets a cross as well as a colour.
    done
        Columns that have happened; those after them have no ground yet.
    """
    named, top = Legend([(name, f"fill {class_}") for name, class_ in kinds]).draw(0)
    top += LINE + 8
    high = max(2.0, min(14.0, 340 / max(1, len(rows))))
    wide = (WIDTH - LEFT - RIGHT) / max(1, len(columns))
    gap = min(2.0, 0.15 * min(high, wide))
    bottom = top + high * len(rows)
    parts = [
        label(y_label, 0, top - 11, class_="name"),
        element("path", d=box(LEFT, top, wide * done, bottom - top), class_="ground"),
    ]
    every = max(1, math.ceil(11 / high))
    for i in range(0, len(rows), every):
        parts.append(label(rows[i], LEFT - 6, top + high * (i + 0.5) + 4, "end"))
    step = max(1, math.ceil(len(columns) / 12))
    for j in range(0, len(columns), step):
        parts.append(label(str(columns[j]), LEFT + wide * (j + 0.5), bottom + 15, "middle"))
    parts.append(label(x_label, WIDTH - RIGHT, bottom + 31, "end", class_="name"))
    marks = Marks(len(cells) <= MOST_MARKS)
    w, h = wide - gap, high - gap
    body = []
    for kind, (_, class_) in enumerate(kinds):
        chosen = [cell for cell in cells if cell.kind == kind]
        places = [(LEFT + wide * c.column + gap / 2, top + high * c.row + gap / 2) for c in chosen]
        boxes = [(box(x, y, w, h), c.label) for (x, y), c in zip(places, chosen, strict=True)]
        body.append(marks.draw(boxes, f"cell {class_}") if chosen else "")
        if class_ == "failed" and chosen:
            crosses = [shape(4, x + w / 2, y + h / 2, 0.35 * min(w, h)) for x, y in places]
            body.append(element("path", d="".join(crosses), class_="cross"))
    frame = element("g", *parts, class_="axes", aria_hidden="true")
    return drawing(bottom + 36, title, named, frame, *body)


# --- Intervals ------------------------------------------------------------------------------------


def interval_chart(
    title: str,
    rows: Sequence[Row],
    *,
    x_label: str,
    unit: str = "",
    zero: bool = False,
    from_zero: bool = False,
    legend: Sequence[tuple[str, int]] = (),
    decimals: int | None = None,
) -> str:
    """Return values in rows, with their intervals; a row of one value ends with it in figures.

    Parameters
    ----------
    unit
        What stands behind the figures.
    zero
        Whether a line stands at 0, where nothing is gained or lost.
    legend
        (name, style) where rows have several values.
    decimals
        Of the figures; default: those that give the largest three significant digits.
    """
    named, top = Legend([(name, f"dot {style}") for name, style in legend]).draw(0)
    dots = [dot for row in rows for dot in row.dots]
    values = [v for d in dots for v in (d.value, d.low, d.high) if v is not None]
    values += [0.0] if zero or from_zero else []
    name_width = min(170.0, 12 + CHARACTER * max((len(r.name) for r in rows), default=0))
    if decimals is None:
        decimals = decimals_of(dot.value for dot in dots)
    texts = [_figures(row, unit, decimals) for row in rows]
    text_width = 12 + CHARACTER * max((len(t) for t in texts), default=0)
    xs = scale_over(values, name_width, WIDTH - text_width)
    marks = Marks(len(dots) <= MOST_MARKS)
    y, body = top + 4, []
    for row, text in zip(rows, texts, strict=True):
        if row.heading:
            y += 22
            body.append(label(shortened(row.heading, 60), 0, y - 4, class_="name"))
        y += 20
        body.append(_row(row, text, xs, y - 8, name_width, marks))
    bottom = y + 6
    ground = [element("path", d=f"M{xs(0):.1f} {top:.1f}V{bottom:.1f}", class_="zero")] * zero
    ticks = xs.ticks(5)
    for tick, said in zip(ticks, tick_texts(ticks), strict=True):
        place = f"M{xs(tick):.1f} {top + 4:.1f}V{bottom:.1f}"
        ground.append(label(said, xs(tick), bottom + 15, "middle"))
        ground.append(element("path", d=place, class_="rule"))
    ground.append(label(x_label, WIDTH, bottom + 32, "end", class_="name"))
    frame = element("g", *ground[::-1], class_="axes", aria_hidden="true")
    return drawing(bottom + 38, title, named, frame, *body)


def _figures(row: Row, unit: str, decimals: int) -> str:
    """Return what stands at the end of a row."""
    if not row.dots:
        return NONE
    return fixed(row.dots[0].value, decimals) + unit if len(row.dots) == 1 else ""


def _row(row: Row, text: str, xs: Scale, y: float, name_width: float, marks: Marks) -> str:
    most = max(1, int((name_width - 8) / CHARACTER))
    parts = [label(shortened(row.name, most), name_width - 8, y + 4, "end")]
    if text:
        parts.append(label(text, WIDTH, y + 4, "end", class_="value"))
    for dot in row.dots:
        whisker = ""
        if dot.low is not None and dot.high is not None:
            low, high = xs(dot.low), xs(dot.high)
            ends = f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"
            whisker = element("path", d=ends, class_="whisker")
        mark = marks.draw([(shape(dot.style, xs(dot.value), y, 4), dot.label)], "dot")
        parts.append(element("g", whisker, mark, class_=f"s{dot.style % STYLES}"))
    return element("g", *parts)
