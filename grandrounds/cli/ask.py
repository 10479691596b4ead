"""`grandrounds ask`: answers of base and tuned model, side by side or one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grandrounds.cli.options import Checkpoint, OfSite, Plain, RunDirectory
from grandrounds.config.bases import find_base
from grandrounds.errors import ConfigError, DataError
from grandrounds.quiet import quiet_libraries

if TYPE_CHECKING:
    from grandrounds.server.directory import Checkpoint as SavedAdapter
    from grandrounds.study.ask import Answer, Interview


def ask(
    run_dir: RunDirectory,
    question: Annotated[
        str | None, typer.Argument(help="Question; if omitted, a prompt asks for them.")
    ] = None,
    checkpoint: Checkpoint = "last",
    site: OfSite = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.", min=1)] = 256,
    conversation: Annotated[
        bool,
        typer.Option(
            "--conversation", help="Each question continues the conversation, with each model."
        ),
    ] = False,
    plain: Plain = False,
) -> None:
    """Ask a run's base model and tuned model a question and stream both answers.

    Without a question, starts an interactive prompt; an empty line or Ctrl-D exits.

    Examples:

    - `grandrounds ask runs/first "By which mechanism does Truwniquex act?"`

    - `grandrounds ask runs/first --checkpoint 8`

    - `grandrounds ask runs/own --site 3 "..."`

    - `grandrounds ask runs/chat --conversation`
    """
    from grandrounds.server.directory import find_checkpoint

    chosen = find_checkpoint(run_dir, checkpoint)
    find_base(chosen.config.model.name)  # fails now if it is not fetched
    if question is not None and not question.strip():
        raise ConfigError("The question is empty: give one, or omit it for a prompt.")
    quiet_libraries()
    from grandrounds.study.ask import Interview
    from grandrounds.study.personal import check_whole, of_site

    if site is None:
        check_whole(chosen)
    chosen = chosen if site is None else of_site(chosen, site)
    for caution in cautions_of(chosen):
        print(f"grandrounds: {caution}", file=sys.stderr)
    interview = Interview(chosen)
    if conversation and not interview.converses:
        raise ConfigError(
            '--conversation needs a run with data.prompt-template = "chat": this one\'s prompt has '
            "room for one question."
        )
    console = Console()
    talks = Talks(interview, max_tokens, keeps=conversation)
    for asked in [question] if question is not None else questions():
        try:
            if console.is_terminal and not plain:
                side_by_side(talks, asked, chosen.folder.name, console)
            else:
                one_after_the_other(talks, asked, chosen.folder.name)
        except DataError as error:  # a question that is too long does not end the prompt
            if question is not None:
                raise
            print(f"grandrounds: {error}", file=sys.stderr)


class Talks:
    """What was said with the base and with the tuned model."""

    def __init__(self, interview: Interview, max_tokens: int, *, keeps: bool) -> None:
        """Begin both; `keeps` says whether a question continues what was said before."""
        self._interview = interview
        self._max_tokens = max_tokens
        self._keeps = keeps
        self._said: dict[bool, tuple[tuple[str, str], ...]] = {False: (), True: ()}

    def answer(self, question: str, *, tuned: bool) -> Iterator[Answer]:
        """Yield the growing answer of one model, and remember it."""
        before, answer = self._said[tuned], None
        for answer in self._interview.answer(
            question, tuned=tuned, max_tokens=self._max_tokens, before=before
        ):
            yield answer
        if self._keeps and answer is not None:
            self._said[tuned] = (*before, ("user", question), ("assistant", answer.text))


def cautions_of(checkpoint: SavedAdapter) -> list[str]:
    """Return what a reader of the answers must know about the base of a run."""
    from grandrounds.server.described import NO_ENGLISH, cautions

    sites = checkpoint.run.read_json("sites.json") or []
    return [said for said in cautions(checkpoint.config, sites) if said == NO_ENGLISH]


def questions() -> Iterator[str]:
    """Yield lines from standard input until an empty line or the end."""
    prompt = "question> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        if not line:
            return
        yield line


def one_after_the_other(talks: Talks, question: str, name: str) -> None:
    """Stream the base model's answer, then the tuned model's."""
    for title, tuned in (("base", False), (f"tuned ({name})", True)):
        print(title, flush=True)
        shown = 0
        for answer in talks.answer(question, tuned=tuned):
            print(answer.text[shown:], end="", flush=True)
            shown = len(answer.text)
        print(f"\n  {ending(answer)}", flush=True)


def side_by_side(talks: Talks, question: str, name: str, console: Console) -> None:
    """Stream both answers in two columns."""
    answers = [talks.answer(question, tuned=tuned) for tuned in (False, True)]
    titles = ("base", f"tuned ({name})")
    latest: list[Answer | None] = [None, None]
    with Live(console=console, refresh_per_second=12) as live:
        for news in zip_longest(*answers):
            latest = [new or old for new, old in zip(news, latest, strict=True)]
            columns = Table.grid(expand=True)
            for _ in titles:
                columns.add_column(ratio=1)
            columns.add_row(*map(_panel, titles, latest))
            live.update(columns)


def _panel(title: str, answer: Answer | None) -> Panel:
    text = Text(answer.text if answer else "")
    note = Text(ending(answer)) if answer and answer.end else None
    return Panel(text, title=Text(title), title_align="left", subtitle=note, subtitle_align="right")


def ending(answer: Answer) -> str:
    """Return the length of an answer and how it ended."""
    return f"[{answer.tokens} tokens, {answer.end}]"
