"""The display on a terminal, recorded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grandrounds.config import recipes
from grandrounds.server.listeners.next_steps import next_steps
from grandrounds.server.listeners.plain import round_line, summary_rows
from grandrounds.server.listeners.start_rows import (
    data_rows,
    machine_rows,
    plan_rows,
    recipe_rows,
    site_rows,
)
from grandrounds.server.listeners.terminal import RichReporter
from tests.listening import Telling
from tests.runs import Settings, interrupted_at, metrics_of, play

FORMULARY = {
    "public": {"base": {"correct": 100, "n": 100}, "tuned": {"correct": 72, "n": 100}},
    "private": {"base": {"correct": 25, "n": 100}, "tuned": {"correct": 84, "n": 100}},
}


@pytest.fixture
def console() -> Console:
    return Console(record=True, force_terminal=True, width=100, file=io.StringIO())


def show(settings: Settings, console: Console) -> tuple[str, dict[str, Any]]:
    """Run a federation on a recorded terminal; return its lines and the events' data.

    The display is not entered, so that the moving line is not recorded among the others.
    """
    config = recipes.resolve(settings)
    display = RichReporter(config, console)
    told: dict[str, Any] = {}

    def listen(event: str, data: Any) -> None:
        told[event] = data

    play(settings, listener=Telling(listen, display))
    return console.export_text(), told


def joined(text: str) -> str:
    """Return text with line breaks, frames and runs of blanks removed."""
    return "".join(c for c in text if not c.isspace() and c not in "│└─├┏┓┃━┗┛┡┩┐┘┌")


def test_target_modules_without_a_match_are_named() -> None:
    plan = {"totals": {}, "total-mib": 0.0, "adapter-parameters": 9, "target-modules": ["q_proj"]}
    assert ("adapter", "9 parameters, on q_proj") in plan_rows(plan)
    plan["target-modules-without-match"] = ["W_pack", "c_attn"]
    told = "9 parameters, on q_proj; no module matches W_pack, c_attn"
    assert ("adapter", told) in plan_rows(plan)


def test_a_run_shows_recipe_plan_sites_result_and_next_steps(
    settings: Settings, console: Console
) -> None:
    text, told = show(settings, console)
    lines = [line.strip() for line in text.splitlines()]
    order = [lines.index(title) for title in ("recipe", "plan", "sites", "result")]
    assert order == sorted(order)
    shown = joined(text)
    config, sites = recipes.resolve(settings), told["roll-call"]["sites"]
    about_sites = [*data_rows(config, sites), *site_rows(sites)]
    for name, value in [
        *recipe_rows(config),
        *plan_rows(told["plan"]),
        *about_sites,
        *summary_rows(told["finished"]),
    ]:
        assert joined(name + value) in shown
    for line in next_steps(told["finished"], config, sites):
        assert line in text  # not wrapped, so that paths and commands can be copied
    rounds = [line for line in lines if line.startswith("round ")]
    assert rounds == [
        round_line(record, 3) for record in metrics_of(Path(settings["run-directory"]))
    ]
    trees = text.splitlines()[: order[2] + 1 + len(about_sites)]
    assert max(len(line) for line in trees) <= 100


def test_the_formulary_is_a_table_with_intervals(settings: Settings, console: Console) -> None:
    _, told = show(settings, console)
    known = {"static.dataset.name": "formulary", "model.name": "formulary"}
    display = RichReporter(recipes.resolve({**settings, **known}), console)
    display.on_finished({**told["finished"], "formulary": FORMULARY})
    shown = joined(console.export_text())
    # Wilson's intervals of 25, 84, 100 and 72 of 100, from R's binom.wilson
    for score in (
        "25.0 % (25/100, 95 % interval 17.5-34.3)",
        "84.0 % (84/100, 95 % interval 75.6-89.9)",
        "100.0 % (100/100, 95 % interval 96.3-100.0)",
        "72.0 % (72/100, 95 % interval 62.5-79.9)",
    ):
        for part in score.replace("(", " ").replace(")", " ").split():
            assert part in shown
    assert "facts" in shown
    assert shown.index("25/100") < shown.index("100/100")  # the sites' facts come first


@pytest.mark.parametrize("folder", ["[x]", "[/bold]", "[red]a[/red]", "a[b", "back\\", "[/]"])
def test_markup_in_paths_is_shown_as_it_is(
    settings: Settings, console: Console, tmp_path: Path, folder: str
) -> None:
    run = tmp_path / folder / "run"
    text, told = show({**settings, "run-directory": str(run)}, console)
    assert f"adapter: {run}/peft_3" in text
    assert joined(f"run directory  {run}") in joined(text)
    assert told["finished"]["status"] == "completed"


def test_names_stand_in_the_lines_of_sites_that_fail_or_join(
    settings: Settings, console: Console
) -> None:
    record = {
        "round": 1,
        "train-loss": 1.5,
        "held-out-loss": None,
        "good": [0],
        "cohort": [0, 3],
        "failed": {"3": "wrong tensors: missing ['[a]']"},
        "evaluate-failed": {"2": "no reply within 5 s", "3": "out of memory"},
        "communication-mib": 0.5,
        "seconds": 2.0,
    }
    display = RichReporter(recipes.resolve(settings), console)
    counts = {"rows": 9, "empty-rows": 0, "duplicate-rows": 0, "unlearnable": 0, "truncated": 0}
    about = {**counts, "train-examples": 8, "held-out-examples": 1}
    about |= {"device": "CPU", "precision": "float32", "threads": 1}
    named = [{"partition-id": 3, "name": "St [red]E", **about}]
    with display:
        display.on_roll_call(named)
        display.on_roll_call([*named, {"partition-id": 1, "name": "Ward B", **about}])
        display.on_reply(0, None)
        display.on_reply(3, "wrong tensors")
        display.on_round(record)
    text = console.export_text()
    assert "names        St [red]E" in text
    assert "Ward B joined: 8 examples for training" in text
    assert text.count("St [red]E") == 3
    assert "St [red]E failed: wrong tensors: missing ['[a]']" in text
    assert "St [red]E failed in evaluation: out of memory" in text
    assert "site 2 failed in evaluation: no reply within 5 s" in text


def test_the_moving_line_tells_round_site_step_and_time_left(
    settings: Settings, console: Console
) -> None:
    display = RichReporter(recipes.resolve(settings), console)
    seen: list[str] = []

    def look() -> None:
        task = display._progress.tasks[0]
        left = display._clock.left
        seen.append(
            f"{task.completed:.2f} {task.description} {'' if left is None else 'ETA'}".strip()
        )

    display.on_step("held-out loss", 3, 0, 0)
    look()
    for done, total in ((0, 0), (1, 2), (2, 2)):
        display.on_step("training", 1, done, total)
        look()
    display.on_reply(1, None)
    look()
    display.on_step("training", 2, 1, 2)
    look()
    assert seen == [
        "0.00 held-out loss at site 3",
        "0.00 round 1/3  training at site 1 (1 of 2)",
        "0.25 round 1/3  training at site 1 (1 of 2), step 1 of 2 ETA",
        "0.50 round 1/3  training at site 1 (1 of 2), step 2 of 2 ETA",
        "0.50 round 1/3  1 good, 0 failed updates ETA",
        "0.75 round 1/3  training at site 2 (2 of 2), step 1 of 2 ETA",
    ]


def test_steps_of_a_visit_reach_the_listener_of_a_run_in_process(settings: Settings) -> None:
    from grandrounds.engines.in_process import run_in_process
    from grandrounds.server.listeners import Listener

    told: list[tuple[str, int, int, int]] = []

    class Steps(Listener):
        def on_step(self, what: str, site: int, done: int, total: int) -> None:
            told.append((what, site, done, total))

    run_in_process(recipes.resolve({**settings, "num-server-rounds": 1}), Steps())
    trained = [(done, total) for what, _, done, total in told if what == "training"]
    assert trained == [(0, 0), (1, 2), (2, 2)] * 2
    assert [what for what, *_ in told if what != "training"] == ["held-out loss"] * 4


def test_the_progress_bar_ends_when_a_run_is_interrupted(
    settings: Settings, console: Console
) -> None:
    def interrupt(event: str, data: Any) -> None:
        if event == "round" and data["round"] == 1:
            raise KeyboardInterrupt

    config = recipes.resolve(settings)
    display = RichReporter(config, console)
    with pytest.raises(KeyboardInterrupt), display:
        play(settings, listener=Telling(interrupt, display))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") > 0


def test_a_resumed_run_says_after_which_round(settings: Settings, console: Console) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("round", 3))
    text, told = show({**settings, "resume-from": settings["run-directory"]}, console)
    assert "after round 2" in text
    assert told["finished"]["rounds"] == 3


def test_what_a_site_says_of_its_machine_is_one_line_without_control_characters() -> None:
    said = {"device": "CPU\x1b[2J\nround 9/9", "threads": 2, "precision": "float\u202e32"}
    before = {"computed-before": "8 threads,\nproducts by \x07onednn"}
    [(_, machine), (_, note)] = machine_rows([{**said, **before}])
    assert machine == "CPU[2J round 9/9, 2 threads: float32"
    assert note.startswith("1 site computed with 8 threads, products by onednn before")
