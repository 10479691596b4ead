"""Training results: loss by round, accuracy by checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grandrounds.config.words import command, counted
from grandrounds.data.formulary import FORMULARY
from grandrounds.server.described import before_training, is_of_the_formulary, leaderboard_text
from grandrounds.server.listeners.plain import HELD_BY_NOBODY
from grandrounds.statistics import wilson_interval
from grandrounds.study.evaluation.greedy import GREEDY
from grandrounds.study.report.charts import Interval, Point, Reference, Series, line_chart
from grandrounds.study.report.figures import Figure, Section, some
from grandrounds.study.report.read import RunFiles, checkpoints
from grandrounds.study.report.svg import Axis
from grandrounds.study.tables import NONE, Table, decimals_of, fixed, interval, number, percent
from grandrounds.wire.told import MARGIN, PREFERENCES, RANKING

MEANING = {
    "private": "private facts, held by single sites",
    "public": "public facts, known to the base",
}


EXACT_MATCH, TOKEN_F1 = "exact match", "token F1"


def section(run: RunFiles) -> Section:
    """Return losses and accuracies, and why they are not comparable with the leaderboard."""
    differs = leaderboard_text(run.config, run.sites)
    notes = [f"FlowerTune leaderboard: {differs}."] if differs else []
    figures = [*some(loss_figure(run), preference_figure(run)), *accuracy_figures(run)]
    return Section("learning", "Training results", notes, figures)


def curve(name: str, values: Sequence[tuple[int, float]], what: str, style: int = 0) -> Series:
    """Return (round, value) pairs as a series whose labels give round and value."""
    points = [Point(r, v, f"round {r}: {what} {number(v)}") for r, v in values]
    return Series(name, points, style)


# --- Loss -----------------------------------------------------------------------------------------


def loss_figure(run: RunFiles) -> Figure | None:
    """Return training and held-out loss by round."""
    trained, judged = run.values("train-loss"), run.values("held-out-loss")
    if not trained and not judged:
        return None
    series = [
        curve("held-out loss", judged, "held-out loss", 0),
        curve("training loss", trained, "training loss", 1),
    ]
    title = "Loss by round"
    by_round = {r: (dict(judged).get(r), dict(trained).get(r)) for r, _ in [*judged, *trained]}
    places = decimals_of((v for pair in by_round.values() for v in pair), 4, least=3)
    rows = [(str(r), fixed(h, places), fixed(t, places)) for r, (h, t) in sorted(by_round.items())]
    judges = max((len(m.get("evaluated") or ()) for m in run.metrics), default=0)
    parts = []
    if judged and not judged[0][0]:
        parts.append(f"Round 0 is {before_training(run.config)}.")
    if trained:
        parts.append("Training loss: mean over the cohort during local training.")
    if judged:
        held_by = counted(judges, "fixed site")
        parts.append(f"Held-out loss: on the held-out examples of {held_by}.")
    svg = line_chart(title, series, Axis(run.config.loss_unit), run.last_shown)
    return Figure(
        "loss",
        title,
        svg,
        " ".join(parts),
        Table(("round", "held-out loss", "training loss"), rows),
    )


def preference_figure(run: RunFiles) -> Figure | None:
    """Return what became of held-out preferences by round; None without any."""
    preferred, ranked, margins = (run.values(key) for key in (PREFERENCES, RANKING, MARGIN))
    if not preferred:
        return None
    shares = [[(r, 100 * v) for r, v in found] for found in (ranked, preferred)]
    series = [
        curve("chosen answer likelier", shares[0], "chosen answer likelier, %", 0),
        curve("margin above 0", shares[1], "margin above 0, %", 1),
    ]
    title = "Held-out preferences by round"
    by_round, places = dict(ranked), decimals_of((v for _, v in margins), 4, least=3)
    rows = [
        (str(r), percent(share), percent(by_round[r]), fixed(margin, places))
        for (r, share), (_, margin) in zip(preferred, margins, strict=True)
    ]
    note = (
        "Margin: how much more the adapter raises the chosen answer than the rejected one against "
        "the base, times beta; before training it is 0."
    )
    columns = ("round", "margin above 0", "chosen answer likelier", "mean margin")
    svg = line_chart(title, series, Axis("% of held-out pairs", from_zero=True), run.last_shown)
    return Figure("preferences", title, svg, note, Table(columns, rows))


# --- Accuracy -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Accuracy of one model on one benchmark, or on a group of its questions; or its token F1."""

    protocol: str
    benchmark: str
    group: str
    """Empty if the benchmark has no groups; of held-out rows the measure."""
    model: str
    correct: int | None
    """None for token F1, a mean over answers."""
    n: int
    accuracy: float
    interval: Interval | None
    """None where equal answers give none."""

    @property
    def round(self) -> int | None:
        """The round of a checkpoint; None for the base or another adapter."""
        number_of_round = self.model.removeprefix("peft_")
        return int(number_of_round) if number_of_round.isdigit() else None

    @property
    def counts(self) -> str:
        """Correct answers and questions; of token F1 the number of answers."""
        return f"{self.n:,} answers" if self.correct is None else f"{self.correct:,}/{self.n:,}"

    @property
    def words(self) -> str:
        """Share, counts and interval."""
        ends = f"; {interval(self.interval)} %" if self.interval else ""
        return f"{percent(self.accuracy)} ({self.counts}{ends})"

    @property
    def interval_percent(self) -> Interval | None:
        """The interval in percent."""
        return (100 * self.interval[0], 100 * self.interval[1]) if self.interval else None


def scores(run: RunFiles) -> list[Score]:
    """Return the accuracies of a run: from its evaluations, else those measured at its end."""
    found: dict[tuple[str, ...], Score] = {}
    for evaluation in run.evaluations:
        for row in evaluation["rows"]:
            for score in _scores_of_row(str(evaluation["protocol"]), row):
                key = (score.protocol, score.benchmark, score.group, score.model)
                found.setdefault(key, score)
    asked = {score.benchmark for score in found.values()}
    at_the_end = [s for s in _formulary_scores(run) if s.benchmark not in asked]
    return [*found.values(), *at_the_end]


def _scores_of_row(protocol: str, row: Mapping[str, Any]) -> Iterable[Score]:
    """Yield the scores of a row of evaluation.json: by group, or exact match and token F1."""
    title, model = str(row["title"]), str(row["model"])
    is_greedy = protocol == GREEDY
    for part in row.get("groups") or [row]:
        low, high = part["interval"]
        group = EXACT_MATCH if is_greedy else str(part.get("group", ""))
        bounds = (float(low), float(high))
        correct, n = int(part["correct"]), int(part["n"])
        yield Score(protocol, title, group, model, correct, n, float(part["accuracy"]), bounds)
    if is_greedy:
        f1 = row["f1"]
        ends = (float(f1["interval"][0]), float(f1["interval"][1])) if f1["interval"] else None
        yield Score(protocol, title, TOKEN_F1, model, None, int(row["n"]), float(f1["mean"]), ends)


def _formulary_scores(run: RunFiles) -> Iterable[Score]:
    """Yield the accuracies on the formulary that the run itself measured at its end."""
    asked: Mapping[str, Any] = run.summary.get("formulary") or {}
    holds_facts = is_of_the_formulary(run.config, run.sites)
    for group, models in asked.items():
        if group == "private" and not holds_facts:
            continue
        for model, counts in models.items():
            name = "base" if model == "base" else f"peft_{run.rounds}"
            correct, n = int(counts["correct"]), int(counts["n"])
            bounds = wilson_interval(correct, n)
            title = "Formulary (fictional)"
            yield Score("likelihood", title, group, name, correct, n, correct / n, bounds)


def scores_by_questions(run: RunFiles) -> dict[tuple[str, str, str], list[Score]]:
    """Return the scores by (protocol, benchmark, group)."""
    found: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores(run):
        found.setdefault((score.protocol, score.benchmark, score.group), []).append(score)
    return found


def accuracy_figures(run: RunFiles) -> list[Figure]:
    """Return a figure for each benchmark and protocol."""
    by_benchmark: dict[tuple[str, str], list[Score]] = {}
    for score in scores(run):
        by_benchmark.setdefault((score.protocol, score.benchmark), []).append(score)
    return [
        _accuracy_figure(run, f"accuracy-{place}", chosen)
        for place, chosen in enumerate(by_benchmark.values(), 1)
    ]


def _accuracy_figure(run: RunFiles, key: str, chosen: Sequence[Score]) -> Figure:
    """Return accuracy by checkpoint, with the base as a horizontal line."""
    series, references = [], []
    for style, group in enumerate(dict.fromkeys(s.group for s in chosen)):
        of_group = [s for s in chosen if s.group == group]
        points = [_point(s, s.round) for s in of_group if s.round is not None]
        series.append(Series(group or "tuned", sorted(points, key=lambda p: p.x), style))
        references += [
            Reference(f"{group} base".strip(), 100 * s.accuracy, style, s.interval_percent)
            for s in of_group
            if s.model == "base"
        ]
    title = f"Accuracy by checkpoint: {chosen[0].benchmark}"
    of_another = run.config.model.name != FORMULARY
    meaning = MEANING | ({"public": HELD_BY_NOBODY} if of_another else {})
    rows = [
        (
            meaning.get(s.group, s.group or "all"),
            s.model,
            s.counts,
            percent(s.accuracy),
            f"{interval(s.interval)} %" if s.interval else NONE,
        )
        for s in chosen
    ]
    note = f"Protocol: {chosen[0].protocol}. Whiskers and bands: 95 % intervals, Wilson's"
    if chosen[0].protocol == GREEDY:
        note += f" for exact match and Student's for token F1, both by SQuAD's rule.{_losses(run)}"
    else:
        note += "."
    note += " Horizontal lines: the base."
    if any(s.group == "private" for s in chosen):
        note += " Chance: 25 %."
    note += _single_checkpoint(run, chosen)
    svg = line_chart(title, series, Axis("accuracy, %", from_zero=True), run.last_shown, references)
    columns = ("questions", "model", "correct", "accuracy", "95 % interval")
    return Figure(key, title, svg, note, Table(columns, rows))


def _losses(run: RunFiles) -> str:
    """Return the held-out loss of each model that answered the held-out rows."""
    found: dict[str, float] = {}
    for evaluation in run.evaluations:
        if evaluation["protocol"] == GREEDY:
            for row in evaluation["rows"]:
                found.setdefault(str(row["model"]), float(row["loss"]["nats_per_token"]))
    each = ", ".join(f"{model} {number(nats)}" for model, nats in found.items())
    return f" Held-out loss of these rows, nats per token: {each}."


def _single_checkpoint(run: RunFiles, chosen: Sequence[Score]) -> str:
    """Return how to evaluate another checkpoint, if only one was evaluated."""
    asked = {s.round: s.model for s in chosen if s.round is not None}
    if len(asked) != 1:
        return ""
    [(number_of_round, model)] = asked.items()
    kept = [folder for r, folder in checkpoints(run.path) if r != number_of_round]
    said = f" Only the checkpoint of round {number_of_round} ({model}) was evaluated"
    if not kept:
        return f"{said}; the run directory holds no other."
    return f"{said}. To evaluate another: {command('grandrounds', 'evaluate', kept[-1])}"


def _point(score: Score, round_number: int) -> Point:
    words = f"{score.model}, {score.group or score.benchmark}: {score.words}"
    return Point(round_number, 100 * score.accuracy, words, score.interval_percent)
