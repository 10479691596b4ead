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
from grandrounds.wire import guarantee, messages, subgroups
from grandrounds.wire.masks.attempt import CONFIRM, KEYS, KIND_OF, MASKED_KIND, SHARES, UNMASK
from grandrounds.wire.messages import ARRAYS, CONFIG, FORMULARY_METRICS, MAGNITUDES, METRICS
from grandrounds.wire.names import NAME, SOURCE
from grandrounds.wire.personal import FEDERATED_LOSS, FEDERATED_NLL, PERSONAL, WEIGHT
from grandrounds.wire.subgroups import SUBGROUPS
from grandrounds.wire.told import BASE, DATA_TAG, HELD_OUT_LOSS, POLICY, rounded_count, rounded_loss

QUERY, TRAIN, EVALUATE, EXAM = "query", "train", "evaluate", "evaluate.formulary"

OF_LOSSES = {HELD_OUT_LOSS: "nll-sum", FEDERATED_LOSS: FEDERATED_NLL}
"""Loss per answer token that is told → the summed loss that it is made of."""

EXACT = "exact"
"""Value of `tell.figures` with which a site tells all figures exactly."""

AS_IT_IS, ROUNDED, ONLY_EXACT, TELEMETRY = "as it is", "rounded", "not told", "telemetry"

OF_PRIVATE = "of private visits"

WITH_HASH = "with the policy's hash"

DECLARED, NOISED, NEVER = "declared", "noised", "never"
"""How a field of a private visit is told: as the declared number of units, noised if the policy
lets it, or not at all. Only the tensors and a noised loss may depend on the site's data, through
one mechanism."""


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
    """`AS_IT_IS`, `ROUNDED`, `ONLY_EXACT` (only with `tell.figures = "exact"`), `TELEMETRY` (only
    with `tell.telemetry = true`), `WITH_HASH` (only with `tell.policy-hash = true`), or
    `OF_PRIVATE`, where other visits have no such field."""
    meaning: str
    private: str = NEVER
    """How it is told of a private visit: `AS_IT_IS`, `DECLARED`, `NOISED`, `TELEMETRY`,
    `WITH_HASH`, `NEVER`."""


def _fields(
    kind: str, record: str, told: str, meanings: Mapping[str, str], private: str = NEVER
) -> tuple[Field, ...]:
    return tuple(
        Field(name, kind, record, told, meaning, private) for name, meaning in meanings.items()
    )


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
        AS_IT_IS,
    ),
    Field(
        DATA_TAG,
        QUERY,
        CONFIG,
        AS_IT_IS,
        "a keyed hash: the same as long as its data are, within a run",
    ),
    *_fields(
        QUERY,
        CONFIG,
        OF_PRIVATE,
        {
            guarantee.UNIT: "unit of the guarantee: `record` or `patient`",
            guarantee.NOISE_MULTIPLIER: "noise in units of the clipping norm",
            guarantee.CLIPPING_NORM: "norm to which the gradient of a unit is clipped",
            guarantee.SAMPLING_RATE: "probability with which a step draws a unit",
            guarantee.DELTA: "probability with which the guarantee may fail",
            guarantee.DECLARED_UNITS: "number of units that the site declares",
            guarantee.VISIT_STEPS: "steps of a visit",
            guarantee.MOST_VISITS: "visits of the run that its budget allows",
            guarantee.LOSS_DEVIATION: "noise on a visit's told loss, if one is told",
            guarantee.EPSILON: "ε of the run's visits so far",
            guarantee.RESERVED_EPSILON: "ε of all visits that it may make",
            guarantee.ACCOUNTANT: "library that computed ε, and its version",
        },
        AS_IT_IS,
    ),
    Field("train-examples", QUERY, CONFIG, ROUNDED, "training examples", DECLARED),
    Field(
        "held-out-examples",
        QUERY,
        CONFIG,
        ROUNDED,
        "held-out examples, if their loss may be told",
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
    Field("device", QUERY, CONFIG, TELEMETRY, "name of its GPU, or CPU", TELEMETRY),
    Field(
        POLICY,
        QUERY,
        CONFIG,
        WITH_HASH,
        "SHA-256 of `[policy]`, `[tell]`, `[privacy]` and `[secure]` of its site.toml",
        WITH_HASH,
    ),
    Field(
        "tensors",
        TRAIN,
        ARRAYS,
        AS_IT_IS,
        "the change of the adapter, as the codec encodes it",
        AS_IT_IS,
    ),
    Field(
        "num-examples",
        TRAIN,
        METRICS,
        ROUNDED,
        "training examples: the update's weight",
        DECLARED,
    ),
    Field("train-loss", TRAIN, METRICS, ROUNDED, "mean loss of the visit", NOISED),
    *_fields(
        TRAIN,
        METRICS,
        OF_PRIVATE,
        {
            guarantee.EPSILON: "ε of the run's visits so far, this one included",
            guarantee.VISITS_LEFT: "visits of the run that its budget still allows",
        },
        AS_IT_IS,
    ),
    Field("steps", TRAIN, METRICS, ONLY_EXACT, "optimizer steps", AS_IT_IS),
    *_fields(
        TRAIN,
        METRICS,
        ONLY_EXACT,
        {
            "examples": "examples of the visit",
            "tokens": "their answer tokens",
            "padding-tokens": "padding of their batches",
            "cursor": "examples given to the site so far",
            "coverage": "share of its examples seen",
            "proximal-penalty": "FedProx's penalty",
            messages.UPDATE_NORM: "norm of the change; the server computes it from the tensors",
        },
    ),
    Field("seconds", TRAIN, METRICS, TELEMETRY, "seconds of the visit"),
    *_fields(TRAIN, METRICS, TELEMETRY, _PROCESS, TELEMETRY),
    Field(
        "tensors",
        MASKED_KIND,
        ARRAYS,
        AS_IT_IS,
        "the change of the adapter, its weight and the count of values cut, under masks",
        AS_IT_IS,
    ),
    Field("train-loss", MASKED_KIND, METRICS, OF_PRIVATE, "mean loss of the visit", NOISED),
    *_fields(
        MASKED_KIND,
        METRICS,
        OF_PRIVATE,
        {
            guarantee.EPSILON: "ε of the run's visits so far, this one included",
            guarantee.VISITS_LEFT: "visits of the run that its budget still allows",
        },
        AS_IT_IS,
    ),
    *_fields(MASKED_KIND, METRICS, TELEMETRY, _PROCESS, TELEMETRY),
    *(
        Field("tensors", KIND_OF[exchange], ARRAYS, AS_IT_IS, meaning, AS_IT_IS)
        for exchange, meaning in (
            (KEYS, "two public keys of one attempt at a masked sum, signed by the agent key"),
            (SHARES, "for each other site, sealed shares of what its masks are made of"),
            (CONFIRM, "its signature over the sites in the sum, and its keys of the next round"),
            (UNMASK, "of each site one share, to remove the masks; its shares of the next round"),
        )
    ),
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
    *_fields(EVALUATE, METRICS, TELEMETRY, _PROCESS, TELEMETRY),
    Field(
        subgroups.NAMES,
        SUBGROUPS,
        CONFIG,
        AS_IT_IS,
        "values of columns that the run and `subgroup-columns` name, with enough held-out examples",
    ),
    *_fields(
        SUBGROUPS,
        METRICS,
        ROUNDED,
        {
            subgroups.LOSSES: "mean loss per answer token of each of these subgroups",
            subgroups.EXAMPLES: "held-out examples of each",
        },
    ),
    *_fields(
        SUBGROUPS,
        METRICS,
        ONLY_EXACT,
        {
            subgroups.NLL_SUMS: "summed loss of each",
            subgroups.TOKENS: "answer tokens of each",
        },
    ),
    *_fields(SUBGROUPS, METRICS, TELEMETRY, _PROCESS, TELEMETRY),
    *_fields(
        PERSONAL,
        METRICS,
        ROUNDED,
        {
            HELD_OUT_LOSS: "mean loss of its personal adapter on the held-out examples reported",
            FEDERATED_LOSS: "the same of the federated adapter that it received",
            "num-examples": "held-out examples",
        },
    ),
    *_fields(
        PERSONAL,
        METRICS,
        ONLY_EXACT,
        {
            "nll-sum": "summed loss of its personal adapter",
            FEDERATED_NLL: "summed loss of the federated adapter",
            "tokens": "answer tokens of these examples",
            WEIGHT: "weight of its own training that it chose",
        },
    ),
    Field("steps", PERSONAL, METRICS, ONLY_EXACT, "optimizer steps of its own training", AS_IT_IS),
    *_fields(PERSONAL, METRICS, TELEMETRY, _PROCESS, TELEMETRY),
    *(
        Field(
            name,
            EXAM,
            METRICS,
            AS_IT_IS,
            "score in the built-in exam, on no data of the site",
            AS_IT_IS,
        )
        for name in FORMULARY_METRICS
    ),
    *_fields(EXAM, METRICS, TELEMETRY, _PROCESS, TELEMETRY),
    Field(
        "tensors",
        MAGNITUDES,
        ARRAYS,
        AS_IT_IS,
        "norms of the rows of its base's weights, where DoRA's magnitudes start",
    ),
    *_fields(MAGNITUDES, METRICS, TELEMETRY, _PROCESS),
)

NO_ANSWER = "This site has no answer to this message; its own audit log says why."
"""What a private run learns of every refusal and failure once the site's data were read: too few
examples, numbers that are not finite, too little memory."""

FAILURE = {
    "error": "reason of a refusal or failure: policy values, hashes, never data",
    "error-type": "kind of the failure",
}
"""What a reply says instead of all this if the visit was refused or failed."""

_WITH_TENSORS = {field.kind for field in FIELDS if field.record == ARRAYS}

_BY_PLACE = {(field.kind, field.record, field.name): field for field in FIELDS}

_OF_HELD_OUT = {
    QUERY: {"held-out-examples"},
    EVALUATE: {HELD_OUT_LOSS, "num-examples", "nll-sum", "tokens"},
    SUBGROUPS: {subgroups.NAMES, *subgroups.FIGURES},
    PERSONAL: {*OF_LOSSES, *OF_LOSSES.values(), "num-examples", "tokens", WEIGHT},
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


@dataclass(frozen=True)
class Told:
    """By which rules a reply leaves."""

    site: SiteFile
    """The site's policy."""
    report: Mapping[str, int]
    """Counts of the site's rows and examples, as in `Site.report`."""
    is_private: bool = False
    """Whether the run's visits are private: then only the tensors may depend on data, and losses
    that the mechanism tells."""
    tells_loss: bool = False
    """Whether the mechanism of a private run tells losses."""


def disclosed(kind: str, content: RecordDict, rules: Told) -> Disclosed:
    """Return what leaves of the content of a visit's reply.

    Parameters
    ----------
    kind : str
        The message type.
    """
    arrays = content.array_records.get(ARRAYS) if kind in _WITH_TENSORS else None
    facts = dict(content.config_records.get(CONFIG) or {})
    metrics = dict(content.metric_records.get(METRICS) or {})
    if kind in (EVALUATE, PERSONAL) and metrics.get("tokens"):
        tokens = float(metrics["tokens"])  # type: ignore[arg-type]
        summed = {loss: nll for loss, nll in OF_LOSSES.items() if nll in metrics}
        metrics |= {loss: float(metrics[nll]) / tokens for loss, nll in summed.items()}  # type: ignore[arg-type]
    told = {
        record: {
            name: _as_told(_BY_PLACE[kind, record, name], value, rules)
            for name, value in values.items()
            if _leaves(_BY_PLACE.get((kind, record, name)), rules, metrics)
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


def _leaves(field: Field | None, rules: Told, metrics: Mapping[str, Any]) -> bool:
    """Whether a field leaves under the site's policy."""
    if field is None:
        return False
    site = rules.site
    if rules.is_private:
        opted = {
            TELEMETRY: site.tell.telemetry,
            WITH_HASH: site.tell.policy_hash,
            NOISED: rules.tells_loss,
        }
        return field.private != NEVER and opted.get(field.private, True)
    if field.name in _OF_HELD_OUT.get(field.kind, ()):
        held_out = rules.report["held-out-examples"]
        if field.kind == PERSONAL:
            held_out = _fewest_told(held_out, metrics)
        if not tells_loss(site, held_out):
            return False
    if field.told == TELEMETRY:
        return site.tell.telemetry
    if field.told == WITH_HASH:
        return site.tell.policy_hash
    if field.told == ONLY_EXACT:
        return site.tell.figures == EXACT
    return field.told != OF_PRIVATE


def _fewest_told(held_out: int, metrics: Mapping[str, Any]) -> int:
    """Return the number of the fewest held-out examples whose loss a personal adapter's tells.

    The loss is that of the reported ones; with the loss of all, it tells that of the others.
    """
    reported = int(metrics.get("num-examples", 0))
    return min(reported, held_out - reported or reported)


def _as_told(field: Field, value: Any, rules: Told) -> Any:
    """Return a field's value as it leaves.

    Counts come from the site's rows and its `held-out-fraction` alone: what the run's tokenisation
    leaves of them would tell the lengths of rows, one sequence length after the other.
    """
    site = rules.site
    if rules.is_private:
        return site.privacy.declared_units if field.private == DECLARED else value
    if field.told != ROUNDED or site.tell.figures == EXACT:
        return value
    if isinstance(value, list):
        of = rounded_loss if field.name == subgroups.LOSSES else rounded_count
        return [of(one) for one in value]
    if isinstance(value, float):
        return rounded_loss(value)
    training, held_out = _counts(site, rules.report)
    of_held_out = field.name == "held-out-examples" or field.kind in (EVALUATE, PERSONAL)
    return held_out if of_held_out else training


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
    WITH_HASH: "only with `policy-hash = true`",
    OF_PRIVATE: "never",
}

_HOW_PRIVATELY = {
    AS_IT_IS: "as it is",
    DECLARED: "`declared-units`",
    TELEMETRY: "only with `telemetry = true`",
    WITH_HASH: "only with `policy-hash = true`",
    NOISED: "noised, only with `report-train-loss = true`",
    NEVER: "never",
}


def table() -> list[tuple[str, str, str, str, str]]:
    """Return (message, field, how it is told, and of private visits, meaning) for the docs."""
    exam = [field for field in FIELDS if field.kind == EXAM and field.told == AS_IT_IS]
    rows = [
        (
            field.kind,
            f"`{field.name}`",
            _HOW[field.told],
            _HOW_PRIVATELY[field.private],
            field.meaning,
        )
        for field in FIELDS
        if field not in exam
    ]
    scores = f"`{exam[0].name}` and {len(exam) - 1} more"
    as_it_is = _HOW[AS_IT_IS]
    rows.append((EXAM, scores, as_it_is, as_it_is, exam[0].meaning))
    one_text = "one text once data were read"
    rows += [("any", f"`{name}`", as_it_is, one_text, why) for name, why in FAILURE.items()]
    error = "kind of an unexpected error"
    return [*rows, ("any", "Flower's `Error`", as_it_is, "never once data were read", error)]
