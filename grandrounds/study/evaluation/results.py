"""Turns recorded answers into counts, intervals and comparisons: the content of `evaluation.json`.

The layout is that of `grandrounds.study.evaluation.verification`, plus these keys:

    models       model → adapter, adapter_sha256, role
    base_fingerprint, quantization, limit, permutations, prompt_template
    sample           how the items under a limit were chosen; null without a limit
    answer_tokens    greatest length of a generated answer; protocol `greedy` only
    rows, each:
        title            name of the benchmark in tables
        truncated        items whose prompt was left-truncated
        expected         number of items as published, or of the user's source
        largest_answer   the commonest correct answer: its label, and n items that have it
        own              how an own exam was asked: `texts` or `letters`; absent for the others
        groups           subsets of the benchmark: group, n, correct, accuracy, interval, vs_base
        vs_base          only_base, only_model, difference, interval, p_value; null for the base
      and with protocol `flowertune`:
        spread, format_failures, first_letter_answers, commonest_failures
      or with protocol `likelihood`:
        normalised       correct, accuracy, interval by log-likelihood per character
        shuffled         n, correct, mean, minimum, maximum, always_correct, always_correct_share;
                         null if the options have no order
        position_bias    counts, shares, p_value over the shuffled orders; null likewise, or if
                         items differ in their number of options
      or with protocol `greedy`, where `correct` counts exact matches:
        f1               mean, Student's interval, vs_base (difference, interval, p_value of the
                         paired t-test; null for the base); interval and p_value are null if one
                         item, or equal differences, give none
        loss             nats_per_token of the reference answers, and their tokens
        cut              answers that reached the limit
        differing_numbers  exact matches that are written with other numbers than the reference
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import grandrounds
from grandrounds.statistics import (
    average_accuracy,
    compare_paired,
    estimate,
    paired_test,
    position_bias,
    shuffled_accuracy,
    wilson_interval,
)
from grandrounds.study.evaluation import flowertune
from grandrounds.study.evaluation.answers import AnswerFile, writing
from grandrounds.study.evaluation.benchmarks import Item, Task
from grandrounds.study.evaluation.greedy import GREEDY, differs_in_numbers
from grandrounds.study.evaluation.sample import METHOD
from grandrounds.study.evaluation.tasks import ALL, EvaluationTasks

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "numpy", "scipy")
"""Libraries whose versions are recorded, besides our own."""

Answers = Mapping[tuple[str, str, str], AnswerFile]
"""(model, benchmark, protocol) → answers."""


def evaluation_of(
    tasks: EvaluationTasks, settings: Mapping[str, Any], answers: Answers
) -> dict[str, Any]:
    """Return the content of `evaluation.json` from a complete set of answers."""
    each = [_of_protocol(tasks, settings, answers, p) for p in tasks.protocols]
    return each[0] if len(each) == 1 else {"protocol": ALL, "evaluations": each}


def _of_protocol(
    tasks: EvaluationTasks, settings: Mapping[str, Any], answers: Answers, protocol: str
) -> dict[str, Any]:
    target = tasks.target
    tuned = target.adapters
    rows = []
    for task in tasks.asked_by(protocol):
        base_right: list[bool] | None = None
        base_file: AnswerFile | None = None
        for subject in target.subjects:
            file = answers[subject.name, task.benchmark.name, protocol]
            row, right = _ROWS[protocol](task, file, base_file)
            row = {"model": subject.name, **_common(task, right, base_right), **row}
            row["prompt_hash"] = settings["prompt hash"][task.benchmark.name][protocol]
            row["truncated"] = sum(record["truncated"] for record in file.ordered())
            rows.append(row)
            base_right, base_file = base_right or right, base_file or file
    return {
        "protocol": protocol,
        "base": target.base,
        "base_fingerprint": settings["base fingerprint"],
        "adapter": str(tuned[0].adapter) if tuned else None,
        "adapter_sha256": tuned[0].sha256 if tuned else None,
        "models": {
            s.name: {"adapter": str(s.adapter), "adapter_sha256": s.sha256, "role": s.role}
            for s in tuned
        },
        "precision": settings["precision"],
        "quantization": target.quantization,
        "prompt_template": target.prompt_template,
        **({"template_settings": said} if (said := target.chat.as_dict()) else {}),
        "limit": tasks.questions.limit,
        "sample": METHOD if tasks.questions.limit else None,
        "permutations": tasks.method.permutations,
        **({"answer_tokens": tasks.method.answer_tokens} if protocol == GREEDY else {}),
        "versions": versions(),
        "rows": rows,
        "average": {
            subject.name: _average([row for row in rows if row["model"] == subject.name])
            for subject in target.subjects
        },
    }


def versions() -> dict[str, str]:
    """Return the versions of the installed libraries and our own."""
    found = {"grandrounds": grandrounds.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracy, interval = average_accuracy([(row["correct"], row["n"]) for row in rows])
    return {
        "accuracy": accuracy,
        "interval": list(interval),
        "benchmarks": [row["benchmark"] for row in rows],
    }


def largest_answer(items: Sequence[Item]) -> dict[str, Any]:
    """Return the commonest correct answer: its label, and of how many items it is the answer."""
    [(label, count)] = Counter(item.labels[item.gold_index] for item in items).most_common(1)
    return {"label": label, "n": count}


# --- One row --------------------------------------------------------------------------------------


def _common(task: Task, right: Sequence[bool], base_right: Sequence[bool] | None) -> dict[str, Any]:
    """Return the keys that rows of every protocol have."""
    benchmark = task.benchmark
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        **_counts(right, base_right),
        "expected": benchmark.expected_items,
        "limited": len(task.items) < benchmark.expected_items,
        "largest_answer": largest_answer(task.items),
        "source": task.source,
        **({"own": "texts" if benchmark.whole_options else "letters"} if benchmark.own else {}),
        "groups": _groups(task.items, right, base_right),
    }


def _counts(right: Sequence[bool], base_right: Sequence[bool] | None) -> dict[str, Any]:
    """Return counts, accuracy with its interval, and the comparison with the base."""
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
    """Return the counts of each subset of a benchmark; empty if it has none."""
    groups = []
    for name in dict.fromkeys(item.group for item in items if item.group):
        where = [i for i, item in enumerate(items) if item.group == name]
        base_part = None if base_right is None else [base_right[i] for i in where]
        groups.append({"group": name, **_counts([right[i] for i in where], base_part)})
    return groups


RowMaker = Callable[[Task, AnswerFile, AnswerFile | None], tuple[dict[str, Any], list[bool]]]
"""Returns a protocol's keys, and whether each item is correct, from a model's answers and those of
the base (None for the base itself)."""


def _flowertune_row(
    task: Task, file: AnswerFile, _: AnswerFile | None
) -> tuple[dict[str, Any], list[bool]]:
    """Return the keys of protocol `flowertune`, and whether each item is correct."""
    score = flowertune.rescore(generations(task, file), task.benchmark.labels)
    row = {
        "spread": score.spread,
        "format_failures": score.format_failures,
        "first_letter_answers": score.first_letter_answers,
        "commonest_failures": score.commonest_failures,
    }
    return row, list(score.right)


def _likelihood_row(
    task: Task, file: AnswerFile, _: AnswerFile | None
) -> tuple[dict[str, Any], list[bool]]:
    """Return the keys of protocol `likelihood`, and whether each item is correct."""
    published = file.ordered()
    n, normalised = len(published), sum(r["correct_normalised"] for r in published)
    orders = sorted({order for order, _ in file.records} - {0})
    shuffled, bias = None, None
    if orders:
        answers = [file.ordered(order) for order in orders]
        summary = shuffled_accuracy([[r["correct"] for r in records] for records in answers])
        choices = [record["choice"] for records in answers for record in records]
        shuffled = _plain(asdict(summary))
        sizes = {len(item.options) for item in task.items}
        if len(sizes) == 1:  # else the positions are not equally likely
            bias = _plain(asdict(position_bias(choices, sizes.pop())))
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


def _greedy_row(
    task: Task, file: AnswerFile, base: AnswerFile | None
) -> tuple[dict[str, Any], list[bool]]:
    """Return the keys of protocol `greedy`, and whether each answer matches exactly."""
    records = file.ordered()
    f1 = [record["f1"] for record in records]
    measured = estimate(f1)
    compared = None
    if base is not None:
        before = [record["f1"] for record in base.ordered()]
        paired = paired_test([now - then for now, then in zip(f1, before, strict=True)])
        compared = {
            "difference": paired["mean"],
            "interval": None if paired["p"] is None else paired["interval"],
            "p_value": paired["p"],
        }
    tokens = sum(record["reference_tokens"] for record in records)
    outputs = [record["output"] for record in records]
    row = {
        "f1": {
            "mean": measured["mean"],
            "interval": _within_shares(measured["interval"]) if len(set(f1)) > 1 else None,
            "vs_base": compared,
        },
        "loss": {"nats_per_token": sum(r["nll"] for r in records) / tokens, "tokens": tokens},
        "cut": sum(not record["stopped"] for record in records),
        "differing_numbers": sum(
            differs_in_numbers(item.options[0], output)
            for item, output in zip(task.items, outputs, strict=True)
        ),
    }
    return row, [record["exact"] for record in records]


def _within_shares(interval: Sequence[float] | None) -> list[float] | None:
    """Return an interval of a share, cut to what a share can be."""
    return None if interval is None else [max(0.0, interval[0]), min(1.0, interval[1])]


_ROWS: dict[str, RowMaker] = {
    "flowertune": _flowertune_row,
    "likelihood": _likelihood_row,
    GREEDY: _greedy_row,
}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with lists for tuples, as JSON reads them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


# --- FlowerTune's files ---------------------------------------------------------------------------


def generations(task: Task, file: AnswerFile) -> list[flowertune.Generation]:
    """Return the recorded outputs with their prompts and gold answers, in the source's order."""
    outputs = {record["row"]: record["output"] for record in file.ordered()}
    return [
        flowertune.Generation(
            flowertune.build_prompt(task.benchmark, item),
            flowertune.gold_text(item),
            outputs[item.row],
        )
        for item in task.items
    ]


def write_flowertune_files(tasks: EvaluationTasks, answers: Answers) -> None:
    """Write the result files of FlowerTune's evaluator, for each model and benchmark."""
    if "flowertune" not in tasks.method.protocols:
        return
    for subject in tasks.target.subjects:
        for task in tasks.questions.tasks:
            records = generations(task, answers[subject.name, task.benchmark.name, "flowertune"])
            names = flowertune.result_names(task.benchmark.name, subject.name)
            score = flowertune.rescore(records, task.benchmark.labels)
            with writing(tasks.folder):
                flowertune.write_generations(tasks.folder / names[0], records)
                flowertune.write_accuracy(tasks.folder / names[1], score)
