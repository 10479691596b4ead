"""`scripts/check_figures` explains every number of an evaluation, and finds errors in each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from grandrounds.cli import app
from scripts.check_figures.check import check
from scripts.check_figures.evaluation_rules import TEXTS, check_evaluation
from scripts.check_figures.printed_rules import check_printed
from scripts.check_figures.shown import numbers_in


def numbers_below(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the place of every number of a JSON document."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in TEXTS and key != "versions":
                yield from numbers_below(part, (*at, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from numbers_below(part, (*at, i))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield at


def test_every_figure_of_an_evaluation_is_right_and_every_planted_error_is_found(
    tiny_base: Path, data: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    words = ["evaluate", adapter, "--base", tiny_base, "--benchmarks", "medmcqa,pubmedqa"]
    words += ["--data", data, "--protocol", "all", "--permutations", 2, "--out", folder]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    printed = tmp_path / "printed.txt"
    printed.write_text(done.stdout)
    found = check([folder], printed=printed)
    assert {name: sheet.findings for name, sheet in found.items() if sheet.findings} == {}
    assert [sheet.checked.total() > 100 for sheet in found.values()] == [True, True]

    file = folder / "evaluation.json"
    right = file.read_text()
    planted: set[tuple[str, ...]] = set()
    for place in numbers_below(json.loads(right)):
        kind = tuple(str(part) for part in place if isinstance(part, str))
        if kind not in planted:
            planted.add(kind)
            content = json.loads(right)
            holder: Any = content
            for part in place[:-1]:
                holder = holder[part]
            holder[place[-1]] += 300
            file.write_text(json.dumps(content))
            assert check_evaluation(folder).findings, place
    assert len(planted) > 40
    file.write_text(right)

    lines = done.stdout.splitlines()
    for i, line in enumerate(lines):
        if not line.startswith(("about ", "written: ")) and numbers_in(line):
            wrong = re.sub(r"(?<![A-Za-z0-9._])\d[\d,]*(?![A-Za-z0-9])", "98,765", line, count=1)
            text = "\n".join([*lines[:i], wrong, *lines[i + 1 :]])
            assert check_printed(text, folder).findings, line
    text = "\n".join(line for line in lines if "/14" not in line)
    assert check_printed(text, folder).findings

    answers = next(folder.glob("answers_*_medmcqa_likelihood.jsonl"))
    before = answers.read_text()
    answers.write_text(before.replace('"correct": true', '"correct": false', 1))
    assert answers.read_text() != before
    assert check_evaluation(folder).findings
