"""The tables of real_model.py's lines; no script by itself."""

from __future__ import annotations

from typing import Any

from grandrounds.cli.screen import Screen

CHANCE = "guessing reaches 25 % in MedMCQA, and the share of the commonest answer in PubMedQA"

Line = dict[str, Any]


def show(lines: list[Line]) -> None:
    """Print the tables for which there are finished cells."""
    screen = Screen(plain=True)
    played = [line for line in lines if "cell" in line]
    machines(played, screen)
    for part in ("wikidoc", "formulary"):
        own = [line for line in played if line["cell"]["part"] == part]
        rounds(part, own, screen)
        comparison(own, screen)
        for line in own:
            if line["cell"]["what"] == "benchmarks":
                evaluation(line["result"], f"after {part}", screen)
    forgetting(played, screen)
    seconds(played, screen)


def machines(lines: list[Line], screen: Screen) -> None:
    """Print on what the cells were played."""
    seen = dict.fromkeys(
        f"{m['device']}, torch {m['packages']['torch']}, transformers "
        f"{m['packages']['transformers']}; {m['precision']}; {m['threads']} CPU threads, "
        f"cells at a time: {m['jobs']}"
        for m in (line["machine"] for line in lines)
    )
    screen.notes(list(seen))


def rounds(part: str, lines: list[Line], screen: Screen) -> None:
    """Print the held-out loss of the selected sites round by round, one column for each seed."""
    told = {
        line["cell"]["seed"]: {r["round"]: r["held-out-loss"] for r in line["result"]["rounds"]}
        for line in lines
        if line["cell"]["what"] == "federated"
    }
    if not told:
        return
    numbers = sorted({number for losses in told.values() for number in losses})
    rows = [
        (str(number), *(cell(losses.get(number)) for losses in told.values()))
        for number in numbers
        if any(losses.get(number) is not None for losses in told.values())
    ]
    columns = ("round", *(f"seed {seed}" for seed in told))
    title = f"{part}: held-out loss of the selected sites, nats a token"
    screen.table(title, columns, rows)


def cell(value: float | None) -> str:
    """Return a loss as a cell."""
    return "-" if value is None else f"{value:.3f}"


def comparison(lines: list[Line], screen: Screen) -> None:
    """Print arms, gains and notes of a comparison's finished units."""
    from grandrounds.study.comparison.results import results
    from grandrounds.study.comparison.tables import notes, tables
    from grandrounds.study.comparison.units import Unit

    plans = [line["result"] for line in lines if line["cell"]["what"] == "plan"]
    found = {
        Unit(line["result"]["arm"], line["cell"]["seed"], line["cell"]["site"]): line["result"]
        for line in lines
        if "arm" in line["result"]
    }
    if not plans or not found:
        return
    content = {**plans[0]["content"], **results(found, plans[0]["entries"])}
    for table in tables(content)[:2]:
        screen.table(table.title, table.columns, table.rows)
    screen.notes(notes(content))


def evaluation(content: dict[str, Any], title: str, screen: Screen) -> None:
    """Print accuracies with their intervals."""
    from grandrounds.study.evaluation.tables import tables

    table = tables(content)[0]
    screen.table(f"{table.title}, {title}", table.columns, table.rows)
    screen.notes(["Wilson intervals, 95 %; vs base: Newcombe's, p by McNemar's test", CHANCE])


def forgetting(lines: list[Line], screen: Screen) -> None:
    """Print WikiDoc's held-out loss of the base and after the formulary."""
    wanted = {("wikidoc", "base"): "base", ("formulary", "loss"): "after the formulary"}
    rows = []
    for line in lines:
        name = wanted.get((line["cell"]["part"], line["cell"]["what"]))
        if name:
            sites = line["result"]["held-out"].values()
            loss = sum(s["nll-sum"] for s in sites) / sum(s["tokens"] for s in sites)
            rows.append((name, str(line["cell"]["seed"]), cell(loss)))
    if any(row[0] != "base" for row in rows):
        screen.table("WikiDoc, held-out loss in nats a token", ("model", "seed", "loss"), rows)


def seconds(lines: list[Line], screen: Screen) -> None:
    """Print the wall time of each kind of cell, summed over sites."""
    spent: dict[tuple[str, str, int], float] = {}
    for line in lines:
        key = (line["cell"]["part"], line["cell"]["what"], line["cell"]["seed"])
        if key[1] == "plan":
            continue
        spent[key] = spent.get(key, 0.0) + line["seconds"]
    rows = [(part, what, str(seed), f"{s:.1f}") for (part, what, seed), s in spent.items()]
    if rows:
        screen.table("wall time", ("part", "what", "seed", "seconds"), rows)
