"""Every figure that `grandrounds evaluate` writes, recomputed from the recorded answers.

Statistics are SciPy's and this folder's own. Whether an answer is right was recorded with it, but
under FlowerTune's protocol, where it is read again from what the model wrote.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.check_figures.page import Texts
from scripts.check_figures.raw import Json, evaluations_in
from scripts.check_figures.scores import GREEDY, wilson
from scripts.check_figures.sheet import Sheet
from scripts.check_figures.shown import numbers_in

Answers = list[dict[str, Any]]

SETTINGS = ("quantization", "limit", "permutations", "answer_tokens")

PUBLISHED = {
    **{"pubmedqa": 500, "medqa": 1273, "medmcqa": 4183, "careqa": 5621},
    **{"formulary": 660, "common-and-rare": 228, "general": 40},
}
"""Items of benchmarks, as in docs/evaluation.md."""

TEXTS = ("title", "prompt_hash", "source", "own", "model", "benchmark", "limited")
"""Keys of a row that hold no figure."""


def check_evaluation(folder: Path) -> Sheet:
    """Check evaluation.json of a folder against the answers beside it."""
    content = json.loads((folder / "evaluation.json").read_text())
    texts: Texts = {}
    sheet = Sheet(texts)
    settings = json.loads((folder / "settings.json").read_text())
    for evaluation in evaluations_in(content):
        protocol = evaluation["protocol"]
        for key in SETTINGS:
            if evaluation.get(key) is not None:
                texts[f"{protocol}/{key}"] = json.dumps(evaluation[key])
                known = settings.get(key, settings.get(key.replace("_", " ")))
                sheet.want(f"{protocol}/{key}", [] if known is None else [known])
        for row in evaluation["rows"]:
            at = f"{protocol}/{row['model']}/{row['benchmark']}"
            _flatten(texts, at, {k: v for k, v in row.items() if k not in TEXTS})
            names = row["benchmark"], protocol
            own, base = (answers_of(folder, one, *names) for one in (row["model"], "base"))
            for key, values in wanted(folder, row, protocol, own, base).items():
                sheet.want(f"{at}/{key}", values)
        for model, average in evaluation["average"].items():
            place = f"{protocol}/average/{model}"
            _flatten(texts, place, average)
            for key, values in average_of(evaluation, model).items():
                sheet.want(f"{place}/{key}", values)
    for place, text in texts.items():
        if numbers_in(text) and place not in sheet.seen:
            sheet.findings.append(f"{place}: no rule explains {text!r}")
    return sheet


def _flatten(texts: Texts, at: str, value: Any) -> None:
    """Note the numbers of nested values by their place; a list is one text."""
    if isinstance(value, dict):
        for key, part in value.items():
            _flatten(texts, f"{at}/{key}", part)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            rest = {k: v for k, v in part.items() if k != "group"}
            _flatten(texts, f"{at}/{part['group']}", rest)
    elif not isinstance(value, str | bool):
        values = value if isinstance(value, list) else [value]
        texts[at] = ", ".join(json.dumps(one) for one in values)


def answers_of(folder: Path, model: str, benchmark: str, protocol: str) -> dict[int, Answers]:
    """Return order of the options → answers by row."""
    file = folder / f"answers_{model}_{benchmark}_{protocol}.jsonl"
    found: dict[int, Answers] = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["order"], []).append(record)
    return {order: sorted(of, key=lambda one: one["row"]) for order, of in sorted(found.items())}


def wanted(
    folder: Path, row: Json, protocol: str, own: dict[int, Answers], base: dict[int, Answers]
) -> dict[str, Sequence[float]]:
    """Return place below a row → its values, recomputed from the answers."""
    found: dict[str, Sequence[float]] = {}
    if protocol == "flowertune":
        outputs = outputs_of(folder, row)
        right = [one == gold for one, _, gold in outputs]
        found |= format_of(row, outputs)
        before = [p == g for p, _, g in outputs_of(folder, {**row, "model": "base"})]
    else:
        key = "exact" if protocol == GREEDY else "correct"
        right, before = ([one[key] for one in of[0]] for of in (own, base))
    against = None if row["model"] == "base" else before
    found |= counts(right, against)
    start = 0
    for group in row["groups"]:  # each holds consecutive rows
        end = start + group["n"]
        part = None if against is None else against[start:end]
        of_group = counts(right[start:end], part)
        found |= {f"groups/{group['group']}/{key}": values for key, values in of_group.items()}
        start = end
    if row["groups"]:
        found["n"] = [start]
    found["truncated"] = [sum(one["truncated"] for one in own[0])]
    published = PUBLISHED.get(row["benchmark"], row["expected"])
    found["expected"] = [published] if row["limited"] == (len(right) < published) else []
    most = row["largest_answer"]["n"]
    found["largest_answer/n"] = [most] if 0 < most <= len(right) else []
    if protocol == "likelihood":
        found |= orders(own)
    if protocol == GREEDY:
        found |= words(row, own[0], None if against is None else base[0])
    return found


def counts(right: Sequence[bool], before: Sequence[bool] | None) -> dict[str, Sequence[float]]:
    """Return the counts of answers, and of pairs with the base's: McNemar, Newcombe's method 10."""
    from scipy.stats import binomtest

    n, correct = len(right), sum(right)
    low, high = wilson(correct, n)
    found: dict[str, Sequence[float]] = {
        **{"n": [n], "correct": [correct], "accuracy": [correct / n], "interval": [low, high]}
    }
    if before is None:
        return {**found, "vs_base": []}
    cells = Counter(zip(before, right, strict=True))
    lost, gained = cells[True, False], cells[False, True]
    both, neither = cells[True, True], cells[False, False]
    p = float(binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0
    then = sum(before) / n
    low_then, high_then = wilson(sum(before), n)
    product = both * neither - lost * gained
    sizes = math.prod((sum(before), n - sum(before), correct, n - correct))
    corrected = max(product - n / 2, 0.0) if product > 0 else product
    phi = corrected / math.sqrt(sizes) if sizes else 0.0

    def apart(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    difference = correct / n - then
    ends = [
        difference - apart(correct / n - low, high_then - then),
        difference + apart(high - correct / n, then - low_then),
    ]
    return found | {
        **{"vs_base/only_base": [lost], "vs_base/only_model": [gained]},
        **{"vs_base/difference": [difference], "vs_base/interval": ends, "vs_base/p_value": [p]},
    }


def orders(own: dict[int, Answers]) -> dict[str, Sequence[float]]:
    """Return the figures on length and order of the options."""
    from scipy.stats import chisquare

    n = len(own[0])
    by_length = sum(one["correct_normalised"] for one in own[0])
    found: dict[str, Sequence[float]] = {
        "normalised/correct": [by_length],
        "normalised/accuracy": [by_length / n],
        "normalised/interval": wilson(by_length, n),
    }
    asked = [of for order, of in own.items() if order]
    if not asked:
        return {**found, "shuffled": [], "position_bias": []}
    each = [sum(one["correct"] for one in of) for of in asked]
    always = sum(all(one["correct"] for one in item) for item in zip(*asked, strict=True))
    found |= {
        **{"shuffled/n": [n], "shuffled/correct": each, "shuffled/always_correct": [always]},
        "shuffled/mean": [statistics.fmean(each) / n],
        "shuffled/minimum": [min(each) / n],
        "shuffled/maximum": [max(each) / n],
        "shuffled/always_correct_share": [always / n],
    }
    sizes = {len(one["log_likelihoods"]) for one in own[0]}
    if len(sizes) > 1:
        found["position_bias"] = []
    else:
        chosen = Counter(one["choice"] for of in asked for one in of)
        at = [chosen[position] for position in range(sizes.pop())]
        found |= {
            "position_bias/counts": at,
            "position_bias/shares": [count / sum(at) for count in at],
            "position_bias/p_value": [float(chisquare(at).pvalue)],
        }
    return found


def words(row: Json, own: Answers, base: Answers | None) -> dict[str, Sequence[float]]:
    """Return token F1 and loss of a model's own words; Student's interval and paired t-test."""
    from scipy.stats import ttest_1samp

    f1 = [one["f1"] for one in own]
    tokens = sum(one["reference_tokens"] for one in own)
    ends: list[float] = []
    if len(set(f1)) > 1:
        within = ttest_1samp(f1, 0.0).confidence_interval()
        ends = [max(0.0, float(within.low)), min(1.0, float(within.high))]
    found: dict[str, Sequence[float]] = {
        **{"f1/mean": [statistics.fmean(f1)], "f1/interval": ends},
        "loss/nats_per_token": [sum(one["nll"] for one in own) / tokens],
        "loss/tokens": [tokens],
        "cut": [sum(not one["stopped"] for one in own)],
        # the reference answers are not recorded
        "differing_numbers": [row["differing_numbers"]]
        if row["differing_numbers"] <= sum(one["exact"] for one in own)
        else [],
    }
    if base is None:
        found["f1/vs_base"] = []
    else:
        gains = [now - one["f1"] for now, one in zip(f1, base, strict=True)]
        place = "f1/vs_base"
        found |= {f"{place}/{key}": [] for key in ("interval", "p_value")}
        found[f"{place}/difference"] = [statistics.fmean(gains)]
        if max(gains) - min(gains) > 1e-9:
            test = ttest_1samp(gains, 0.0)
            within = test.confidence_interval()
            found[f"{place}/interval"] = [float(within.low), float(within.high)]
            found[f"{place}/p_value"] = [float(test.pvalue)]
    return found


def average_of(evaluation: Json, model: str) -> dict[str, Sequence[float]]:
    """Return the mean over benchmarks: Wilson's distances added as Zou, Huang and Zhang do."""
    rows = [row for row in evaluation["rows"] if row["model"] == model]
    shares = [row["correct"] / row["n"] for row in rows]
    bounds = [wilson(row["correct"], row["n"]) for row in rows]
    mean, k = statistics.fmean(shares), len(rows)
    below, above = (
        math.sqrt(sum((share - ends[i]) ** 2 for share, ends in zip(shares, bounds, strict=True)))
        for i in (0, 1)
    )
    return {"accuracy": [mean], "interval": [mean - below / k, mean + above / k], "benchmarks": []}


# --- FlowerTune's protocol ------------------------------------------------------------------------

Written = list[tuple[str, str, str]]
"""What a model wrote: the answer as read, the whole output, the right answer."""


def outputs_of(folder: Path, row: Json) -> Written:
    """Return what a model wrote, as FlowerTune's evaluator reads it.

    The first line below `##` if there is one, without punctuation; a letter by the first character,
    a word by the whole.
    """
    file = folder / f"generation_{row['benchmark']}_{row['model']}.jsonl"
    found = []
    for record in json.loads(file.read_text()):
        output, gold = record["output"].lower(), record["gold"].lower()
        if "###" in gold:
            gold = gold.partition("answer is:")[2].split("###")[0].strip()
        said = _plain(output) if "yes" in row["spread"] else _plain(output)[:1]
        if double := re.search("yesyes|nono|yesno|noyes", said):
            said = said.replace(double[0], "no" if double[0] in ("nono", "noyes") else "yes")
        is_read = said in ("a", "b", "c", "d", "e", "yes", "no")
        found.append((said if is_read else output, record["output"], gold))
    return found


def _plain(output: str) -> str:
    part = output.split("\n##")[1].split("\n")[0].strip() if "\n##" in output else output
    return re.sub(" +", " ", re.sub("[^a-zA-Z0-9]", " ", part).strip())


def format_of(row: Json, written: Written) -> dict[str, Sequence[float]]:
    """Return the counts of answers by their form."""
    labels = {label.lower(): label for label in row["spread"] if label != "other"}
    spread = Counter(labels.get(read, "other") for read, _, _ in written)
    is_letter = "yes" not in labels
    failed = [
        (output, read in labels)
        for read, output, _ in written
        if read not in labels or (is_letter and len(_plain(output.lower())) > 1)
    ]
    said = Counter(output for output, _ in failed)
    return {
        **{f"spread/{label}": [spread[label]] for label in row["spread"]},
        "format_failures": [len(failed)],
        "first_letter_answers": [sum(by_letter for _, by_letter in failed)],
        **{f"commonest_failures/{one}": [said[one]] for one in row["commonest_failures"]},
    }
