"""What is checked of which source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from scripts.check_figures.card_rules import check_card
from scripts.check_figures.comparison_rules import check_comparison_page
from scripts.check_figures.page import texts_of
from scripts.check_figures.raw import disagreements, read
from scripts.check_figures.run_rules import check_run_page
from scripts.check_figures.several_rules import check_several_page
from scripts.check_figures.sheet import Sheet
from scripts.check_figures.tracker_rules import calls_of, check_tracker, scalars_of


def check(
    sources: Sequence[Path], page: Path | None = None, calls: Path | None = None
) -> dict[str, Sheet]:
    """Return a sheet for each page, card and tracker of run directories or of a comparison."""
    first = sources[0]
    page = page or first / "report.html"
    texts = texts_of(page.read_text(encoding="utf-8")) if page.is_file() else {}
    if (first / "comparison.json").is_file():
        content = json.loads((first / "comparison.json").read_text(encoding="utf-8"))
        return {str(page): check_comparison_page(texts, content, first.absolute().name)}
    runs = [read(path) for path in sources]
    found: dict[str, Sheet] = {}
    if len(runs) > 1:
        found[str(page)] = check_several_page(texts, runs)
    elif texts:
        found[str(page)] = check_run_page(texts, runs[0])
    for raw in runs:
        files = Sheet({}, findings=disagreements(raw))
        found[f"{raw.path}: raw files"] = files
        for folder in sorted(raw.path.glob("peft_*")):
            card = folder / "README.md"
            if card.is_file():
                found[str(card)] = check_card(card.read_text(encoding="utf-8"), raw, folder)
        events = sorted((raw.path / "tensorboard").glob("events.*"))
        if events:
            scalars = [one for file in events for one in scalars_of(file.read_bytes())]
            found[f"{raw.path}: TensorBoard"] = check_tracker(scalars, raw)
    if calls:
        found[str(calls)] = check_tracker(calls_of(calls.read_text(encoding="utf-8")), runs[0])
    return found
