"""Defaults that do not apply beside what was set; each is reset, and a run says so.

A value that somebody wrote is never changed: where it contradicts another, that is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from grandrounds.config.automatic import EMBEDDED_DATA, FORMULARY_SITES
from grandrounds.config.strategies import PRESETS
from grandrounds.config.values import Scalar

_FORMULARY = "formulary"
_ARGUMENTS = "train.training-arguments."
_HIGHEST, _LOWEST = "train.learning-rate-max", "train.learning-rate-min"


@dataclass(frozen=True)
class Reset:
    """A default that is replaced because it does not apply."""

    key: str
    default: Scalar
    value: Scalar
    """What is used instead."""
    reason: str
    """Why, as the end of a sentence."""

    def __str__(self) -> str:
        return (
            f"{self.key} = {self.value!r}: its default {self.default!r} does not apply "
            f"{self.reason}."
        )


def resets(values: Mapping[str, Scalar], defaults: Mapping[str, Scalar]) -> Iterator[Reset]:
    """Yield the defaults that do not apply beside the values that were set.

    Parameters
    ----------
    values
        The keys that were set, aliases resolved; of any type, since nothing is checked yet.
    defaults
        The packaged defaults.
    """

    def reset(key: str, value: Scalar, reason: str) -> Iterator[Reset]:
        if key not in values and value != defaults[key]:
            yield Reset(key, defaults[key], value, reason)

    if values.get("strategy.name") == "fedavg":
        yield from reset("strategy.proximal-mu", 0.0, "to fedavg, which has no proximal term")
    if values.get("data.held-out-fraction") in (0, 0.0):
        yield from reset("strategy.fraction-evaluate", 0.0, "without held-out examples")
    is_in_epochs = values.get(f"{_ARGUMENTS}max-steps") == -1
    if is_in_epochs:
        why = "to visits of whole epochs, whose updates grow with a site's number of examples"
        yield from reset("defence.largest-norm", 0.0, why)
    preset = values.get("defence.preset")
    for key, value in PRESETS.get(preset, {}).items() if isinstance(preset, str) else ():
        yield from reset(key, value, f"under defence.preset = {preset!r}")
    if values.get("personalisation.name") == "interpolate":
        why = "to interpolation, whose own adapter does not start from the federated one"
        yield from reset("personalisation.proximal-mu", 0.0, why)
    if values.get("privacy.unit-guarantee") == "example":
        yield from _private(values, reset)
    if values.get("secure-aggregation", "none") != "none" and not is_in_epochs:
        why = "to masked sums: the server sees no single update"
        yield from reset("defence.largest-norm", 0.0, why)
    highest, default = (_number(flat.get(_HIGHEST)) for flat in (values, defaults))
    lowest = _number(defaults[_LOWEST])
    if 0 < highest < lowest:
        why = f"below {_HIGHEST} = {highest:g}; the same ratio is kept"
        yield from reset(_LOWEST, float(f"{highest * lowest / default:.3g}"), why)
    if (warmup := _number(values.get(f"{_ARGUMENTS}warmup-steps"))) > 0:
        why = f"with {_ARGUMENTS}warmup-steps = {warmup:g}"
        yield from reset(f"{_ARGUMENTS}lr-scheduler-type", "constant_with_warmup", why)
    again = values.get(f"{_ARGUMENTS}gradient-checkpointing")
    if isinstance(again, bool) or again == "auto":
        why = f"beside {_ARGUMENTS}gradient-checkpointing = {again}"
        yield from reset("model.gradient-checkpointing", again, why)
    column = values.get("data.partition-by", "")
    if column and values.get("static.dataset.name", _FORMULARY) != _FORMULARY:
        how = "dirichlet" if "data.dirichlet-alpha" in values else "natural"
        yield from reset("data.partitioner", how, f"with data.partition-by = {column!r}")


def _private(
    values: Mapping[str, Scalar], reset: Callable[[str, Scalar, str], Iterator[Reset]]
) -> Iterator[Reset]:
    why = "to private visits, where noise would inflate its step; ffa trains B alone"
    yield from reset("strategy.name", "ffa", why)
    why = "to private visits, which clip the gradient of each unit"
    yield from reset(f"{_ARGUMENTS}max-grad-norm", 0.0, why)
    sites = values.get("data.num-partitions", FORMULARY_SITES)
    source = values.get("static.dataset.name", _FORMULARY)
    if source in EMBEDDED_DATA and isinstance(sites, int) and sites > 0:
        why = f"to the data {source}, whose number of records is public"
        yield from reset("privacy.declared-units", EMBEDDED_DATA[str(source)] // sites, why)


def _number(value: Scalar | None) -> float:
    """Return a value as a number; 0 for anything else, which is told later."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return float(value) if abs(value) < 2**1023 else 0.0
