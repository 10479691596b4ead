"""Line charts over rounds and column charts, as SVG; horizontal charts are in `row_charts`.

Series differ in colour, mark and dashes, so that no distinction depends on colour alone. Colours
are classes of templates/figures.css.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from grandrounds.study.report.svg import (
    DASHES,
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
    path,
    shape,
    shortened,
    text_width,
)

PLOT_HEIGHT = 190
LEFT = 52
RIGHT = 10

Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One measured value."""

    x: float
    y: float
    label: str
    """Shown when the mark is pointed at."""
    interval: Interval | None = None
    flag: str = ""
    """A few words beside an outlier; its mark gets a ring."""


@dataclass(frozen=True)
class Series:
    """Values that belong together."""

    name: str
    points: Sequence[Point]
    style: int = 0
    form: Literal["line", "dot", "rule", "wide"] = "line"
    """A line with marks, marks only, a line only, or a wide pale line below all others."""


@dataclass(frozen=True)
class Reference:
    """A value to compare with: a horizontal line, with a band for its interval."""

    name: str
    value: float
    style: int
    interval: Interval | None


# --- Legend and axes ------------------------------------------------------------------------------


def legend(entries: Sequence[tuple[str, str]]) -> tuple[str, float]:
    """Return the markup of a legend and the position below it.

    Parameters
    ----------
    entries
        (name, sample): a sample is a form of `Series` and a style, or `fill` and a class.
    """
    parts: list[str] = []
    x, y = 0.0, LINE - 4.0
    for name, sample in entries:
        words = shortened(name, 50)
        width = 30 + text_width(words) + 12
        if x and x + width > WIDTH:
            x, y = 0.0, y + LINE
        parts += [_sample(sample, x, y - 4), label(words, x + 30, y)]
        x += width
    return "".join(parts), (y + 8 if entries else 0.0)


def _sample(sample: str, x: float, y: float) -> str:
    form, _, which = sample.partition(" ")
    if form == "fill":
        return element("path", d=box(x + 10, y - 5, 12, 10), class_=f"cell {which}")
    style = int(which)
    across = path([(x, y), (x + 24, y)])
    rule = _line(across, style)
    dot = element("path", d=shape(style, x + 12, y), class_="dot")
    wide = element("path", d=across, class_="wide")
    shown = {"line": rule + dot, "dot": dot, "rule": rule, "wide": wide}[form]
    return element("g", shown, class_=f"s{style % STYLES}")


def _line(d: str, style: int) -> str:
    return element("path", d=d, class_="line", stroke_dasharray=DASHES[style % STYLES] or None)


def axes(
    xs: Scale, ys: Scale, x_label: str, y_label: str, x_names: Sequence[str] | None = None
) -> str:
    """Return grid lines, ticks and labels of both axes; the vertical one's label is on top.

    With `x_names` the horizontal axis has these at 0, 1, 2, ... instead of numbers.
    """
    parts = [label(y_label, 0, ys.end - 11, class_="name")]
    ticks = ys.ticks(5)
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        y = ys(tick)
        parts.append(element("path", d=path([(xs.start, y), (xs.end, y)]), class_="rule"))
        parts.append(label(text, xs.start - 6, y + 4, "end"))
    marked = xs.ticks(8, whole=True)
    if x_names is not None:
        marked = [float(place) for place in range(len(x_names))]
    for tick, text in zip(marked, x_names or tick_texts(marked), strict=True):
        parts.append(label(text, xs(tick), ys.start + 18, "middle"))
        parts.append(element("path", d=f"M{xs(tick):.1f} {ys.start:.1f}v4", class_="tick"))
    parts.append(label(x_label, xs.end, ys.start + 35, "end", class_="name"))
    base = element("path", d=path([(xs.start, ys.start), (xs.end, ys.start)]), class_="base")
    return element("g", *parts, base, class_="axes", aria_hidden="true")


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Format the ticks of an axis in one notation.

    Thousands (`20k`) if the axis reaches 10,000 and no tick but 0 is below 100; powers of ten
    (`1e-5`) if it reaches 10,000 and one is, or if a tick but 0 is below 0.0001; plain numbers
    otherwise.
    """
    sizes = [abs(tick) for tick in ticks if tick]
    if not sizes:
        return ["0"] * len(ticks)
    least, most = min(sizes), max(sizes)
    if most >= 9_999 and least >= 100:
        texts = [f"{tick / 1000:,.10g}k" for tick in ticks]
    elif most >= 9_999 or least < 9.999e-5:
        texts = [_power(tick) for tick in ticks]
    else:
        texts = [f"{tick:.10g}" for tick in ticks]
    return [text if tick else "0" for tick, text in zip(ticks, texts, strict=True)]


def _power(value: float) -> str:
    """Format as `1.5e-5`."""
    digits, _, power = f"{value:.9e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


# --- Lines ----------------------------------------------------------------------------------------


def line_chart(
    title: str,
    series: Sequence[Series],
    y_axis: Axis,
    last_round: float,
    references: Sequence[Reference] = (),
    x_axis: tuple[str, Sequence[str] | None] = ("round", None),
) -> str:
    """Return values over rounds 0 to `last_round`; intervals as whiskers, references across.

    Parameters
    ----------
    x_axis
        Its label, and names for 0, 1, 2, ... where it has no numbers.
    """
    drawn = [
        (s, [p for p in s.points if math.isfinite(p.y) and (p.y > 0 or not y_axis.log)])
        for s in series
    ]
    points = [p for _, found in drawn for p in found]
    values = [p.y for p in points] + [r.value for r in references]
    values += [end for p in points for end in p.interval or ()]
    values += [end for r in references for end in r.interval or ()]
    entries = [(s.name, f"{s.form} {s.style}") for s, found in drawn if found and s.name]
    named, top = legend(entries + [(r.name, f"rule {r.style}") for r in references])
    top += LINE + 8
    high = max(1, last_round)
    room = 0.02 if x_axis[1] is None else 0.15
    xs = Scale(-room * high, high + room * high, LEFT, WIDTH - RIGHT)
    ys = y_axis.scale(values, top + PLOT_HEIGHT, top)
    marks = Marks(sum(len(f) for s, f in drawn if s.form in ("line", "dot")) <= MOST_MARKS)
    body = [_reference(r, xs, ys) for r in references]
    below_first = sorted(drawn, key=lambda item: item[0].form != "wide")
    body += [_series(s, found, xs, ys, marks) for s, found in below_first]
    return document(
        top + PLOT_HEIGHT + 40,
        title,
        named,
        axes(xs, ys, x_axis[0], y_axis.label, x_axis[1]),
        *body,
    )


def _reference(reference: Reference, xs: Scale, ys: Scale) -> str:
    y = ys(reference.value)
    shown = _line(path([(xs.start, y), (xs.end, y)]), reference.style)
    if reference.interval:
        bottom, top = map(ys, reference.interval)
        band = box(xs.start, top, xs.end - xs.start, bottom - top)
        shown = element("path", d=band, class_="band") + shown
    return element("g", shown, class_=f"s{reference.style % STYLES}")


def _series(series: Series, points: Sequence[Point], xs: Scale, ys: Scale, marks: Marks) -> str:
    parts = []
    if series.form != "dot" and points:
        line = path([(xs(p.x), ys(p.y)) for p in points])
        wide = series.form == "wide"
        parts.append(element("path", d=line, class_="wide") if wide else _line(line, series.style))
    dots = []
    for p in points if series.form in ("line", "dot") else ():
        x, y = xs(p.x), ys(p.y)
        if p.interval:
            low, high = map(ys, p.interval)
            whisker = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8"
            whisker += f"M{x - 4:.1f} {high:.1f}h8"
            parts.append(element("path", d=whisker, class_="whisker"))
        if p.flag:
            parts.append(element("path", d=shape(0, x, y, 7.5), class_="ring"))
            side, anchor = (-11, "end") if x > WIDTH - 90 else (11, "start")
            parts.append(label(p.flag, x + side, y + 4, anchor, class_="flag"))
        drawn = shape(series.style, x, y) if marks.labelled else box(x - 1.5, y - 1.5, 3, 3)
        dots.append((drawn, p.label))
    parts.append(marks.draw(dots, "dot"))
    return element("g", *parts, class_=f"s{series.style % STYLES}")


# --- Columns --------------------------------------------------------------------------------------


def column_chart(
    title: str,
    columns: Sequence[tuple[float, str]],
    stacks: Sequence[tuple[str, Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    top_value: float | None = None,
) -> str:
    """Return stacked columns.

    Parameters
    ----------
    columns
        (position on the axis, label) of each.
    stacks
        (name, one height per column), from the bottom up.
    top_value
        Upper end of the axis; default: the highest column.
    """
    entries = [(name, f"fill f{i}") for i, (name, _) in enumerate(stacks)]
    named, top = legend(entries if len(stacks) > 1 else [])
    top += LINE + 8
    totals = [sum(values[i] for _, values in stacks) for i in range(len(columns))]
    highest = top_value or 1.05 * max(totals, default=0.0) or 1.0
    places = [place for place, _ in columns]
    first, last = min(places, default=0), max(places, default=1)
    xs = Scale(first - 0.5, last + 0.5, LEFT, WIDTH - RIGHT)
    ys = Scale(0, highest, top + PLOT_HEIGHT, top)
    wide = (xs.end - xs.start) / (last - first + 1)
    gap = min(3.0, 0.25 * wide)
    marks = Marks(len(columns) <= MOST_MARKS)
    body, covers = [], []
    for i, (place, words) in enumerate(columns):
        left = xs(place) - wide / 2 + gap / 2
        floor = 0.0
        for number_of_stack, (_, values) in enumerate(stacks):
            height = ys(floor) - ys(floor + values[i])
            shown = box(left, ys(floor + values[i]), wide - gap, height)
            body.append(element("path", d=shown, class_=f"cell f{number_of_stack}"))
            floor += values[i]
        reach = max(ys(0) - ys(floor), 4.0)
        covers.append((box(left, ys(0) - reach, wide - gap, reach), words))
    body.append(marks.draw(covers, "cover"))
    return document(top + PLOT_HEIGHT + 40, title, named, axes(xs, ys, x_label, y_label), *body)
