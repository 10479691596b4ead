"""Tables of a study, as Markdown, and the pages that hold them between markers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from grandrounds import storage
from grandrounds.errors import ConfigError, RunDirectoryError
from grandrounds.statistics import estimate, paired_test
from grandrounds.study.comparison.results import LOSS
from grandrounds.study.studies.cells import Cell, Line, Lines
from grandrounds.study.studies.file import ARMS, Column, Study, TableOf
from grandrounds.study.tables import MIB, NONE, Table, fixed, number

BEGIN, END = "<!-- study {file}, table {name}: begin -->", "<!-- end of the table -->"

_SHARES = ("forgotten",)
"""Shares besides the exams' accuracies, of which every key is one that is not listed below."""
_PLAIN = (LOSS, "train-loss", f"everywhere-{LOSS}", f"worst-{LOSS}", "epsilon")
_COST = ("bytes", "bytes-up", "bytes-down", "seconds")

Played = Mapping[tuple[str, str, int], Line]
"""(recipe, arm, seed) → its line."""


def tables_of(study: Study, cells: Sequence[Cell], lines: Lines) -> list[Table]:
    """Return the study's tables, of the cells that were played."""
    played = {
        (cell.recipe.name, cell.arm, cell.seed): line
        for cell in cells
        if (line := lines.shown(cell)) is not None
    }
    return [_table(study, table, played) for table in study.tables]


def _table(study: Study, table: TableOf, played: Played) -> Table:
    recipes = [study.recipes[name] for name in table.recipes]
    pairs = [(recipe.name, arm) for recipe in recipes for arm in recipe.arms if arm in table.arms]
    several_recipes, several_arms = len(recipes) > 1, len({arm for _, arm in pairs}) > 1
    fixed_arms = all(column.arm for column in table.columns)
    if fixed_arms:  # each column has an arm of its own: a row is a recipe
        pairs, several_arms = [(recipe.name, recipe.arms[0]) for recipe in recipes], False
    rows = []
    for name, arm in pairs:
        cells = [_cell(column, name, arm, played) for column in table.columns]
        of_row = {column.arm or arm for column in table.columns}
        seeds = {s for (n, a, s) in played if n == name and a in of_row}
        if not seeds:
            continue
        title = ", ".join([name] * several_recipes + [arm] * several_arms) or name
        rows.append((title, str(len(seeds)), *cells))
    first = "recipe" if several_recipes or not several_arms else "arm"
    return Table((first, "seeds", *(column.title for column in table.columns)), rows, table.name)


def _cell(column: Column, recipe: str, arm: str, played: Played) -> str:
    """Return a figure's mean over seeds with half its 95 % interval, or that of paired ones."""
    own = _by_seed(column.figure, recipe, column.arm or arm, played)
    other = column.minus or column.over
    if not other:
        return _with_interval(column.figure, own, estimate) if own else NONE
    against = _named(other, recipe, column.arm or arm, played)
    if against == (recipe, column.arm or arm):
        return ""
    rival = _by_seed(column.figure, *against, played)
    seeds = sorted(own.keys() & rival.keys())
    if not seeds:
        return NONE
    if column.over:
        divisor = sum(own[s] for s in seeds)
        return fixed(sum(rival[s] for s in seeds) / divisor, 1) if divisor else NONE
    return _with_interval(
        column.figure, {s: own[s] - rival[s] for s in seeds}, paired_test, sign=True
    )


def _named(word: str, recipe: str, arm: str, played: Played) -> tuple[str, str]:
    """Return the recipe and the arm that a column's `minus` or `over` names, from a row's own."""
    if word in ARMS:
        return recipe, word
    arms = [a for (name, a, _) in played if name == word]
    if arms or "/" not in word:
        return word, arm if arm in arms or not arms else arms[0]
    named, _, of = word.rpartition("/")
    return named, of


def _by_seed(figure: str, recipe: str, arm: str, played: Played) -> dict[int, float]:
    found = {}
    for (name, of_arm, seed), line in sorted(played.items()):
        if (name, of_arm) == (recipe, arm) and (value := value_of(line, figure)) is not None:
            found[seed] = value
    return found


def value_of(line: Line, figure: str) -> float | None:
    """Return a figure, the bytes or the seconds of a cell; None where it has none."""
    sent = line.get("bytes") or {}
    if figure == "seconds":
        return float(line["seconds"])
    if figure == "bytes":
        return float(sent["up"] + sent["down"]) if sent else None
    if figure in _COST:
        return float(sent[figure.removeprefix("bytes-")]) if sent else None
    value = line["figures"].get(figure)
    return None if value is None else float(value)


def _with_interval(
    figure: str, by_seed: Mapping[int, float], test: object, sign: bool = False
) -> str:
    values = [by_seed[seed] * _scale(figure) for seed in sorted(by_seed)]
    if figure in _COST:
        return number(sum(values) / len(values), 3)
    found = paired_test(values) if test is paired_test else estimate(values)
    decimals = 3 if figure in _PLAIN else 1
    shown = fixed(found["mean"], decimals, sign=sign)
    if found["interval"] is None:
        return shown
    return f"{shown} ± {fixed(found['interval'][1] - found['mean'], decimals)}"


def _scale(figure: str) -> float:
    """Return by what a figure is multiplied: shares are shown in percent, bytes in MiB."""
    if figure in _PLAIN or figure == "seconds":
        return 1.0
    return 1 / MIB if figure in _COST else 100.0


def check_figures(study: Study, lines: Lines) -> None:
    """Raise `ConfigError` if a column's figure is in no cell that was played."""
    if not lines.lines:
        return
    known = sorted({name for line in lines.lines for name in line["figures"]})
    for table in study.tables:
        for column in table.columns:
            if column.figure not in (*known, *_COST):
                raise ConfigError(
                    f"{study.file}: tables.{table.name} has the figure {column.figure!r}, which no "
                    f"cell has; there are {', '.join((*known, *_COST))}."
                )


# --- Pages ----------------------------------------------------------------------------------------


def markdown(study: Study, table: Table, cells: Sequence[Cell], lines: Lines) -> str:
    """Return a table as Markdown, with a line that says what makes it and what is missing."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    text = "\n".join("| " + " | ".join(map(_escaped, row)) + " |" for row in rows)
    return f"{text}\n\n{_made_by(study, table, cells, lines)}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _made_by(study: Study, table: Table, cells: Sequence[Cell], lines: Lines) -> str:
    chosen = next(one for one in study.tables if one.name == table.title)
    own = [cell for cell in cells if cell.recipe.name in chosen.recipes]
    missing = sum(lines.shown(cell) is None for cell in own)
    made = f"`grandrounds study run {study_name(study)}` plays its {len(own)} cells"
    if missing:
        return f"{made}; {len(own) - missing} of them have been played."
    return f"{made}."


def study_name(study: Study) -> str:
    """Return a study's file as pages name it: the last two parts of its path."""
    return "/".join(study.file.parts[-2:])


def into_page(page: Path, study: Study, cells: Sequence[Cell], lines: Lines) -> tuple[str, int]:
    """Return a page with the study's tables put between their markers, and how many there are.

    Raises
    ------
    ConfigError
        If the page cannot be read, or a marker has no end.
    RunDirectoryError
        If no cell of a table has been played.
    """
    text, count = storage.read_text(page), 0
    for table in tables_of(study, cells, lines):
        begin = BEGIN.format(file=study_name(study), name=table.title)
        if begin not in text:
            continue
        if not table.rows:
            raise RunDirectoryError(
                f"no cell of table {table.title!r} has been played: run grandrounds study run "
                f"{study_name(study)} first."
            )
        before, _, rest = text.partition(begin)
        _, end, after = rest.partition(END)
        if not end:
            raise ConfigError(f"{page}: {begin} has no {END} after it.")
        text = f"{before}{begin}\n\n{markdown(study, table, cells, lines)}\n\n{end}{after}"
        count += 1
    return text, count


def marked_studies(page: str) -> Iterator[str]:
    """Yield the studies that a page's markers name, each once."""
    found = re.findall(r"<!-- study (\S+), table \S+: begin -->", page)
    yield from dict.fromkeys(found)
