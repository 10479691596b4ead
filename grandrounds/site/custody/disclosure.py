"""What leaves a site in its own custody: every field of every reply, and how exactly it is told.

`FIELDS` is an allow-list: a field that is not in it does not leave, whatever the code of a visit
puts into its reply. The table of docs/deployment.md is made from it.

Rounding keeps counts from being compared row by row, and makes them independent of what a run asks:
the counts are those of the rows, before any tokenisation. It is no guarantee. An adapter made for
it can still move a rounded loss, and the update of the adapter itself says far more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import RecordDict

from grandrounds.site.custody.site_file import SiteFile
from grandrounds.wire import messages
from grandrounds.wire.messages import ARRAYS, CONFIG, FORMULARY_METRICS, METRICS
from grandrounds.wire.names import NAME, SOURCE
from grandrounds.wire.told import BASE, DATA_TAG, HELD_OUT_LOSS, rounded_count, rounded_loss

QUERY, TRAIN, EVALUATE, EXAM = "query", "train", "evaluate", "evaluate.formulary"

EXACT = "exact"
"""Value of `tell.figures` with which a site tells all figures exactly."""

AS_IT_IS, ROUNDED, ONLY_EXACT, TELEMETRY = "as it is", "rounded", "not told", "telemetry"


@dataclass(frozen=True)
class Field:
    """A field of a reply."""

    name: str
    """Its key, or in words what stands for several."""
    kind: str
    """Message type that it answers."""
    record: str
    """Record of the reply."""
    told: str
    """`AS_IT_IS`, `ROUNDED`, `ONLY_EXACT` (only with `tell.figures = "exact"`) or `TELEMETRY` (only
    with `tell.telemetry = true`)."""
    meaning: str


def _fields(kind: str, record: str, told: str, meanings: Mapping[str, str]) -> tuple[Field, ...]:
    return tuple(Field(name, kind, record, told, meaning) for name, meaning in meanings.items())


_PROCESS = {
    "base-loads": "how often its process has loaded a base",
    "process-id": "a random number of its process",
}

FIELDS = (
    *_fields(
        QUERY,
        CONFIG,
        AS_IT_IS,
        {
            "partition-id": "the site's number",
            NAME: "the site's name",
            SOURCE: "name of the built-in data, if the site's data are such",
            BASE: "SHA-256 of its copy of the base",
            DATA_TAG: "a keyed hash: the same as long as its data are, within a run",
            "base": "fingerprint of the base's configuration and tokenizer",
            "prompt": "hash of the prompt template under the tokenizer",
            "version": "version of Grand Rounds",
            "torch": "version of PyTorch",
            "python": "version of Python",
            "precision": "number format of the base",
            "means": "optimisations in use",
            messages.THREADS: "threads of the CPU in use",
            messages.CPU_MATMUL: "library of matrix products",
        },
    ),
    *_fields(
        QUERY,
        CONFIG,
        ROUNDED,
        {
            "train-examples": "training examples",
            "held-out-examples": "held-out examples, if their loss may be told",
        },
    ),
    *_fields(
        QUERY,
        CONFIG,
        ONLY_EXACT,
        {
            "rows": "rows",
            "empty-rows": "rows without question or answer",
            "duplicate-rows": "duplicate rows",
            "truncated": "answers truncated at the sequence length",
            "unlearnable": "questions that leave no room for an answer",
        },
    ),
    Field("device", QUERY, CONFIG, TELEMETRY, "name of its GPU, or CPU"),
    Field("tensors", TRAIN, ARRAYS, AS_IT_IS, "the change of the adapter, as the codec encodes it"),
    *_fields(
        TRAIN,
        METRICS,
        ROUNDED,
        {
            "num-examples": "training examples: the update's weight",
            "train-loss": "mean loss of the visit",
        },
    ),
    *_fields(
        TRAIN,
        METRICS,
        ONLY_EXACT,
        {
            "steps": "optimizer steps",
            "examples": "examples of the visit",
            "tokens": "their answer tokens",
            "padding-tokens": "padding of their batches",
            "cursor": "examples given to the site so far",
            "coverage": "share of its examples seen",
            "proximal-penalty": "FedProx's penalty",
            messages.UPDATE_NORM: "norm of the change; the server computes it from the tensors",
        },
    ),
    *_fields(TRAIN, METRICS, TELEMETRY, {"seconds": "seconds of the visit", **_PROCESS}),
    *_fields(
        EVALUATE,
        METRICS,
        ROUNDED,
        {
            HELD_OUT_LOSS: "mean loss per answer token of the held-out examples",
            "num-examples": "held-out examples: the loss's weight",
        },
    ),
    *_fields(
        EVALUATE,
        METRICS,
        ONLY_EXACT,
        {
            "nll-sum": "summed loss of the held-out examples",
            "tokens": "their answer tokens",
        },
    ),
    *_fields(EVALUATE, METRICS, TELEMETRY, _PROCESS),
    *(
        Field(name, EXAM, METRICS, AS_IT_IS, "score in the built-in exam, on no data of the site")
        for name in FORMULARY_METRICS
    ),
    *_fields(EXAM, METRICS, TELEMETRY, _PROCESS),
)

FAILURE = {
    "error": "reason of a refusal or failure: policy values, hashes, never data",
    "error-type": "kind of the failure",
}
"""What a reply says instead of all this if the visit was refused or failed."""

_BY_PLACE = {(field.kind, field.record, field.name): field for field in FIELDS}

_OF_HELD_OUT = {
    QUERY: {"held-out-examples"},
    EVALUATE: {HELD_OUT_LOSS, "num-examples", "nll-sum", "tokens"},
}
"""Fields that leave only if the held-out loss may be told."""


@dataclass(frozen=True)
class Disclosed:
    """A reply as it leaves."""

    content: RecordDict
    kept: tuple[str, ...]
    """Names of the fields that the visit reported and that do not leave."""


def tells_loss(site: SiteFile, held_out: int) -> bool:
    """Whether a site with this number of held-out examples tells their loss."""
    return site.policy.report_held_out_loss and held_out >= site.tell.min_held_out_examples


def disclosed(
    site: SiteFile, kind: str, content: RecordDict, report: Mapping[str, int]
) -> Disclosed:
    """Return what leaves of the content of a visit's reply.

    Parameters
    ----------
    kind : str
        The message type.
    report
        Counts of the site's rows and examples, as in `Site.report`.
    """
    arrays = content.array_records.get(ARRAYS) if kind == TRAIN else None
    facts = dict(content.config_records.get(CONFIG) or {})
    metrics = dict(content.metric_records.get(METRICS) or {})
    if kind == EVALUATE and metrics.get("tokens"):
        metrics[HELD_OUT_LOSS] = float(metrics["nll-sum"]) / float(metrics["tokens"])  # type: ignore[arg-type]
    told = {
        record: {
            name: _as_told(site, _BY_PLACE[kind, record, name], value, report)
            for name, value in values.items()
            if _leaves(site, kind, record, name, report)
        }
        for record, values in ((CONFIG, facts), (METRICS, metrics))
    }
    reported = [*content.array_records, *facts, *metrics]
    leaving = [*told[CONFIG], *told[METRICS], *([ARRAYS] if arrays is not None else [])]
    return Disclosed(
        messages.content(
            arrays=arrays,
            config=told[CONFIG] if CONFIG in content.config_records else None,
            metrics=told[METRICS] if METRICS in content.metric_records else None,
        ),
        tuple(sorted(set(reported) - set(leaving))),
    )


def _leaves(site: SiteFile, kind: str, record: str, name: str, report: Mapping[str, int]) -> bool:
    """Whether a field leaves under the site's policy."""
    field = _BY_PLACE.get((kind, record, name))
    if field is None:
        return False
    if name in _OF_HELD_OUT.get(kind, ()) and not tells_loss(site, report["held-out-examples"]):
        return False
    if field.told == TELEMETRY:
        return site.tell.telemetry
    return field.told != ONLY_EXACT or site.tell.figures == EXACT


def _as_told(site: SiteFile, field: Field, value: Any, report: Mapping[str, int]) -> Any:
    """Return a field's value as it leaves.

    Counts come from the site's rows and its `held-out-fraction` alone: what the run's tokenisation
    leaves of them would tell the lengths of rows, one sequence length after the other.
    """
    if field.told != ROUNDED or site.tell.figures == EXACT:
        return value
    if isinstance(value, float):
        return rounded_loss(value)
    training, held_out = _counts(site, report)
    return held_out if field.name == "held-out-examples" or field.kind == EVALUATE else training


def told_examples(site: SiteFile, report: Mapping[str, int]) -> int:
    """Return the number of training examples that a site tells, and that its epochs count."""
    return report["train-examples"] if site.tell.figures == EXACT else _counts(site, report)[0]


def _counts(site: SiteFile, report: Mapping[str, int]) -> tuple[int, int]:
    """Return the rounded numbers of training and held-out examples."""
    usable = report["rows"] - report["empty-rows"] - report["duplicate-rows"]
    held_out = site.data.held_out_fraction * usable
    return rounded_count(max(1, round(usable - held_out))), rounded_count(max(1, round(held_out)))


# --- In words -------------------------------------------------------------------------------------

_HOW = {
    AS_IT_IS: "as it is",
    ROUNDED: "rounded",
    ONLY_EXACT: 'only with `figures = "exact"`',
    TELEMETRY: "only with `telemetry = true`",
}


def table() -> list[tuple[str, str, str, str]]:
    """Return (message, field, how it is told, meaning) of all that leaves, for the docs."""
    exam = [field for field in FIELDS if field.kind == EXAM and field.told == AS_IT_IS]
    rows = [
        (field.kind, f"`{field.name}`", _HOW[field.told], field.meaning)
        for field in FIELDS
        if field not in exam
    ]
    scores = f"`{exam[0].name}` and {len(exam) - 1} more"
    rows.append((EXAM, scores, _HOW[AS_IT_IS], exam[0].meaning))
    rows += [("any", f"`{name}`", _HOW[AS_IT_IS], meaning) for name, meaning in FAILURE.items()]
    return [*rows, ("any", "Flower's `Error`", _HOW[AS_IT_IS], "kind of an unexpected error")]
