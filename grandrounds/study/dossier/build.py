"""The dossier of a run, made from its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grandrounds
from grandrounds.errors import RunDirectoryError
from grandrounds.study.dossier import protected, results, shared, software, trained
from grandrounds.study.dossier.guidelines import NUMBERING, answers
from grandrounds.study.dossier.lines import Dossier, Section
from grandrounds.study.dossier.record import record_of
from grandrounds.study.report.headline import title
from grandrounds.study.report.places import without_folders
from grandrounds.study.report.read import folders
from grandrounds.wire.names import one_line

PARTS = (
    *(trained.run_section, trained.base_section, trained.data_section, trained.recipe_section),
    *(shared.approval_section, shared.left_section, protected.privacy_section),
    *(results.losses_section, results.evaluation_section),
    *(results.sites_section, results.subgroups_section),
    *(results.forgetting_section, results.personal_section, results.checkpoints_section),
    *(software.versions_section, software.packages_section),
)


def dossier_of(path: Path) -> Dossier:
    """Return the dossier of a run directory.

    Raises
    ------
    RunDirectoryError
        If it is none, the run has not ended, or a file is damaged or not what a run writes.
    """
    record = record_of(path)
    shown, names = without_folders(folders(record.run)), record.run.names
    called = {name: names.with_number(site) for site, name in names.labels.items()}

    def published(section: Section) -> Section:
        """Return a section without folders, line breaks and characters that nobody sees."""
        lines = [
            replace(one, item=one_line(shown(one.item)), value=one_line(shown(one.value), 10_000))
            for one in section.lines
        ]
        items = [one.item for one in lines]
        for i, item in enumerate(items):
            if item in called and items.index(item) < i:  # a site that is called like another line
                items[i] = called[item]
                lines[i] = replace(lines[i], item=items[i])
        if double := next((item for item in items if items.count(item) > 1), None):
            raise RunDirectoryError(
                f"{record.run.path} has {double!r} twice under {section.title!r}: two entries of a "
                "file are of the same thing, which no run writes. Restore the file from a copy."
            )
        return replace(section, lines=lines)

    named = one_line(shown(title(record.run)))
    sections = [published(part(record)) for part in PARTS]
    return Dossier(
        run=one_line(record.run.name),
        title=named,
        version=grandrounds.__version__,
        sections=sections,
        answers=answers(sections),
        numbering=NUMBERING,
        sbom=software.sbom(record, named),
        files=record.files,
    )
