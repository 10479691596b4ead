"""Finished units → comparison.json, whose format docs/compare.md describes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from grandrounds.statistics import compare_paired, counted, estimate, paired_test
from grandrounds.study.comparison.units import (
    BASE,
    BY_SITE,
    CENTRALISED,
    FEDERATED,
    LEAVE_ONE_OUT,
    LOCAL,
    PERSONAL,
    PRIVATE,
    Unit,
)

Json = dict[str, Any]
Found = Mapping[Unit, Mapping[str, Any]]
"""Finished unit → its result, as `arms.run_unit` returns it."""

FORMAT = 1
"""Version of the format of comparison.json."""

LOSS = "held-out-loss"
RIGHT, WRONG = "1", "0"
"""A unit's answers to an exam are a string of these, one per question."""

OWN, EVERYWHERE = "own", "everywhere"
"""Where a site's model is evaluated: on the site's own examples and questions, or on everyone's."""

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Results of the rival and of the federation, of one seed."""

Exams = Mapping[str, Mapping[str, Any]]
"""Exam → its entry in comparison.json, plus `site-of`: the site of each question, if the exam is
divided by site."""


def measured(holder: Mapping[str, Any], measure: str) -> Any:
    """Return the held-out loss, or the accuracy on an exam, of an arm, a site or a unit."""
    return holder[LOSS] if measure == LOSS else holder["accuracy"][measure]


def results(found: Found, exams: Exams) -> Json:
    """Return `arms`, `without`, `gains` and `joining`."""
    names = (BASE, FEDERATED, PERSONAL, PRIVATE, CENTRALISED, LOCAL)
    arms = {arm: _by_seed(found, arm, exams) for arm in names}
    arms = {arm: by_seed for arm, by_seed in arms.items() if by_seed}
    left_out = sorted({u.site for u in found if u.arm == LEAVE_ONE_OUT and u.site is not None})
    without = {k: _by_seed(found, LEAVE_ONE_OUT, exams, k) for k in left_out}
    federated = arms.get(FEDERATED, {})
    personal = arms.get(PERSONAL, {})
    rivals = {arm: arms[arm] for arm in (BASE, PRIVATE, CENTRALISED, LOCAL) if arm in arms}
    of_personal = {arm: arms[arm] for arm in (*rivals, FEDERATED) if arm in arms}
    return {
        "arms": {arm: _arm(by_seed) for arm, by_seed in arms.items()},
        "without": {str(k): _arm(by_seed) for k, by_seed in without.items()},
        "gains": [
            gain for arm, rival in rivals.items() for gain in _gains(arm, rival, federated, exams)
        ],
        **(
            {
                "personal-gains": [
                    gain
                    for arm, rival in of_personal.items()
                    for gain in _gains(arm, rival, personal, exams, ours=PERSONAL)
                ],
                "matrix": {arm: matrix(found, arm, exams) for arm in arms},
            }
            if personal
            else {}
        ),
        "joining": _joining(found, arms, exams),
    }


# --- One arm --------------------------------------------------------------------------------------


def _by_seed(found: Found, arm: str, exams: Exams, left_out: int | None = None) -> dict[str, Json]:
    """Return MEASURED of an arm by seed, plus the `answers`, which `_arm` leaves out."""
    chosen = {u: f for u, f in found.items() if u.arm == arm and left_out in (None, u.site)}
    out = {}
    for seed in sorted({unit.seed for unit in chosen}):
        of_seed = [chosen[u] for u in sorted(chosen, key=lambda u: u.site or 0) if u.seed == seed]
        if arm not in BY_SITE:
            out[str(seed)] = _one_adapter(of_seed[0], exams)
        elif len(of_seed) == of_seed[0]["num-sites"]:
            out[str(seed)] = _one_adapter_each(of_seed, exams)
    return out


def _one_adapter(unit: Mapping[str, Any], exams: Exams) -> Json:
    """Return the results of one adapter, overall and at each site."""
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
        **({"epsilon": unit["epsilon"]} if "epsilon" in unit else {}),
        "sites": sites,
        "answers": unit["answers"],
    }


def _one_adapter_each(units: Sequence[Mapping[str, Any]], exams: Exams) -> Json:
    """Return the results of one adapter per site, each evaluated at its own site and everywhere."""
    each = {str(unit["site"]): _one_adapter(unit, exams) for unit in units}
    sites = {site: one["sites"][site] for site, one in each.items()}
    answers = {  # each question answered by the model of its own site
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
        LOSS: _pooled_loss(list(sites.values())),
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
    """Return loss and accuracies of a unit's adapter, overall or at some sites.

    Parameters
    ----------
    sites
        Sites whose held-out examples count, and whose questions of exams divided by site; without
        any, everything counts.
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
    """Return the mean loss, weighted by answer tokens."""
    tokens = sum(part["tokens"] for part in judged)
    return float(sum(part[LOSS] * part["tokens"] for part in judged) / tokens)


def share(answers: str) -> float:
    """Return the share of correct answers."""
    return answers.count(RIGHT) / len(answers)


def _of_sites(answers: str, exam: Mapping[str, Any], sites: Sequence[int]) -> str:
    """Return the answers to some sites' questions, or to all questions if no site is given."""
    if not sites:
        return answers
    return "".join(a for a, site in zip(answers, exam["site-of"], strict=True) if site in sites)


def _arm(by_seed: Mapping[str, Json]) -> Json:
    """Return ARM: an arm's entry in comparison.json."""
    runs = list(by_seed.values())
    return {
        "seeds": {
            seed: {name: value for name, value in run.items() if name != "answers"}
            for seed, run in by_seed.items()
        },
        **_estimates(runs),
        "sites": {
            site: _estimates([run["sites"][site] for run in runs]) for site in runs[0]["sites"]
        },
    }


def _estimates(runs: Sequence[Mapping[str, Any]]) -> Json:
    """Return the estimates over seeds, from one result per seed."""
    found: Json = {
        LOSS: estimate([run[LOSS] for run in runs]),
        "accuracy": {
            name: estimate([run["accuracy"][name] for run in runs]) for name in runs[0]["accuracy"]
        },
    }
    if EVERYWHERE in runs[0]:
        found[EVERYWHERE] = _estimates([run[EVERYWHERE] for run in runs])
    return found


# --- The federation against the other arms --------------------------------------------------------


def _gains(
    arm: str,
    rival: Mapping[str, Json],
    federated: Mapping[str, Json],
    exams: Exams,
    ours: str = FEDERATED,
) -> list[Json]:
    """Return GAIN for held-out loss and every exam; also everywhere where sites have their own.

    Parameters
    ----------
    federated
        Results of the arm whose gain it is, `ours`, by seed.
    """
    sites_have_own = bool({arm, ours} & set(BY_SITE))
    pairs: dict[str, Pair] = {s: (rival[s], federated[s]) for s in federated if s in rival}
    gains = []
    for measure in (LOSS, *exams) if pairs else ():
        also_everywhere = sites_have_own and (measure == LOSS or exams[measure]["by-site"])
        for where in (OWN, EVERYWHERE) if also_everywhere else (OWN,):
            questions = {
                seed: _over_questions(
                    pair[0]["answers"][measure], pair[1]["answers"][measure], ours
                )
                for seed, pair in pairs.items()
                if where == OWN and all(measure in one["answers"] for one in pair)
            }
            judged = [_judged(pair, where) for pair in pairs.values()]
            gains.append(
                {
                    "over": arm,
                    "measure": measure,
                    "where": where,
                    "over-seeds": paired_test([gain(pair, measure) for pair in judged]),
                    "over-sites": _over_sites(list(pairs.values()), measure, where),
                    "over-questions": questions or None,
                }
            )
    return gains


def _judged(pair: Pair, where: str) -> Pair:
    return pair if where == OWN else (pair[0][EVERYWHERE], pair[1][EVERYWHERE])


def gain(pair: Pair, measure: str) -> float:
    """Return the lead of the federation: the lower loss, or the higher accuracy."""
    rival, federated = (measured(one, measure) for one in pair)
    return float(rival - federated if measure == LOSS else federated - rival)


def _over_sites(pairs: Sequence[Pair], measure: str, where: str) -> Json | None:
    """Return the test over sites of each site's mean gain; None if the exam has no sites."""
    at_sites = [
        [_judged((rival["sites"][k], federated["sites"][k]), where) for rival, federated in pairs]
        for k in pairs[0][1]["sites"]
    ]
    if measure != LOSS and measure not in at_sites[0][0][1]["accuracy"]:
        return None
    return counted([statistics.fmean(gain(pair, measure) for pair in site) for site in at_sites])


def _over_questions(rival: str, federated: str, ours: str = FEDERATED) -> Json:
    """Return McNemar's test over the questions of one seed."""
    pair = compare_paired([a == RIGHT for a in rival], [a == RIGHT for a in federated])
    return {
        "n": pair.n,
        f"only-{ours}": pair.only_second,
        "only-rival": pair.only_first,
        "gain": pair.difference,
        "interval": list(pair.interval),
        "p": pair.p_value,
    }


# --- Models by sites ------------------------------------------------------------------------------


def matrix(found: Found, arm: str, exams: Exams) -> Json:
    """Return MATRIX of an arm: how the model of each site does at each site.

    Returns
    -------
    dict
        For the held-out loss and each exam that is divided by site: `models`, model → site → mean
        over seeds (of a shared adapter one model, `all`); `own`, `others` and `everywhere`, model →
        the same at its own site, pooled over all other sites, and over all; of own the `worst`
        site with its value, and `spread`, the difference between best and worst.
    """
    units = [(unit, made) for unit, made in found.items() if unit.arm == arm]
    models: dict[str, list[Mapping[str, Any]]] = {}
    for unit, made in sorted(units, key=lambda pair: (pair[0].site or 0, pair[0].seed)):
        models.setdefault("all" if unit.site is None else str(unit.site), []).append(made)
    sites = [int(site) for site in units[0][1]["held-out"]]
    out: Json = {}
    for measure in (LOSS, *(name for name, exam in exams.items() if exam["by-site"])):

        def mean(made: Sequence[Mapping[str, Any]], *at: int, measure: str = measure) -> float:
            return statistics.fmean(measured(figures(one, exams, *at), measure) for one in made)

        at_sites = {
            model: {str(site): mean(made, site) for site in sites} for model, made in models.items()
        }
        shared = at_sites.get("all")
        own = shared or {model: at[model] for model, at in at_sites.items()}
        value = max if measure == LOSS else min
        worst = value(own, key=lambda site: own[site])
        out[measure] = {
            "models": at_sites,
            "own": own,
            "others": {}
            if shared or len(sites) < 2
            else {
                model: mean(made, *(site for site in sites if site != int(model)))
                for model, made in models.items()
            },
            "everywhere": {model: mean(made) for model, made in models.items()},
            "worst": {"site": int(worst), "value": own[worst]},
            "spread": max(own.values()) - min(own.values()),
        }
    return out


def _joining(found: Found, arms: Mapping[str, Mapping[str, Json]], exams: Exams) -> list[Json]:
    """Return JOINING of every site."""
    federated = {u.seed: f for u, f in found.items() if u.arm == FEDERATED}
    num_sites = next(iter(federated.values()))["num-sites"] if federated else 0
    out = []
    for k in range(num_sites):
        others = [site for site in range(num_sites) if site != k]
        for instead in (LOCAL, LEAVE_ONE_OUT):
            rival = {u.seed: f for u, f in found.items() if u.arm == instead and u.site == k}
            pairs = [(rival[s], federated[s]) for s in sorted(federated) if s in rival]
            if pairs and (instead == LEAVE_ONE_OUT or LOCAL in arms):
                is_left_out = instead == LEAVE_ONE_OUT
                out.append(
                    {
                        "site": k,
                        "instead-of": instead,
                        OWN: _tests(pairs, exams, k),
                        EVERYWHERE: _tests(pairs, exams),
                        "others": _tests(pairs, exams, *others) if is_left_out else None,
                    }
                )
    return out


def _tests(pairs: Sequence[Pair], exams: Exams, *sites: int) -> Json:
    """Return the paired tests over seeds of (rival, federated) units, overall or at some sites."""
    judged = [
        (figures(rival, exams, *sites), figures(ours, exams, *sites)) for rival, ours in pairs
    ]
    return {
        LOSS: paired_test([gain(pair, LOSS) for pair in judged]),
        "accuracy": {
            name: paired_test([gain(pair, name) for pair in judged])
            for name in judged[0][1]["accuracy"]
        },
    }
