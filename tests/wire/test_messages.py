"""What travels: exact on the way, checked on arrival, cheap to refuse."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict

from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import (
    ConfigError,
    DataError,
    GrandRoundsError,
    ModelError,
    ReplyError,
    RoundError,
)
from grandrounds.wire import messages
from grandrounds.wire.messages import (
    answering,
    failure,
    from_arrays,
    metrics_of,
    raise_failure,
    tensor_sizes,
    to_arrays,
)

SHAPES = {"x.lora_A.weight": (2, 5), "x.lora_B.weight": (3, 2)}


def adapter() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def message(content: RecordDict | None = None) -> Message:
    """Return a message as a site receives it."""
    grid = InProcessGrid(lambda m, _: m, {}, 1)
    made = Message(content or RecordDict(), 1, "train")
    grid.push_messages([made])
    return made


def reply_with(content: RecordDict) -> Message:
    return Message(content, reply_to=message())


def test_an_adapter_travels_bit_for_bit() -> None:
    sent = adapter()
    sent["x.lora_A.weight"][0, :4] = [-0.0, 1e-45, 3.4028235e38, -1e-38]
    received = from_arrays(to_arrays(sent), SHAPES)
    assert received.keys() == sent.keys()
    for name in sent:
        assert received[name].tobytes() == sent[name].tobytes()
        assert received[name].shape == sent[name].shape
        assert received[name].dtype == np.float32


def test_a_tensor_in_fortran_order_travels_as_it_reads() -> None:
    sent = adapter()
    turned = {name: np.asfortranarray(tensor) for name, tensor in sent.items()}
    received = from_arrays(to_arrays(turned), SHAPES)
    for name in sent:
        assert np.array_equal(received[name], sent[name])


def test_the_bytes_of_a_message_are_those_of_its_buffers() -> None:
    """4 * 10 + 128 and 4 * 6 + 128."""
    made = message(messages.content(arrays=to_arrays(adapter()), config={"round": 1}))
    assert tensor_sizes(made) == [("x.lora_A.weight", 168), ("x.lora_B.weight", 152)]


def test_a_message_without_tensors_has_no_bytes() -> None:
    assert tensor_sizes(message(messages.content(config={"round": 1}))) == []
    assert tensor_sizes(Message(Error(2, "crashed"), reply_to=message())) == []


def replaced(**changes: Any) -> ArrayRecord:
    """Return the record of an adapter whose first tensor is changed."""
    record = to_arrays(adapter())
    array = record["x.lora_A.weight"]
    options = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    record["x.lora_A.weight"] = Array(**{**options, **changes})
    return record


def with_values(values: Any) -> ArrayRecord:
    record = to_arrays(adapter())
    record["x.lora_A.weight"] = Array(np.asarray(values))
    return record


def spoilt(value: float) -> ArrayRecord:
    values = adapter()["x.lora_A.weight"].copy()
    values[1, 2] = value
    return with_values(values)


def without(name: str) -> ArrayRecord:
    return ArrayRecord({n: array for n, array in to_arrays(adapter()).items() if n != name})


def renamed() -> ArrayRecord:
    return ArrayRecord({n.replace("x.", "y."): a for n, a in to_arrays(adapter()).items()})


WHOLE = to_arrays(adapter())["x.lora_A.weight"].data

BAD = {
    "nan": (spoilt(float("nan")), "x.lora_A.weight: 1 numbers are not finite"),
    "inf": (spoilt(float("inf")), "not finite"),
    "minus inf": (spoilt(float("-inf")), "not finite"),
    "transposed": (with_values(adapter()["x.lora_A.weight"].T.copy()), r"expected .*\(2, 5\)"),
    "one row more": (with_values(np.zeros((3, 5), np.float32)), r"of shape \(3, 5\)"),
    "flat": (with_values(np.zeros(10, np.float32)), r"of shape \(10,\)"),
    "float64": (with_values(np.zeros((2, 5))), "got float64"),
    "float16": (with_values(np.zeros((2, 5), np.float16)), "got float16"),
    "integers of the same width": (with_values(np.zeros((2, 5), np.int32)), "got int32"),
    "big-endian": (with_values(np.zeros((2, 5), ">f4")), "expected float32"),
    "fortran order": (with_values(np.zeros((2, 5), np.float32, order="F")), "expected float32"),
    "truncated": (replaced(data=WHOLE[:-1]), r"\(167 bytes\)"),
    "header only": (replaced(data=WHOLE[:128]), r"\(128 bytes\)"),
    "empty": (replaced(data=b""), r"\(0 bytes\)"),
    "one byte more": (replaced(data=WHOLE + b"\0"), r"\(169 bytes\)"),
    "huge claim beside the data": (replaced(shape=(10**9, 10**9), data=b"x"), "1000000000"),
    "other shape in the header": (
        replaced(data=WHOLE.replace(b"(2, 5)", b"(9, 9)")),
        "expected float32",
    ),
    "pickle": (replaced(data=b"\x80\x04N." + WHOLE[4:]), "expected float32"),
    "missing": (without("x.lora_B.weight"), r"missing \['x.lora_B.weight'\]"),
    "none": (ArrayRecord(), "wrong tensors: missing"),
    "other names": (renamed(), r"unexpected \['y.lora_A.weight'"),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_are_not_as_expected_are_a_reply_error(case: str) -> None:
    record, words = BAD[case]
    with pytest.raises(ReplyError, match=words) as caught:
        from_arrays(record, SHAPES)
    assert "\n" not in str(caught.value)


def test_an_unexpected_tensor_beside_the_right_ones_is_a_reply_error() -> None:
    record = to_arrays(adapter() | {"z": np.zeros(1, np.float32)})
    with pytest.raises(ReplyError, match=r"unexpected \['z'\]"):
        from_arrays(record, SHAPES)


def test_a_huge_claim_allocates_nothing() -> None:
    shape = (10**5, 10**5)  # 40 GB
    header = to_arrays({"a": np.zeros((2, 5), np.float32)})["a"].data[:128]
    liar = header.replace(b"(2, 5), }        ", b"(100000, 100000),")
    record = ArrayRecord({"a": Array(dtype="float32", shape=shape, stype="numpy.ndarray",
                                     data=liar + b"\0" * 40)})  # fmt: skip
    tracemalloc.start()
    try:
        for expected in ({"a": (2, 5)}, {"a": shape}):
            with pytest.raises(ReplyError):
                from_arrays(record, expected)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [ConfigError, DataError, ModelError, RoundError, ReplyError])
def test_an_expected_failure_comes_back_with_its_type_and_words(
    kind: type[GrandRoundsError],
) -> None:
    with pytest.raises(kind, match=r"^site 3: no rows; add some$") as caught:
        raise_failure(reply_with(failure(kind("site 3: no rows; add some"))))
    assert type(caught.value) is kind


@pytest.mark.parametrize("kind", ["SystemExit", "nearest", "difflib", "__name__", "Iterable", ""])
def test_a_type_that_is_none_of_ours_becomes_a_reply_error(kind: str) -> None:
    content = messages.content(config={"error": "odd", "error-type": kind})
    with pytest.raises(ReplyError, match="odd"):
        raise_failure(reply_with(content))


def test_a_failure_without_a_type_becomes_a_reply_error() -> None:
    with pytest.raises(ReplyError, match="odd"):
        raise_failure(reply_with(messages.content(config={"error": "odd"})))


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Traceback ...\n  line\nValueError: too odd\n", "code 2.*: ValueError: too odd$"),
        ("<class 'ValueError'>:<'too odd'>", "code 2.*: ValueError: too odd$"),
        ("<class 'a.b.OddError'>:<'first\nsecond'>", "code 2.*: OddError: first$"),
        ("", "no reason given"),
        ("\n\n", "code 2"),
    ],
)
def test_a_crash_that_flower_reports_becomes_a_reply_error(reason: str, words: str) -> None:
    with pytest.raises(ReplyError, match=words) as caught:
        raise_failure(Message(Error(2, reason), reply_to=message()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("crashed", [True, False])
def test_what_a_site_says_of_a_failure_is_one_short_line_that_no_terminal_obeys(
    crashed: bool,
) -> None:
    """Newlines forge lines of the console, and a megabyte ended in metrics.jsonl and report."""
    said = "odd\r\x1b[2J\u202egnp\n  site 0: update received " + "x" * 10**6
    reply = reply_with(messages.content(config={"error": said}))
    if crashed:
        reply = Message(
            Error(2, f"ValueError: {said.translate({10: 32, 13: 32})}"), reply_to=message()
        )
    with pytest.raises(ReplyError) as caught:
        raise_failure(reply)
    text = str(caught.value)
    assert "[2Jgnp" in text
    assert text.isprintable()
    assert len(text) < 1100


def test_a_good_reply_raises_nothing() -> None:
    raise_failure(reply_with(messages.content(config={"round": 1})))
    raise_failure(reply_with(messages.content()))


def test_metrics_come_back_as_plain_numbers() -> None:
    metrics: dict[str, float | int] = {"num-examples": 3, "train-loss": 0.25}
    assert metrics_of(reply_with(messages.content(metrics=metrics))) == metrics


def test_metrics_that_nobody_reads_are_dropped() -> None:
    told: dict[str, float | int] = {"num-examples": 3, "\x1b[2J": 1.0, **dict.fromkeys("abc", 1)}
    assert metrics_of(reply_with(messages.content(metrics=told))) == {"num-examples": 3}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, 2.0]])
def test_a_metric_that_is_no_finite_number_is_a_reply_error(value: Any) -> None:
    content = RecordDict({messages.METRICS: MetricRecord({"train-loss": value})})
    with pytest.raises(ReplyError, match="'train-loss'"):
        metrics_of(reply_with(content))


def test_a_reply_without_metrics_is_a_reply_error() -> None:
    with pytest.raises(ReplyError, match="no metrics"):
        metrics_of(reply_with(messages.content()))


def test_a_site_answers_an_expected_error_in_words_and_lets_a_bug_through() -> None:
    @answering
    def site(received: Message, context: Context) -> Message:
        if received.metadata.message_type == "train":
            raise DataError("no rows")
        raise ZeroDivisionError

    with pytest.raises(DataError, match="no rows"):
        raise_failure(site(message(), None))  # type: ignore[arg-type]
    query = Message(RecordDict(), 1, "query")
    with pytest.raises(ZeroDivisionError):
        site(query, None)  # type: ignore[arg-type]


NORMS = {"m.lora_magnitude_vector": np.array([0.5, 2.0], np.float32)}


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ([0.5, -2.0], "norms from -2 to 0.5"),
        ([0.0, 2.0], "norms from 0 to 2"),
        ([0.5, np.nan], "1 numbers are not finite"),
        ([0.5, np.inf], "1 numbers are not finite"),
        ([0.5, 2e6], r"above 0 and at most 1e\+06"),
        ([0.5], r"expected float32 of shape \(2,\)"),
        ([0.5] * 10_000, r"expected float32 of shape \(2,\)"),
    ],
)
def test_magnitudes_that_are_no_norms_are_refused(told: list[float], why: str) -> None:
    shapes = {name: norms.shape for name, norms in NORMS.items()}
    found = messages.magnitudes_from(messages.to_arrays(NORMS), shapes)
    np.testing.assert_array_equal(found["m.lora_magnitude_vector"], [0.5, 2.0])
    record = messages.to_arrays({"m.lora_magnitude_vector": np.array(told, np.float32)})
    with pytest.raises(ReplyError, match=why):
        messages.magnitudes_from(record, shapes)
