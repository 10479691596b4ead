"""The terminal display: trees of recipe and plan, a progress bar, a table of the result."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.tree import Tree

from grandrounds.config.keys import Config
from grandrounds.server.described import cautions
from grandrounds.server.listeners import Facts, Listener
from grandrounds.server.listeners import plain as reporting
from grandrounds.server.listeners.next_steps import next_steps
from grandrounds.server.listeners.plain import Rows


class RichReporter(Listener):
    """Shows a run on a terminal; a context manager, so that the progress bar always ends."""

    def __init__(self, config: Config, console: Console) -> None:
        self._config, self._console = config, console
        self._present = reporting.Present()
        self._total = config.federation.num_server_rounds
        self._replies = 0
        self._failed = 0
        self._tree("recipe", reporting.recipe_rows(config))
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=self._total)

    def __exit__(self, *failure: object) -> None:
        self._progress.stop()

    def on_plan(self, plan: Facts) -> None:
        """Show the planned traffic; for a resumed run, also its progress so far."""
        self._tree("plan", reporting.plan_rows(plan))
        if plan.get("resumed-after"):
            self._progress.update(self._task, completed=plan["resumed-after"])

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        """Show the data of the sites and start the progress bar; later, name those that joined."""
        is_first = not self._present.sites
        new = self._present.add(sites)
        if not is_first:
            for site in new:
                self._console.print(escape(reporting.joined_line(site, self._present.names)))
            return
        rows = [*reporting.data_rows(self._config, sites), *reporting.site_rows(sites)]
        self._tree("sites", rows)
        self._progress.start()

    def on_reply(self, site: int, failure: str | None) -> None:
        """Count the updates of the current round."""
        self._replies += failure is None
        self._failed += failure is not None
        self._progress.update(
            self._task, description=f"{self._replies} good, {self._failed} failed updates"
        )

    def on_round(self, record: Facts) -> None:
        """Advance the bar, and print the round's failures above it."""
        if "train-loss" in record:
            self._replies, self._failed = 0, 0
            held_out = record.get("held-out-loss")
            parts = [f"loss {record['train-loss']:.4f}"]
            if held_out is not None:
                parts.append(f"held-out {held_out:.4f}")
            parts += [
                f"{len(record['good'])} good, {len(record['failed'])} failed",
                f"{record['communication-mib']:,.1f} MiB",
            ]
            self._progress.update(
                self._task, completed=record["round"], description="  ".join(parts)
            )
        for line in reporting.failure_lines(record, self._present.names):
            self._console.print(f"[red]{escape(line)}[/red]")

    def on_finished(self, summary: Facts) -> None:
        """Show the outcome in a table, and the next commands."""
        self._progress.stop()
        table = Table(title="result", show_header=False, title_justify="left")
        config, sites = self._config, self._present.sites
        for name, value in reporting.summary_rows(summary, sites):
            table.add_row(name, escape(value))
        self._console.print(table)
        if summary.get("formulary"):
            scores = Table(title="formulary", title_justify="left")
            for heading in ("facts", "base", "tuned"):
                scores.add_column(heading)
            for row in reporting.formulary_rows(summary["formulary"], config, sites):
                scores.add_row(*row)
            self._console.print(scores)
            self._console.print(f"[yellow]{reporting.forgetting_text(summary['formulary'])}[/]")
        for caution in cautions(config, sites):
            self._console.print(f"[yellow]note:[/] {escape(caution)}", soft_wrap=True)
        for line in next_steps(summary, config, sites):
            self._console.print(escape(line), soft_wrap=True)

    def _tree(self, title: str, rows: Rows) -> None:
        tree = Tree(f"[bold]{title}[/bold]")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            tree.add(f"[cyan]{name:<{width}}[/cyan]  {escape(value)}")
        self._console.print(tree)
