"""Every figure that a tracker was told: of TensorBoard's files, or of recorded calls."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence

from scripts.check_figures.raw import FAILED, Raw, is_number, mib
from scripts.check_figures.sheet import Sheet

Scalar = tuple[int, str, float]
"""Round, name, value."""

OWN_NAMES = {"good-replies": "good", "failed-replies": "failed"}
"""Name at a tracker → key of metrics.jsonl whose entries it counts."""

FLOAT32 = 1e-6
"""Relative error of a value that TensorBoard stores."""


def check_tracker(scalars: Sequence[Scalar], raw: Raw) -> Sheet:
    """Check what a tracker was told; a value that nothing explains is a finding."""
    sheet = Sheet({})
    lines = {line["round"]: line for line in raw.lines}
    told = {(number, name) for number, name, _ in scalars}
    for number, name, value in scalars:
        wanted = _wanted(raw, lines.get(number, {}), number, name)
        if not wanted:
            sheet.findings.append(f"round {number}: nothing explains {name} = {value:g}")
        elif any(abs(value - one) <= FLOAT32 * max(1e-12, abs(one)) for one in wanted):
            sheet.checked["value"] += 1
        else:
            sheet.findings.append(
                f"round {number}: {name} is {value:g}, the raw files have {wanted}"
            )
    for number, line in lines.items():
        for key in ("held-out-loss", "train-loss", "communication-mib"):
            if is_number(line.get(key)) and (number, key) not in told:
                sheet.findings.append(f"round {number}: {key} = {line[key]:g} was not told")
    return sheet


def _wanted(raw: Raw, line: dict[str, object], number: int, name: str) -> list[float]:
    """Return the values that a figure may have."""
    if name.startswith("unfinished-"):
        lost = [one for one in raw.lost if (one["after-round"] or 0) == number]
        if name == "unfinished-communication-mib":
            return [mib(one) for one in lost]
        return [sum(len(one.get(kind) or ()) for kind in FAILED) for one in lost]
    if name in OWN_NAMES:
        found = line.get(OWN_NAMES[name])
        return [float(len(found))] if isinstance(found, list | dict) else []
    value = line.get(name)
    return [float(value)] if isinstance(value, int | float) else []


def calls_of(text: str) -> list[Scalar]:
    """Return the scalars of recorded calls: JSON lines with `round` and `figures`."""
    calls = [json.loads(line) for line in text.splitlines()]
    return [(c["round"], name, v) for c in calls for name, v in c["figures"].items()]


# --- TensorBoard's event files --------------------------------------------------------------------


def scalars_of(content: bytes) -> Iterator[Scalar]:
    """Yield the scalars of an event file: TFRecords of `Event`, of which 2 is step, 5 summary.

    https://github.com/tensorflow/tensorboard/tree/2.20.0/tensorboard/compat/proto, event.proto and
    summary.proto: a value's 1 is its tag, 2 its simple_value.
    """
    at = 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = dict(_fields(content[at + 12 : at + 12 + length]))
        at += 16 + length
        summary = event.get(5, b"")
        for number, value in _fields(summary) if isinstance(summary, bytes) else ():
            fields = dict(_fields(value)) if number == 1 and isinstance(value, bytes) else {}
            if isinstance(tag := fields.get(1), bytes) and isinstance(one := fields.get(2), float):
                step = event.get(2, 0)
                yield (step if isinstance(step, int) else 0), tag.decode(), one


def _fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield (number, value) of a protocol buffer's fields."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
        elif kind == 2:
            length, at = _varint(message, at)
            yield number, message[at : at + length]
            at += length
        else:
            width, form = (8, "<d") if kind == 1 else (4, "<f")
            yield number, float(struct.unpack_from(form, message, at)[0])
            at += width


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
