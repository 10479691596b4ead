"""What a site in its own custody tells, and what it rounds: both ends read its figures here.

Sites in process and in simulation tell all figures exactly. A real site tells those of its policy
(`grandrounds.site.custody.disclosure`), and the server goes without the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

BASE = "base-content"
"""Key of an introduction: the SHA-256 of the base's files. Only sites in their own custody tell."""

DATA_TAG = "data-tag"
"""Key of an introduction: a hash of the site's examples, the same as long as they are. That of a
real site is keyed by a secret of its own and differs from run to run."""

BASE_COMMIT, DATA_COMMIT = "base-commit", "data-commit"
"""Facts of an introduction: the commits of base and data on the hub that were really loaded."""

POLICY = "policy-sha256"
"""Key of an introduction: the SHA-256 of a real site's rules, if the site tells it."""

OF_TEXTS = "t"
"""Beginning of the hash of a site that holds more than it tokenises beforehand: it is one of the
texts, where others hash the tokens."""

TRUNCATED = "truncated"
"""Count of an introduction: answers cut at the sequence length. Such a site does not know it."""

HELD_OUT_LOSS = "held-out-loss"
"""Metric of a real site's reply to `evaluate`: its loss in nats per answer token, rounded. It takes
the place of `nll-sum` and `tokens`."""

MEDIAN_LOSS = "held-out-loss-median"
"""Key of metrics.jsonl: the median of the sites' held-out losses."""

MARGIN_SUM, PREFERRED, RANKED = "margin-sum", "preferred", "ranked"
"""Metrics of the reply to `evaluate` where training is on preferences: the summed margins of the
held-out pairs, the pairs with a margin above 0, and those whose chosen answer is the likelier one.
`tokens` are the pairs there, and `nll-sum` is the summed loss."""

MARGIN, PREFERENCES, RANKING = "margin", "preference-accuracy", "ranking-accuracy"
"""Keys of metrics.jsonl: mean margin, and shares of the held-out pairs."""

COUNTS = (
    *("rows", "empty-rows", "duplicate-rows", TRUNCATED, "unlearnable"),
    *("train-examples", "held-out-examples"),
)
"""Facts of an introduction that count rows and examples."""

SAME_IN_A_RUN = (
    *("rows", "train-examples", "held-out-examples", "truncated", "unlearnable"),
    *("base", "prompt", DATA_TAG),
)
"""Facts that must not change when a site returns or a run is resumed, where it tells them."""

SAME_IF_TOLD = (BASE_COMMIT, DATA_COMMIT)
"""Facts that must not change either, unless an introduction of an earlier version lacks them."""

HIGHEST_LOSS = 1e6
"""No held-out loss is higher, in nats per answer token."""

LOSS_DECIMALS = 2
"""Decimals of a loss that a real site tells."""

_GRID = (10, 15, 20, 30, 50, 70)


def in_custody(introduction: Mapping[str, Any]) -> bool:
    """Whether a site is one in its own custody."""
    return BASE in introduction


def rounded_count(count: int) -> int:
    """Return a count rounded to 1, 1.5, 2, 3, 5 or 7 times a power of ten, by ratio.

    The result is within 30 % of the count, and 0 only for 0. Rounding again changes nothing.
    """
    if count < 1:
        return 0
    power = int(10 ** (len(str(count)) - 1))
    near = [step * power // 10 for step in (*_GRID, 100) if step * power % 10 == 0]
    return min(near, key=lambda value: (abs(math.log(value / count)), value))


def rounded_loss(loss: float) -> float:
    """Return a loss as a real site tells it."""
    return round(loss, LOSS_DECIMALS)


Told = Mapping[str, float | int]
"""The metrics of a reply."""


def total(replies: Iterable[Told], name: str) -> int | None:
    """Return the sum of a figure that every reply tells; None where one does not."""
    told = [metrics.get(name) for metrics in replies]
    return None if None in told else sum(int(value or 0) for value in told)


def mean(replies: Mapping[int, Told], name: str, weights: Mapping[int, int]) -> float | None:
    """Return the weighted mean of a figure over the sites that tell it; None if none does."""
    telling = {p: metrics for p, metrics in replies.items() if name in metrics}
    if not telling:
        return None
    weighted = sum(float(metrics[name]) * weights[p] for p, metrics in telling.items())
    return weighted / sum(weights[p] for p in telling)


def held_out_loss(replies: Iterable[Told]) -> float | None:
    """Return the held-out loss in nats per answer token; None if no site tells one.

    Every token counts the same where all sites tell their tokens; otherwise every site counts by
    its (rounded) number of held-out examples.
    """
    all_replies = list(replies)
    if (tokens := total(all_replies, "tokens")) is not None:
        return sum(float(m["nll-sum"]) for m in all_replies) / tokens if tokens else None
    losses = [(_loss(m), int(m.get("num-examples", 0))) for m in all_replies]
    told = [(loss, count) for loss, count in losses if loss is not None and count]
    examples = sum(count for _, count in told)
    return sum(loss * count for loss, count in told) / examples if examples else None


def pair_figures(replies: Iterable[Told]) -> dict[str, float]:
    """Return mean margin, preference accuracy and ranking accuracy over all held-out pairs.

    Empty if a site does not tell them, or there are no pairs.
    """
    all_replies = list(replies)
    sums = {MARGIN: MARGIN_SUM, PREFERENCES: PREFERRED, RANKING: RANKED}
    pairs = total(all_replies, "tokens")
    if not pairs or any(name not in m for m in all_replies for name in sums.values()):
        return {}
    return {key: sum(float(m[name]) for m in all_replies) / pairs for key, name in sums.items()}


def pairs_in(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of held-out pairs in a line of metrics.jsonl; empty where it has none."""
    return {name: record[name] for name in (MARGIN, PREFERENCES, RANKING) if name in record}


def site_losses(replies: Mapping[int, Told]) -> dict[int, float]:
    """Return each site's held-out loss in nats per answer token, where it tells one."""
    losses = {p: _loss(metrics) for p, metrics in sorted(replies.items())}
    return {p: loss for p, loss in losses.items() if loss is not None}


def within(metrics: Told, most_tokens: int, most_examples: int) -> dict[str, float | int]:
    """Return a reply to `evaluate` whose weight in the mean is at most what its site introduced.

    Its loss per answer token stays the same.
    """
    out = dict(metrics)
    if (tokens := out.get("tokens", 0)) > most_tokens:
        out |= {"tokens": most_tokens, "nll-sum": float(out["nll-sum"]) / tokens * most_tokens}
    if "num-examples" in out:
        out["num-examples"] = min(int(out["num-examples"]), most_examples)
    return out


def deciding_loss(record: Mapping[str, Any]) -> float | None:
    """Return the loss of a line of metrics.jsonl that chooses the best checkpoint.

    The median over sites, which no minority sets; in runs of before, the mean.
    """
    loss = record.get(MEDIAN_LOSS)
    return record.get("held-out-loss") if loss is None else loss


def _loss(metrics: Told) -> float | None:
    if metrics.get("tokens"):
        return float(metrics["nll-sum"]) / metrics["tokens"]
    return float(metrics[HELD_OUT_LOSS]) if HELD_OUT_LOSS in metrics else None


def total_of_sites(sites: Iterable[Mapping[str, Any]], name: str) -> int | None:
    """Return the sum of a count over introductions; None where a site does not tell it."""
    told = [site.get(name) for site in sites]
    return None if None in told else sum(int(value) for value in told if value is not None)
