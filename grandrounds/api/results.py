"""What calls return: a run, an evaluation, a comparison, a plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grandrounds.api.html import as_html
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.study.tables import Table

OVERLAP = "overlap.json"
"""File with the findings of `grandrounds evaluate --check-overlap`."""

if TYPE_CHECKING:
    from grandrounds.server.directory import RunDirectory
    from grandrounds.study.dossier.lines import Dossier
    from grandrounds.study.dossier.verify import Verdict
    from grandrounds.study.plan.forecast import Forecast


@dataclass(frozen=True, repr=False)
class Run:
    """A run directory: completed, failed or in progress. Its files are read at each use."""

    path: Path

    @property
    def _directory(self) -> RunDirectory:
        from grandrounds.server.directory import RunDirectory

        return RunDirectory.open(self.path)

    @property
    def config(self) -> Config:
        """Its configuration, of which `flat()` gives keys and values."""
        return recipes.resolve(recipes.load_recipe(self.path / "config.toml"))

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: status, held-out loss, communication, seconds, accuracies."""
        return dict(self._directory.read_json("summary.json"))

    @property
    def status(self) -> str:
        """`completed`, `failed`, `interrupted` or `running`."""
        from grandrounds.study.report.read import read_run

        return read_run(self.path).status

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl: one mapping per finished round, the round before training first."""
        return self._directory.read_metrics()

    @property
    def sites(self) -> list[dict[str, Any]]:
        """sites.json: what the sites told at the roll call."""
        return list(self._directory.read_json("sites.json"))

    @property
    def adapter(self) -> Path:
        """Folder of the last checkpoint, which `peft.PeftModel.from_pretrained` reads.

        Raises
        ------
        RunDirectoryError
            If there is none yet.
        """
        return self.checkpoint("last")

    def checkpoint(self, which: str | int = "last") -> Path:
        """Return the folder of a checkpoint: `last`, `best` (held-out loss), or a round."""
        from grandrounds.server.directory import find_checkpoint

        return find_checkpoint(self.path, str(which)).folder

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        from grandrounds.study.report.read import read_run

        found = read_run(self.path)
        rows = [("directory", str(self.path)), ("status", found.status)]
        rows.append(("rounds", f"{found.rounds} of {found.planned_rounds}"))
        if losses := found.values("held-out-loss"):
            rows.append(("held-out loss", f"{losses[0][1]:.4f} to {losses[-1][1]:.4f}"))
        if sent := found.values("communication-mib"):
            rows.append(("communication", f"{sent[-1][1]:,.1f} MiB"))
        return as_html([Table(("run", ""), rows)])


@dataclass(frozen=True, repr=False)
class Evaluation:
    """An evaluation.json: models by questions by protocols, with intervals."""

    path: Path
    """Folder of evaluation.json and of every answer."""
    content: Mapping[str, Any]

    def tables(self) -> list[Table]:
        """Return what `grandrounds evaluate` prints."""
        return [table for tables, _ in self.shown() for table in tables]

    def shown(self) -> Iterator[tuple[list[Table], list[str]]]:
        """Yield the tables of each protocol, with the notes that no earlier one had."""
        from grandrounds.study.evaluation.tables import notes, tables
        from grandrounds.study.evaluation.verification import evaluations_in, read_result

        file = self.path / OVERLAP
        overlap = read_result(file) if file.is_file() else None
        told: set[str] = set()
        for evaluation in evaluations_in(dict(self.content)):
            new = [note for note in notes(evaluation, overlap) if note not in told]
            yield tables(evaluation), new
            told.update(new)

    def __repr__(self) -> str:
        return f"Evaluation({str(self.path)!r})"

    def _repr_html_(self) -> str:
        found = list(self.shown())
        every = [table for tables, _ in found for table in tables]
        return as_html(every, [note for _, notes in found for note in notes])


@dataclass(frozen=True, repr=False)
class Comparison:
    """A comparison.json: arms by seeds, with what each site gains."""

    path: Path
    """Folder of the comparison; the same call with `out` there continues it."""
    content: Mapping[str, Any]

    def tables(self) -> Sequence[Table]:
        """Return what `grandrounds compare` prints."""
        from grandrounds.study.comparison.tables import tables

        return tables(dict(self.content))

    def notes(self) -> list[str]:
        """Return what a reader must know to interpret the tables."""
        from grandrounds.study.comparison.tables import notes

        return notes(dict(self.content))

    def __repr__(self) -> str:
        return f"Comparison({str(self.path)!r})"

    def _repr_html_(self) -> str:
        return as_html(self.tables(), self.notes())


@dataclass(frozen=True, repr=False)
class Plan:
    """What a run will send, and what memory and data it takes; nothing was loaded."""

    forecast: Forecast
    warnings: Sequence[str]

    @cached_property
    def content(self) -> dict[str, Any]:
        """The plan as `grandrounds plan --json` gives it, without codecs and links."""
        from grandrounds.study.plan.forecast import as_dict

        return dict(json.loads(json.dumps(as_dict(self.forecast))))

    @property
    def total_mib(self) -> float:
        """Communication of the whole run in MiB, by FlowerTune's count."""
        return self.forecast.plan.total_bytes / 2**20

    def tables(self) -> list[Table]:
        """Return what `grandrounds plan` prints."""
        from grandrounds.study.plan.tables import tables

        return list(tables(self.forecast, None))

    def __repr__(self) -> str:
        return f"Plan({self.total_mib:,.2f} MiB)"

    def _repr_html_(self) -> str:
        from grandrounds.study.plan.tables import notes

        return as_html(self.tables(), [*notes(self.forecast, None), *self.warnings])


@dataclass(frozen=True)
class Filed:
    """A dossier that was written."""

    path: Path
    """The page; its JSON lies beside it."""
    run: Path
    """The run directory."""
    dossier: Dossier

    @property
    def content(self) -> dict[str, Any]:
        """The dossier as its JSON has it: sections of lines, guidelines, files, SBOM, digest."""
        return self.dossier.as_dict()

    def verify(self) -> Verdict:
        """Compare the page as it lies there with the run's files: `holds`, else `findings`.

        Raises
        ------
        DataError
            If the page is no dossier any more.
        """
        from grandrounds.study.dossier.verify import verify

        return verify(self.run, self.path)

    def tables(self) -> list[Table]:
        """Return the sections as tables of item, value and source."""
        return [
            Table(
                ("item", "value", "from"),
                [
                    (one.item, one.value, "; ".join(f"{s.file} {s.at}" for s in one.sources))
                    for one in section.lines
                ],
                section.title,
            )
            for section in self.dossier.sections
        ]

    def _repr_html_(self) -> str:
        return as_html(self.tables(), [f"Digest: {self.content['digest']}"])
