#!/usr/bin/env python3
"""Execute a notebook's code cells in one namespace, and store what they print and show.

    scripts/notebook.py notebooks/own_data.ipynb

Without Jupyter: a cell's last expression is shown as its `_repr_html_` and `repr`, as a notebook
shows it. Cells run in a fresh folder, or in `--folder`. Its path is stored as `.`, and that of the
fetched bases as `bases`. The first exception ends the script.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def execute(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with their outputs; code runs in the current folder."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    executed, count = [], 0
    for cell in cells:
        if cell["cell_type"] != "code":
            executed.append(dict(cell))
            continue
        count += 1
        outputs = run_cell("".join(cell["source"]), namespace, count)
        executed.append({**cell, "execution_count": count, "outputs": outputs})
    return executed


def run_cell(source: str, namespace: dict[str, Any], count: int) -> list[Cell]:
    """Run one cell; return its outputs in the notebook format 4."""
    name = f"cell {count}"
    tree = ast.parse(source, name)
    last = tree.body[-1] if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = ast.Module(tree.body[:-1] if last else tree.body, [])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(body, name, "exec"), namespace)
        shown = None
        if last:
            shown = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[Cell] = []
    if text := printed.getvalue():
        lines = text.splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if shown is not None:
        data = {"text/plain": repr(shown).splitlines(keepends=True)}
        if hasattr(shown, "_repr_html_"):
            data["text/html"] = shown._repr_html_().splitlines(keepends=True)
        result = {"data": data, "execution_count": count, "metadata": {}}
        outputs.append({**result, "output_type": "execute_result"})
    return outputs


def main(arguments: Sequence[str] | None = None) -> None:
    """Execute a notebook in place, or into another file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, help="file to write; default: the notebook itself")
    parser.add_argument("--folder", type=Path, help="folder to run in; default: a fresh one")
    given = parser.parse_args(arguments)
    file, out = given.notebook.absolute(), (given.out or given.notebook).absolute()
    notebook = json.loads(file.read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        folder = given.folder or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.chdir(folder))
        notebook["cells"] = execute(notebook["cells"])
        here = str(Path.cwd())
    from grandrounds.config.bases import bases_folder

    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    text = text.replace(here, ".").replace(str(bases_folder()), "bases")
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
