"""The terminal display: trees of recipe and plan, a progress bar, a table of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text
from rich.tree import Tree

from grandrounds.config.keys import Config
from grandrounds.server.described import cautions
from grandrounds.server.listeners import Facts, Listener, boxes
from grandrounds.server.listeners import plain as reporting
from grandrounds.server.listeners.clock import Clock, time_text
from grandrounds.server.listeners.next_steps import next_steps
from grandrounds.server.listeners.start_rows import (
    Rows,
    data_rows,
    plan_rows,
    recipe_rows,
    site_rows,
)

REFRESHES_PER_SECOND = 8
"""Redraws of the moving line: enough to be seen, too few to be felt beside training."""


class TimeLeft(ProgressColumn):
    """The time that is left: `about 3 min 20 s left`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        """Return the text; empty while nothing can be estimated."""
        seconds = self._clock.left
        return Text("" if seconds is None else f"about {time_text(seconds)} left")


class RichReporter(Listener):
    """Shows a run on a terminal: the lines of `PlainReporter`, and below them what is going on.

    A context manager, which may be entered more than once; the moving line always ends with it.
    """

    def __init__(self, config: Config, console: Console, verbose: bool = False) -> None:
        self._config, self._console, self._verbose = config, console, verbose
        self._present = reporting.Present()
        self._total = config.federation.num_server_rounds
        self._clock = Clock(self._total)
        self._round, self._replies, self._failed = 0, 0, 0
        self._is_playing = False
        self._evaluate_share = 0.0
        self._tree("recipe", recipe_rows(config))
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TimeLeft(self._clock),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            refresh_per_second=REFRESHES_PER_SECOND,
        )
        self._task = self._progress.add_task("importing the libraries", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._progress.stop()

    def on_plan(self, plan: Facts) -> None:
        """Show the planned traffic; for a resumed run, also its progress so far."""
        self._tree("plan", plan_rows(plan))
        self._round = plan.get("resumed-after") or 0
        self._show("calling the roll of the sites")

    def on_roll_call(self, sites: Sequence[Facts]) -> None:
        """Show the data of the sites; later, name those that joined."""
        is_first = not self._present.sites
        new = self._present.add(sites)
        if not is_first:
            for site in new:
                self._print(reporting.joined_line(site, self._present.names))
            return
        rows = [*data_rows(self._config, sites), *site_rows(sites)]
        self._tree("sites", rows)
        self._clock.begins(self._round)
        self._show("the sites load the base")

    def on_step(self, what: str, site: int, done: int, total: int) -> None:
        """Show the site that is visited and its step."""
        step = f", step {done} of {total}" if total else ""
        where = self._present.names[site]
        if what == "training":
            self._is_playing = True
            cohort = self._config.cohort_size
            visit = self._replies + self._failed
            share = (visit + (done / total if total else 0)) / cohort
            self._clock.within((1 - self._evaluate_share) * share)
            where += f" ({min(visit + 1, cohort)} of {cohort})"
        self._show(f"{what} at {where}{step}")

    def on_reply(self, site: int, failure: str | None) -> None:
        """Count the updates of the current round."""
        self._replies += failure is None
        self._failed += failure is not None
        self._is_playing = True
        self._show(f"{self._replies} good, {self._failed} failed updates")
        if self._verbose:
            self._print(reporting.reply_line(site, failure, self._present.names))

    def on_checkpoint(self, round_number: int, folder: str) -> None:
        """Name the checkpoint, if more output is wanted."""
        if self._verbose:
            self._print(reporting.checkpoint_line(folder))

    def on_round(self, record: Facts) -> None:
        """Print the round's line and its failures above the bar, and advance it."""
        self._print(reporting.round_line(record, self._total))
        for line in reporting.limit_lines(record, self._present.names):
            self._print(line)
        for line in reporting.failure_lines(record, self._present.names):
            self._console.print(f"[red]{escape(line)}[/red]", soft_wrap=True, highlight=False)
        self._replies, self._failed = 0, 0
        self._round = record["round"]
        if self._round:
            self._clock.finished(self._round, record["seconds"])
            spent = record.get("evaluate-seconds", 0.0)
            self._evaluate_share = spent / record["seconds"] if record["seconds"] else 0.0
        else:
            self._clock.begins(0)
        self._is_playing = False
        self._show(f"round {self._round}/{self._total} finished")

    def _show(self, what: str) -> None:
        """Say below the lines what is going on, and in which round."""
        number = f"round {self._round + 1}/{self._total}  " if self._is_playing else ""
        self._progress.update(
            self._task,
            description=escape(f"{number}{what}"),
            total=self._total,
            completed=self._clock.done,
        )

    def _print(self, line: str) -> None:
        """Print a line as it is: never wrapped, so that it can be copied and searched."""
        self._console.print(escape(line), soft_wrap=True, highlight=False)

    def on_finished(self, summary: Facts) -> None:
        """Show the outcome in a table, and the next commands."""
        self.summary = summary
        self._progress.stop()
        config, sites = self._config, self._present.sites
        boxes.draw(self._console, "result", (), reporting.summary_rows(summary, sites))
        if summary.get("formulary"):
            scores = reporting.formulary_rows(summary["formulary"], config, sites)
            boxes.draw(self._console, "formulary", ("facts", "base", "tuned"), scores)
            if forgotten := reporting.forgetting_text(summary["formulary"], config):
                self._console.print(f"[yellow]{forgotten}[/]")
        if disagreement := reporting.disagreement_text(summary):
            self._console.print(f"[yellow]{disagreement}[/]", soft_wrap=True)
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
