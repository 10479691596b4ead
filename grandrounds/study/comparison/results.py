"""Finished units → comparison.json. docs/compare.md has the format."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.statistics import compare_paired, counted, estimate, paired_test
from grandrounds.study.comparison.units import (
    BASE,
    CENTRALISED,
    FEDERATED,
    LEAVE_ONE_OUT,
    LOCAL,
    Unit,
)

Json = dict[str, Any]
Found = Mapping[Unit, Mapping[str, Any]]
"""What each finished unit found, as `comparison_arms` returns it."""

LOSS = "held-out-loss"
RIGHT, WRONG = "1", "0"
"""Characters of a unit's answers to an exam, question by question."""

OWN, EVERYWHERE = "own", "everywhere"
"""Where a site's model is judged: on what belongs to the site, or on what belongs to any."""

Exams = Mapping[str, Mapping[str, Any]]
"""Name → facts of comparison.json, and `site-of`: the site that each question belongs to, where the
exam is divided by site."""


def results(found: Found, exams: Exams) -> Json:
    """Return `arms`, `without`, `gains` and `joining`."""
    measured = {arm: _by_seed(found, arm, exams) for arm in (BASE, FEDERATED, CENTRALISED, LOCAL)}
    measured = {arm: by_seed for arm, by_seed in measured.items() if by_seed}
    left_out = sorted({u.site for u in found if u.arm == LEAVE_ONE_OUT and u.site is not None})
    without = {k: _by_seed(found, LEAVE_ONE_OUT, exams, k) for k in left_out}
    federated = measured.get(FEDERATED, {})
    rivals = {arm: measured[arm] for arm in (BASE, CENTRALISED, LOCAL) if arm in measured}
    return {
        "arms": {arm: _arm(by_seed) for arm, by_seed in measured.items()},
        "without": {str(k): _arm(by_seed) for k, by_seed in without.items()},
        "gains": [
            found_gain
            for arm, rival in rivals.items()
            for found_gain in _gains(arm, rival, federated, exams)
        ],
        "joining": _joining(found, measured, exams),
    }


# --- One arm --------------------------------------------------------------------------------------


def _by_seed(found: Found, arm: str, exams: Exams, left_out: int | None = None) -> dict[str, Json]:
    """Return seed → MEASURED of an arm, with `answers` besides, which `_arm` leaves out."""
    chosen = {u: f for u, f in found.items() if u.arm == arm and left_out in (None, u.site)}
    out = {}
    for seed in sorted({unit.seed for unit in chosen}):
        of_seed = [chosen[u] for u in sorted(chosen, key=lambda u: u.site or 0) if u.seed == seed]
        if arm != LOCAL:
            out[str(seed)] = _one_adapter(of_seed[0], exams)
        elif len(of_seed) == of_seed[0]["num-sites"]:
            out[str(seed)] = _one_adapter_each(of_seed, exams)
    return out


def _one_adapter(unit: Mapping[str, Any], exams: Exams) -> Json:
    """Return what one adapter is worth, in all and at each site."""
    everywhere = figures(unit, exams)
    sites = {
        site: {
            **figures(unit, exams, int(site)),
            "tokens": judged["tokens"],
            EVERYWHERE: everywhere,
        }
        for site, judged in unit["held-out"].items()
    }
    return {
        **everywhere,
        EVERYWHERE: everywhere,
        **{name: unit[name] for name in ("example-visits", "train-loss", "seconds")},
        "failed-replies": unit.get("failed-replies", 0),
        "run": unit["run"],
        "sites": sites,
        "answers": unit["answers"],
    }


def _one_adapter_each(units: Sequence[Mapping[str, Any]], exams: Exams) -> Json:
    """Return what the sites' own adapters are worth, each at its own site and everywhere."""
    each = {str(unit["site"]): _one_adapter(unit, exams) for unit in units}
    sites = {site: one["sites"][site] for site, one in each.items()}
    answers = {  # each question by the model of the site that it belongs to
        name: "".join(
            each[str(site)]["answers"][name][number] for number, site in enumerate(exam["site-of"])
        )
        for name, exam in exams.items()
        if exam["by-site"]
    }
    everywhere: Json = {
        LOSS: statistics.fmean(one[LOSS] for one in each.values()),
        "accuracy": {
            name: statistics.fmean(one["accuracy"][name] for one in each.values()) for name in exams
        },
    }
    return {
        LOSS: _pooled_loss([sites[site] for site in sites]),
        "accuracy": {**everywhere["accuracy"], **{n: share(a) for n, a in answers.items()}},
        EVERYWHERE: everywhere,
        "example-visits": sum(one["example-visits"] for one in each.values()),
        "train-loss": statistics.fmean(one["train-loss"] for one in each.values()),
        "seconds": sum(one["seconds"] for one in each.values()),
        "failed-replies": 0,
        "run": None,
        "sites": sites,
        "answers": answers,
    }


def figures(unit: Mapping[str, Any], exams: Exams, *sites: int) -> Json:
    """Return loss and accuracies of a unit's adapter, on everything or on some sites' part.

    Parameters
    ----------
    sites
        Only their held-out examples, and only their questions of exams that are divided by site;
        none: everything.
    """
    held_out = [unit["held-out"][str(site)] for site in sites] or unit["held-out"].values()
    losses = [{LOSS: h["nll-sum"] / h["tokens"], "tokens": h["tokens"]} for h in held_out]
    return {
        LOSS: _pooled_loss(losses),
        "accuracy": {
            name: share(_of_sites(unit["answers"][name], exam, sites))
            for name, exam in exams.items()
            if exam["by-site"] or not sites
        },
    }


def _pooled_loss(judged: Sequence[Mapping[str, Any]]) -> float:
    """Return a mean loss, weighted by answer tokens."""
    tokens = sum(part["tokens"] for part in judged)
    return float(sum(part[LOSS] * part["tokens"] for part in judged) / tokens)


def share(answers: str) -> float:
    """Return the share of right answers."""
    return answers.count(RIGHT) / len(answers)


def _of_sites(answers: str, exam: Mapping[str, Any], sites: Sequence[int]) -> str:
    """Return the answers to some sites' questions; no sites: to all questions."""
    if not sites:
        return answers
    return "".join(a for a, site in zip(answers, exam["site-of"], strict=True) if site in sites)


def _arm(by_seed: Mapping[str, Json]) -> Json:
    """Return ARM: what stands in the file for one arm."""
    runs = list(by_seed.values())
    return {
        "seeds": {
            seed: {name: value for name, value in measured.items() if name != "answers"}
            for seed, measured in by_seed.items()
        },
        **_estimates(runs),
        "sites": {
            site: _estimates([run["sites"][site] for run in runs]) for site in runs[0]["sites"]
        },
    }


def _estimates(measured: Sequence[Mapping[str, Any]]) -> Json:
    """Return the estimates over seeds of what was measured once for each."""
    found: Json = {
        LOSS: estimate([one[LOSS] for one in measured]),
        "accuracy": {
            name: estimate([one["accuracy"][name] for one in measured])
            for name in measured[0]["accuracy"]
        },
    }
    if EVERYWHERE in measured[0]:
        found[EVERYWHERE] = _estimates([one[EVERYWHERE] for one in measured])
    return found


# --- Arms against each other ----------------------------------------------------------------------


def _gains(
    arm: str, rival: Mapping[str, Json], federated: Mapping[str, Json], exams: Exams
) -> list[Json]:
    """Return GAIN for held-out loss and every exam; of sites alone also everywhere."""
    seeds = [seed for seed in federated if seed in rival]
    if not seeds:
        return []
    gains = []
    for measure in (LOSS, *exams):
        pairs = {
            s: (rival[s]["answers"][measure], federated[s]["answers"][measure])
            for s in seeds
            if measure in rival[s]["answers"]
        }
        gains.append(
            {
                "over": arm,
                "measure": measure,
                "where": OWN,
                "over-seeds": paired_test([gain(rival[s], federated[s], measure) for s in seeds]),
                "over-sites": _over_sites(rival, federated, measure, seeds),
                "over-questions": {s: _over_questions(*pair) for s, pair in pairs.items()} or None,
            }
        )
        if arm == LOCAL and (measure == LOSS or exams[measure]["by-site"]):
            over_seeds = [
                gain(rival[s][EVERYWHERE], federated[s][EVERYWHERE], measure) for s in seeds
            ]
            gains.append(
                {
                    "over": arm,
                    "measure": measure,
                    "where": EVERYWHERE,
                    "over-seeds": paired_test(over_seeds),
                    "over-sites": _over_sites(rival, federated, measure, seeds, EVERYWHERE),
                    "over-questions": None,
                }
            )
    return gains


def gain(rival: Mapping[str, Any], federated: Mapping[str, Any], measure: str) -> float:
    """Return what the federation is ahead: loss that is lower, or accuracy that is higher."""
    if measure == LOSS:
        return float(rival[LOSS] - federated[LOSS])
    return float(federated["accuracy"][measure] - rival["accuracy"][measure])


def _over_sites(
    rival: Mapping[str, Json],
    federated: Mapping[str, Json],
    measure: str,
    seeds: Sequence[str],
    where: str = OWN,
) -> Json | None:
    """Return the test over sites of each one's mean gain; None if sites have no such figure."""

    def at(site: str, measured: Mapping[str, Json], seed: str) -> Any:
        judged = measured[seed]["sites"][site]
        return judged[EVERYWHERE] if where == EVERYWHERE else judged

    sites = list(federated[seeds[0]]["sites"])
    if measure != LOSS and measure not in at(sites[0], federated, seeds[0])["accuracy"]:
        return None
    return counted(
        [
            statistics.fmean(gain(at(k, rival, s), at(k, federated, s), measure) for s in seeds)
            for k in sites
        ]
    )


def _over_questions(rival: str, federated: str) -> Json:
    """Return McNemar's test of one seed."""
    pair = compare_paired([a == RIGHT for a in rival], [a == RIGHT for a in federated])
    return {
        "n": pair.n,
        "only-federated": pair.only_second,
        "only-rival": pair.only_first,
        "gain": pair.difference,
        "interval": list(pair.interval),
        "p": pair.p_value,
    }


def _joining(found: Found, measured: Mapping[str, Mapping[str, Json]], exams: Exams) -> list[Json]:
    """Return JOINING of every site, by site."""
    federated = {u.seed: f for u, f in found.items() if u.arm == FEDERATED}
    num_sites = next(iter(federated.values()))["num-sites"] if federated else 0
    out = []
    for k in range(num_sites):
        others = [site for site in range(num_sites) if site != k]
        for instead in (LOCAL, LEAVE_ONE_OUT):
            if instead == LOCAL and LOCAL not in measured:
                continue
            rival = {u.seed: f for u, f in found.items() if u.arm == instead and u.site == k}
            pairs = [(rival[s], federated[s]) for s in sorted(federated) if s in rival]
            if pairs:
                is_left_out = instead == LEAVE_ONE_OUT
                out.append(
                    {
                        "site": k,
                        "instead-of": instead,
                        "own": _tests(pairs, exams, k),
                        "everywhere": _tests(pairs, exams),
                        "others": _tests(pairs, exams, *others) if is_left_out else None,
                    }
                )
    return out


def _tests(pairs: Sequence[tuple[Any, Any]], exams: Exams, *sites: int) -> Json:
    """Return the paired test over seeds of (rival, federated) units, on some sites' part."""
    judged = [tuple(figures(unit, exams, *sites) for unit in pair) for pair in pairs]
    return {
        LOSS: paired_test([gain(rival, federated, LOSS) for rival, federated in judged]),
        "accuracy": {
            name: paired_test([gain(rival, federated, name) for rival, federated in judged])
            for name in judged[0][1]["accuracy"]
        },
    }
