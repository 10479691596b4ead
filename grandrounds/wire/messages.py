"""The messages of a run: record keys, and adapters to and from Flower's ArrayRecord, checked.

server → site
    `query`               config {}                               → config: who the site is
    `query.magnitudes`    config {}                               → arrays: DoRA's start
    `train`               arrays: adapter, config: round, ...     → arrays: change, metrics
                          start: in a continued run, once
    `train.masked`        the same, masks: boxes                  → arrays: masked vector, metrics
    `train.keys`, `.shares`, `.confirm`, `.unmask`  arrays: one   → arrays: one (wire/masks/packed)
                          next: keys, shares of the next round    → next: the same
    `train.personal`      arrays: adapter, config: round, ...     → metrics: its held-out loss
    `evaluate`            arrays: adapter                         → metrics: held-out loss
    `evaluate.formulary`  arrays: adapter                         → metrics: correct answers
On an expected error a site replies with config {error, error-type}.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Collection, Mapping

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from numpy.typing import NDArray

from grandrounds import errors
from grandrounds.errors import GrandRoundsError, ReplyError
from grandrounds.wire.adapter import Adapter, Shapes
from grandrounds.wire.codecs.finite import all_finite
from grandrounds.wire.guarantee import EPSILON, GUARANTEE, VISITS_LEFT
from grandrounds.wire.ledger import NPY_HEADER_BYTES
from grandrounds.wire.names import NAME, SOURCE, one_line
from grandrounds.wire.personal import FEDERATED_LOSS, FEDERATED_NLL, WEIGHT
from grandrounds.wire.told import (
    BASE,
    BASE_COMMIT,
    COUNTS,
    DATA_COMMIT,
    DATA_TAG,
    HELD_OUT_LOSS,
    HIGHEST_LOSS,
    MARGIN_SUM,
    POLICY,
    PREFERRED,
    RANKED,
    TRUNCATED,
)

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""The names of the three records in a message."""

START = "start"
"""Name of a further record: the saved adapter from which the run goes on, for a site that has not
received it yet and gets a trained one."""

CLIENT_APP_RAISED = 2
"""Flower's error code for an exception in a ClientApp."""

MAGNITUDES = "query.magnitudes"
"""Kind of message that asks where DoRA's magnitudes start; two sites are asked, once."""

LARGEST_MAGNITUDE = 1e6
"""No row of a real base's weights has a larger norm."""

RUN = "run"
"""Config key of every message: the run's key, which a resume keeps."""

# How Flower quotes an exception, and the line of a traceback that names it (not always the last).
_OF_FLOWER = re.compile(r"^<class '(?:\w+\.)*(\w+)'>:<'")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Warning): ")

THREADS, CPU_MATMUL = "threads", "cpu-matmul"
"""Facts of an introduction that the bits of an adapter depend on. The server returns them with each
message, so that a site started anew computes as before."""

UPDATE_NORM = "update-norm"
"""Metric of a reply to `train`: the L2 norm of the change before encoding."""

TRAIN_METRICS: tuple[str, ...] = (
    "num-examples",
    "train-loss",
    "proximal-penalty",
    "examples",
    "tokens",
    "padding-tokens",
    "seconds",
    "cursor",
    "coverage",
    "base-loads",
    "process-id",
)
"""Metrics that a reply to `train` must have, unless the site is in its own custody."""

TRAIN_METRICS_IN_CUSTODY: tuple[str, ...] = ("num-examples",)
"""Metrics that a reply to `train` of such a site must have, and that of a private visit."""

EVALUATE_METRICS = ("nll-sum", "tokens")
"""Metrics that a reply to `evaluate` must have, unless the site is in its own custody: then it may
have none."""

PAIR_METRICS = (*EVALUATE_METRICS, MARGIN_SUM, PREFERRED, RANKED)
"""The same where training is on preferences."""

FORMULARY_METRICS = tuple(
    f"{kind}-{which}-{count}"
    for kind in ("public", "private")
    for which in ("base", "tuned")
    for count in ("correct", "n")
)
"""Metrics that a reply to `evaluate.formulary` must have."""

MANY = 2**53
"""Upper bound of all counts; integers up to here are exact in float64."""

WHOLE = (
    "examples",
    "tokens",
    "padding-tokens",
    "cursor",
    "base-loads",
    "process-id",
    VISITS_LEFT,
    PREFERRED,
    RANKED,
    *FORMULARY_METRICS,
)
"""Metrics that are integers from 0 to `MANY`."""

REAL = {
    "coverage": 1.0,
    "train-loss": 1e6,
    "nll-sum": 1e15,
    HELD_OUT_LOSS: HIGHEST_LOSS,
    "proximal-penalty": 1e30,
    "seconds": 1e9,
    EPSILON: 1e9,
    WEIGHT: 1.0,
    FEDERATED_NLL: 1e15,
    FEDERATED_LOSS: HIGHEST_LOSS,
}
"""Metrics that are numbers from 0 to this maximum."""

SIGNED = {MARGIN_SUM: 1e15}
"""Metrics that are numbers of at most this size, of either sign."""

PERSONAL_METRICS = ("steps",)
"""Metrics that a reply to `train.personal` must have, unless the site is in its own custody."""

INTRODUCTION_IN_CUSTODY: tuple[str, ...] = (
    *("partition-id", "train-examples", "version", "base", "prompt", "precision", "threads"),
)
"""What an introduction, the reply to `query`, of a site in its own custody must have."""

INTRODUCTION: tuple[str, ...] = tuple(
    name
    for name in dict.fromkeys((*INTRODUCTION_IN_CUSTODY, *COUNTS, "device"))
    if name != TRUNCATED
)
"""What every other introduction must have."""

FACTS = frozenset(
    (
        *(*INTRODUCTION, TRUNCATED, NAME, SOURCE, BASE, BASE_COMMIT, DATA_COMMIT, DATA_TAG),
        *(POLICY, "means", "torch", "python", CPU_MATMUL, *GUARANTEE),
    )
)
"""What is read of an introduction; the server drops everything else."""

TOLD = frozenset((*TRAIN_METRICS, *EVALUATE_METRICS, *WHOLE, *REAL, *SIGNED, "steps", UPDATE_NORM))
"""What is read of a reply's metrics; the server drops everything else."""

Metrics = dict[str, float | int]


def to_arrays(adapter: Adapter) -> ArrayRecord:
    """Return float32 tensors as an ArrayRecord: npy buffers under their names."""
    return ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in adapter.items()})


def from_arrays(record: ArrayRecord, shapes: Shapes) -> Adapter:
    """Return the tensors of an untrusted record.

    Names, lengths and headers are compared with the expected adapter before anything is allocated.
    The arrays are read-only views of the record's buffers.

    Raises
    ------
    ReplyError
        If a name, shape, type or length differs, or a value is not finite.
    """
    if record.keys() != shapes.keys():
        missing = sorted(shapes.keys() - record.keys())
        extra = sorted(record.keys() - shapes.keys())
        raise ReplyError(f"wrong tensors: missing {missing[:3]}, unexpected {extra[:3]}")
    adapter = {}
    for name, shape in shapes.items():
        array, header = record[name], _npy_header(tuple(shape))
        data = array.data
        expected_bytes = len(header) + 4 * int(np.prod(shape))
        if len(data) != expected_bytes or not data.startswith(header):
            raise ReplyError(
                f"{name}: expected float32 of shape {tuple(shape)} ({expected_bytes} bytes), "
                f"got {array.dtype} of shape {tuple(array.shape)} ({len(data)} bytes)"
            )
        values = np.frombuffer(data, dtype="<f4", offset=len(header)).reshape(shape)
        if not all_finite(values):
            raise ReplyError(f"{name}: {int((~np.isfinite(values)).sum())} numbers are not finite")
        adapter[name] = values
    return adapter


def magnitudes_from(record: ArrayRecord, shapes: Shapes) -> Adapter:
    """Return the start of DoRA's magnitudes from an untrusted record.

    Raises
    ------
    ReplyError
        As `from_arrays`, or if a value is not a norm: above 0 and at most `LARGEST_MAGNITUDE`.
    """
    magnitudes = from_arrays(record, shapes)
    for name, values in magnitudes.items():
        least, most = float(values.min()), float(values.max())
        if not 0 < least <= most <= LARGEST_MAGNITUDE:
            raise ReplyError(
                f"{name}: norms from {least:.3g} to {most:.3g}, and those of a base's weights are "
                f"above 0 and at most {LARGEST_MAGNITUDE:g}"
            )
    return magnitudes


def to_payload(codec: str, payload: NDArray[np.uint8]) -> ArrayRecord:
    """Return encoded tensors as an ArrayRecord: one npy buffer, named after the codec."""
    return ArrayRecord({codec: Array(payload)})


def from_payload(record: ArrayRecord, codec: str, most_bytes: int) -> NDArray[np.uint8]:
    """Return the encoded tensors of an untrusted record, for `codecs.decode`.

    Raises
    ------
    ReplyError
        If the record is not one array of bytes named after the codec, or is longer than
        `most_bytes`.
    """
    if list(record) != [codec]:
        raise ReplyError(
            f"expected one array {codec!r}, got {len(record)}: {', '.join(list(record)[:3])}"
        )
    data = record[codec].data
    length = len(data) - NPY_HEADER_BYTES
    if not 0 < length <= most_bytes:
        raise ReplyError(f"{codec}: expected at most {most_bytes} bytes, got {length}")
    if not data.startswith(_npy_header((length,), "|u1")):
        raise ReplyError(f"{codec}: expected {length} bytes as one array of uint8")
    return np.frombuffer(data, dtype=np.uint8, offset=NPY_HEADER_BYTES)


@functools.lru_cache(maxsize=4096)
def _npy_header(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    """Return what numpy.save writes before a C-ordered array of this shape and type."""
    buffer = io.BytesIO()
    description = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def tensor_sizes(message: Message) -> list[tuple[str, int]]:
    """Return (name, bytes as sent) of every tensor in a message."""
    if not message.has_content():
        return []
    return [
        (name, len(array.data))
        for record in message.content.array_records.values()
        for name, array in record.items()
    ]


def content(
    *,
    arrays: ArrayRecord | None = None,
    config: Mapping[str, bool | int | float | str] | None = None,
    metrics: Mapping[str, float | int] | None = None,
    start: ArrayRecord | None = None,
) -> RecordDict:
    """Return a message's content from its records, without those that are None."""
    records: dict[str, ArrayRecord | ConfigRecord | MetricRecord] = {}
    if start is not None:
        records[START] = start
    if arrays is not None:
        records[ARRAYS] = arrays
    if config is not None:
        records[CONFIG] = ConfigRecord(dict(config))
    if metrics is not None:
        records[METRICS] = MetricRecord(dict(metrics))
    return RecordDict(records)


def instruction_of(received: RecordDict) -> ConfigRecord:
    """Return what a message says besides its tensors; empty if nothing."""
    return received.config_records.get(CONFIG) or ConfigRecord()


def failure(error: GrandRoundsError) -> RecordDict:
    """Return the content of a reply that reports an expected error."""
    return content(config={"error": str(error), "error-type": type(error).__name__})


def raise_failure(reply: Message) -> None:
    """Raise the error that a reply reports, with the type that it had at the site.

    Its text is the site's: one line, cleaned and cut.

    Raises
    ------
    GrandRoundsError
        `ReplyError` where Flower reports a crash or a lost site.
    """
    if reply.has_error():
        text = _OF_FLOWER.sub(r"\1: ", (reply.error.reason or "").strip())
        lines = text.splitlines() or ["no reason given"]
        said = [line for line in lines if _EXCEPTION.match(line)] or lines
        reason = said[-1].rpartition("Message: ")[2].removesuffix("'>")
        raise ReplyError(f"the site failed (Flower's code {reply.error.code}): {one_line(reason)}")
    config = reply.content.config_records.get(CONFIG)
    if config is not None and "error" in config:
        kind = getattr(errors, str(config.get("error-type")), ReplyError)
        is_ours = isinstance(kind, type) and issubclass(kind, GrandRoundsError)
        raise (kind if is_ours else ReplyError)(one_line(str(config["error"])))


def metrics_of(reply: Message, required: Collection[str] = ()) -> Metrics:
    """Return a reply's metrics as plain numbers, without those that nobody reads.

    Parameters
    ----------
    required
        Metrics that the reply must have.

    Raises
    ------
    ReplyError
        If one of these is missing, or one that is read is a list, not finite or out of its range.
    """
    if METRICS not in reply.content.metric_records:
        raise ReplyError("the reply has no metrics")
    if missing := sorted(set(required) - reply.content.metric_records[METRICS].keys()):
        raise ReplyError(f"the reply lacks {', '.join(missing)}")
    out: Metrics = {}
    for name, value in reply.content.metric_records[METRICS].items():
        if name not in TOLD:
            continue
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise ReplyError(f"the metric {name!r} is {value!r}, not a finite number")
        if name in WHOLE and not (isinstance(value, int) and 0 <= value <= MANY):
            raise ReplyError(f"the metric {name!r} is {value!r}, not an integer of at least 0")
        if name in REAL and not 0 <= value <= REAL[name]:
            raise ReplyError(f"the metric {name!r} is {value!r}, not from 0 to {REAL[name]:g}")
        if name in SIGNED and abs(value) > SIGNED[name]:
            most = SIGNED[name]
            raise ReplyError(f"the metric {name!r} is {value!r}, not from {-most:g} to {most:g}")
        out[name] = value
    return out


def whole_number(record: ConfigRecord, name: str, low: int = 0, high: int = MANY) -> int:
    """Read an integer from a message's config.

    Raises
    ------
    ReplyError
        If it is missing, of another type or out of its range.
    """
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ReplyError(f"{name} is {value!r}, not an integer from {low} to {high}")
    return value


def real_number(record: ConfigRecord, name: str, low: float, high: float) -> float:
    """Read a number from a message's config; raise `ReplyError` as `whole_number` does."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ReplyError(f"{name} is {value!r}, not a number from {low:g} to {high:g}")
    return float(value)


def answering(
    function: Callable[[Message, Context], Message],
) -> Callable[[Message, Context], Message]:
    """Wrap a site's function so that an expected error is sent back as a reply."""

    @functools.wraps(function)
    def answer(message: Message, context: Context) -> Message:
        try:
            return function(message, context)
        except GrandRoundsError as error:
            return Message(failure(error), reply_to=message)

    return answer
