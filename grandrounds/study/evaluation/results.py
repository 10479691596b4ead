"""Recorded answers become counts, intervals and comparisons: the content of `evaluation.json`.

The layout is that of `grandrounds.study.evaluation.verification`, with these keys beside it:

    models       model → adapter, adapter_sha256, role
    base_fingerprint, quantization, limit, permutations, prompt_template
    rows, each:
        title            the benchmark's, for tables
        truncated        items whose prompt was cut on the left
        expected         items of the benchmark as published
        groups           where a benchmark has parts: group, n, correct, accuracy, interval, vs_base
        vs_base          only_base, only_model, difference, interval, p_value; null for the base
      and with protocol `flowertune`:
        spread, format_failures, first_letter_answers, commonest_failures
      or with protocol `likelihood`:
        normalised       correct, accuracy, interval by log-likelihood per character
        shuffled         n, correct, mean, minimum, maximum, always_correct, always_correct_share;
                         null where no order of options is shown
        position_bias    counts, shares, p_value over the shuffled orders; likewise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import grandrounds
from grandrounds.statistics import (
    average_accuracy,
    compare_paired,
    position_bias,
    shuffled_accuracy,
    wilson_interval,
)
from grandrounds.study.evaluation import flowertune, likelihood
from grandrounds.study.evaluation.answers import AnswerFile, Record, writing
from grandrounds.study.evaluation.benchmarks import Item, benchmarks
from grandrounds.study.evaluation.tasks import ALL, Plan, Task
from grandrounds.study.evaluation.verification import implausible

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "numpy", "scipy")
"""Libraries whose versions go into the result, besides our own."""

Answers = Mapping[tuple[str, str, str], AnswerFile]
"""(model, benchmark, protocol) → the answers."""


def evaluation_of(plan: Plan, settings: Mapping[str, Any], answers: Answers) -> dict[str, Any]:
    """Return what `evaluation.json` holds, from answers that are all there."""
    each = [_of_protocol(plan, settings, answers, protocol) for protocol in plan.protocols]
    return each[0] if len(each) == 1 else {"protocol": ALL, "evaluations": each}


def evaluations_in(content: Any) -> list[Any]:
    """Return the evaluations of an `evaluation.json`, one per protocol."""
    several = content.get("evaluations") if isinstance(content, dict) else None
    return list(several) if isinstance(several, list) and several else [content]


def _of_protocol(
    plan: Plan, settings: Mapping[str, Any], answers: Answers, protocol: str
) -> dict[str, Any]:
    """Return the evaluation by one protocol."""
    tuned = [subject for subject in plan.subjects if subject.adapter is not None]
    rows = []
    for task in plan.tasks:
        base_right: list[bool] = []
        for subject in plan.subjects:
            file = answers[subject.name, task.benchmark.name, protocol]
            row, right = _ROWS[protocol](task, file)
            base_right = base_right or right
            against = base_right if subject.adapter is not None else None
            row = {"model": subject.name, **_common(plan, task, right, against), **row}
            row["prompt_hash"] = settings["prompt hash"][task.benchmark.name][protocol]
            row["truncated"] = sum(record["truncated"] for record in file.ordered())
            rows.append(row)
    return {
        "protocol": protocol,
        "base": plan.base,
        "base_fingerprint": settings["base fingerprint"],
        "adapter": str(tuned[0].adapter) if tuned else None,
        "adapter_sha256": tuned[0].sha256 if tuned else None,
        "models": {
            s.name: {"adapter": str(s.adapter), "adapter_sha256": s.sha256, "role": s.role}
            for s in tuned
        },
        "precision": settings["precision"],
        "quantization": plan.quantization,
        "prompt_template": plan.prompt_template,
        "limit": plan.limit,
        "permutations": plan.permutations,
        "versions": versions(),
        "rows": rows,
        "average": {subject.name: _average(rows, subject.name) for subject in plan.subjects},
    }


def versions() -> dict[str, str]:
    """Return the version of each library that is installed, and our own."""
    found = {"grandrounds": grandrounds.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _average(rows: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    counts = {r["benchmark"]: (r["correct"], r["n"]) for r in rows if r["model"] == model}
    average = average_accuracy(counts)
    return {
        "accuracy": average.accuracy,
        "interval": list(average.interval),
        "benchmarks": list(average.benchmarks),
    }


# --- One row --------------------------------------------------------------------------------------


def _common(
    plan: Plan, task: Task, right: Sequence[bool], base_right: Sequence[bool] | None
) -> dict[str, Any]:
    """Return what rows of every protocol hold."""
    benchmark = task.benchmark
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        **_counts(right, base_right),
        "expected": benchmark.expected_items,
        "limited": len(task.items) < benchmark.expected_items,
        "source": task.source,
        "groups": _groups(task.items, right, base_right),
    }


def _counts(right: Sequence[bool], base_right: Sequence[bool] | None) -> dict[str, Any]:
    """Return counts, accuracy, its interval, and the comparison with the base."""
    n, correct = len(right), sum(right)
    compared = None
    if base_right is not None:
        paired = compare_paired(base_right, right)
        compared = {
            "only_base": paired.only_first,
            "only_model": paired.only_second,
            "difference": paired.difference,
            "interval": list(paired.interval),
            "p_value": paired.p_value,
        }
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": list(wilson_interval(correct, n)),
        "vs_base": compared,
    }


def _groups(
    items: Sequence[Item], right: Sequence[bool], base_right: Sequence[bool] | None
) -> list[dict[str, Any]]:
    """Return the counts of each part of a benchmark; none where it has no parts."""
    groups = []
    for name in dict.fromkeys(item.group for item in items if item.group):
        where = [i for i, item in enumerate(items) if item.group == name]
        base_part = None if base_right is None else [base_right[i] for i in where]
        groups.append({"group": name, **_counts([right[i] for i in where], base_part)})
    return groups


def _flowertune_row(task: Task, file: AnswerFile) -> tuple[dict[str, Any], list[bool]]:
    """Return what only protocol `flowertune` tells, and which items are right."""
    labels = task.benchmark.labels
    records = generations(task, file)
    score = flowertune.rescore(records, labels)
    kind = flowertune.answer_type(labels)
    pairs = [flowertune.read_answer(r.output.lower(), r.gold.lower(), kind) for r in records]
    row = {
        "spread": score.spread,
        "format_failures": score.format_failures,
        "first_letter_answers": score.first_letter_answers,
        "commonest_failures": score.commonest_failures,
    }
    return row, [predicted == gold for predicted, gold in pairs]


def _likelihood_row(task: Task, file: AnswerFile) -> tuple[dict[str, Any], list[bool]]:
    """Return what only protocol `likelihood` tells, and which items are right."""
    published = file.ordered()
    n, normalised = len(published), sum(r["correct_normalised"] for r in published)
    orders = sorted({order for order, _ in file.records} - {0})
    shuffled, bias = None, None
    if orders:
        answers = [file.ordered(order) for order in orders]
        summary = shuffled_accuracy([[r["correct"] for r in records] for records in answers])
        choices = [record["choice"] for records in answers for record in records]
        shuffled = _plain(asdict(summary))
        bias = _plain(asdict(position_bias(choices, len(task.benchmark.labels))))
    row = {
        "normalised": {
            "correct": normalised,
            "accuracy": normalised / n,
            "interval": list(wilson_interval(normalised, n)),
        },
        "shuffled": shuffled,
        "position_bias": bias,
    }
    return row, [record["correct"] for record in published]


_ROWS: dict[str, Callable[[Task, AnswerFile], tuple[dict[str, Any], list[bool]]]] = {
    "flowertune": _flowertune_row,
    "likelihood": _likelihood_row,
}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as JSON has them: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


# --- FlowerTune's files ---------------------------------------------------------------------------


def generations(task: Task, file: AnswerFile) -> list[flowertune.Generation]:
    """Return the recorded outputs with their prompts and gold answers, in the source's order."""
    outputs: dict[int, Record] = {record["row"]: record for record in file.ordered()}
    return [
        flowertune.Generation(
            flowertune.build_prompt(task.benchmark, item),
            flowertune.gold_text(item),
            outputs[item.row]["output"],
        )
        for item in task.items
    ]


def write_flowertune_files(plan: Plan, answers: Answers) -> None:
    """Write what FlowerTune's evaluator leaves behind, for each model and benchmark."""
    if "flowertune" not in plan.protocols:
        return
    for subject in plan.subjects:
        for task in plan.tasks:
            records = generations(task, answers[subject.name, task.benchmark.name, "flowertune"])
            names = flowertune.result_names(task.benchmark.name, subject.name)
            score = flowertune.rescore(records, task.benchmark.labels)
            with writing(plan.out):
                flowertune.write_generations(plan.out / names[0], records)
                flowertune.write_accuracy(plan.out / names[1], score)


# --- Verification ---------------------------------------------------------------------------------


def faults_in(content: Any) -> list[str]:
    """Return what cannot be in an `evaluation.json`, parts of benchmarks included."""
    found = []
    for evaluation in evaluations_in(content):
        told = implausible(_checkable(evaluation)) or _group_faults(evaluation)
        protocol = evaluation.get("protocol") if isinstance(evaluation, dict) else None
        several = evaluation is not content
        found += [f"protocol {protocol}: {fault}" if several else fault for fault in told]
    return found


def _checkable(evaluation: Any) -> Any:
    """Return an evaluation whose prompt hashes can be recomputed without its tokenizer.

    Where a run's own prompt is the base's chat template, its hash cannot, and is taken as right.
    """
    rows = evaluation.get("rows") if isinstance(evaluation, dict) else None
    if not isinstance(rows, list) or evaluation.get("prompt_template") in (None, "alpaca"):
        return evaluation
    known = benchmarks()
    own = {name: b for name, b in known.items() if likelihood.asks_in_own_prompt(b)}
    is_likelihood = evaluation.get("protocol") == "likelihood"
    return {
        **evaluation,
        "rows": [
            {**row, "prompt_hash": likelihood.prompt_hash(own[row["benchmark"]])}
            if is_likelihood and isinstance(row, dict) and row.get("benchmark") in own
            else row
            for row in rows
        ],
    }


def _group_faults(evaluation: Mapping[str, Any]) -> list[str]:
    """Say which parts of a benchmark do not add up; rows themselves are known to be in order."""
    faults = []
    for number, row in enumerate(evaluation["rows"], 1):
        groups = row.get("groups") or []
        try:
            sums = {key: sum(group[key] for group in groups) for key in ("n", "correct")}
            intervals = [
                (g["interval"], list(wilson_interval(g["correct"], g["n"]))) for g in groups
            ]
            wrong = any(abs(a - b) > 1e-3 for pair in intervals for a, b in zip(*pair, strict=True))
        except (TypeError, KeyError, ValueError) as error:
            faults.append(f"row {number}: its groups cannot be read ({error})")
            continue
        if groups and (sums["n"], sums["correct"]) != (row["n"], row["correct"]):
            faults.append(
                f"row {number} ({row['model']}, {row['benchmark']}): its groups add up to "
                f"{sums['correct']} of {sums['n']}, the row says {row['correct']} of {row['n']}"
            )
        if wrong:
            faults.append(f"row {number}: an interval of its groups is not Wilson's")
    return faults
