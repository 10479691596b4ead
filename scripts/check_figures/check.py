"""What is checked of which source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from scripts.check_figures.card_rules import check_card
from scripts.check_figures.comparison_rules import check_comparison_page
from scripts.check_figures.dossier_rules import DOSSIER, check_dossier
from scripts.check_figures.evaluation_rules import check_evaluation
from scripts.check_figures.page import texts_of
from scripts.check_figures.printed_rules import check_printed
from scripts.check_figures.privacy_rules import audit_disagreements, guarantee_disagreements
from scripts.check_figures.raw import disagreements, read
from scripts.check_figures.run_rules import check_run_page
from scripts.check_figures.several_rules import check_several_page
from scripts.check_figures.sheet import Sheet
from scripts.check_figures.tracker_rules import calls_of, check_tracker, scalars_of

EVALUATION = "evaluation.json"


def check(
    sources: Sequence[Path],
    page: Path | None = None,
    calls: Path | None = None,
    printed: Path | None = None,
) -> dict[str, Sheet]:
    """Return a sheet for each page, card, tracker and evaluation of run directories.

    The source may also be a comparison, or the folder of an evaluation.

    Parameters
    ----------
    printed
        What `grandrounds evaluate` has printed of the first source.
    """
    first = sources[0]
    if (first / EVALUATION).is_file():
        return of_evaluation(first, printed)
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
        wrong = [
            *disagreements(raw),
            *guarantee_disagreements(raw),
            *audit_disagreements(raw.audit),
        ]
        files = Sheet({}, findings=wrong)
        found[f"{raw.path}: raw files"] = files
        if (raw.path / DOSSIER).is_file():
            found[f"{raw.path / DOSSIER}"] = check_dossier(raw.path)
        for folder in sorted(raw.path.glob("peft_*")):
            card = folder / "README.md"
            if card.is_file():
                found[str(card)] = check_card(card.read_text(encoding="utf-8"), raw, folder)
        events = sorted((raw.path / "tensorboard").glob("events.*"))
        if events:
            scalars = [one for file in events for one in scalars_of(file.read_bytes())]
            found[f"{raw.path}: TensorBoard"] = check_tracker(scalars, raw)
        for folder in (raw.path, *sorted(raw.path.glob("peft_*"))):
            if (folder / "evaluation" / EVALUATION).is_file():
                text = printed if folder == first else None
                found |= of_evaluation(folder / "evaluation", text)
    if calls:
        found[str(calls)] = check_tracker(calls_of(calls.read_text(encoding="utf-8")), runs[0])
    return found


def of_evaluation(folder: Path, printed: Path | None) -> dict[str, Sheet]:
    """Return a sheet for an evaluation, and one for what was printed of it."""
    found = {str(folder / EVALUATION): check_evaluation(folder)}
    if printed:
        found[str(printed)] = check_printed(printed.read_text(encoding="utf-8"), folder)
    return found
