"""The byte counter: every message, both directions, by FlowerTune's rule."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from grandrounds.wire.ledger import MIB, NPY_HEADER_BYTES, Ledger
from grandrounds.wire.traffic import message_of


def test_totals_are_kept_by_kind_and_direction() -> None:
    """Names have 2 and 3 bytes, buffers 200 and 300: 500 and 5 down twice, 500 and 5 up once."""
    ledger = Ledger()
    tensors = [("aa", 200), ("bbb", 300)]
    ledger.count("train.down", tensors)
    ledger.count("train.down", tensors)
    ledger.count("train.up", tensors)
    assert ledger.totals["train.down"].messages == 2
    assert ledger.totals["train.down"].tensor_bytes == 1000
    assert ledger.totals["train.down"].key_bytes == 10
    assert ledger.totals["train.up"].tensor_bytes == 500
    assert ledger.tensor_bytes == 1500
    assert ledger.mib == 1500 / MIB
    assert ledger.as_dict()["communication_mib_with_key_names"] == 1515 / MIB


def test_tensors_given_once_only_are_counted_whole() -> None:
    ledger = Ledger()
    ledger.count("train.up", iter([("aa", 200), ("bbb", 300)]))
    assert (ledger.totals["train.up"].tensor_bytes, ledger.totals["train.up"].key_bytes) == (500, 5)


def test_names_are_counted_in_bytes_and_not_in_letters() -> None:
    ledger = Ledger()
    ledger.count("train.up", [("µ", 1)])
    assert ledger.totals["train.up"].key_bytes == 2


def test_a_message_without_tensors_adds_nothing() -> None:
    ledger = Ledger()
    ledger.count("evaluate.up", [])
    assert ledger.totals == {}
    assert ledger.tensor_bytes == 0


def test_a_ledger_reads_back_the_same() -> None:
    ledger = Ledger()
    ledger.count("train.down", [("a", 100)])
    ledger.count("evaluate.down", [("a", 100)])
    assert Ledger.from_dict(json.loads(json.dumps(ledger.as_dict()))) == ledger


@pytest.mark.parametrize("shape", [(8, 576), (192, 8), (1, 1), (1024, 128256), (7,), (3, 1, 2)])
def test_the_predicted_bytes_are_those_that_numpy_writes(shape: tuple[int, ...]) -> None:
    elements = int(np.prod(shape))
    empty = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0,) * len(shape))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": empty.shape}
    )
    assert len(header.getvalue()) == NPY_HEADER_BYTES
    assert message_of({"x": shape}, None).tensor_bytes == 4 * elements + len(header.getvalue())


def test_the_bytes_of_a_message_are_the_sum_of_its_tensors() -> None:
    """4 * 6 + 128 and 4 * 20 + 128."""
    assert message_of({"a": (2, 3), "b": (4, 5)}, None).tensor_bytes == 152 + 208
