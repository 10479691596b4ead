"""The way up: what a codec loses comes later, and nothing comes twice."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import RecordDict

from grandrounds.config.codecs import EXACT_CODECS
from grandrounds.config.keys import Config
from grandrounds.config.recipes import resolve
from grandrounds.config.strategies import STRATEGIES
from grandrounds.errors import ReplyError
from grandrounds.wire import uplink
from grandrounds.wire.adapter import Adapter, at_rank, flatten, shapes_of
from grandrounds.wire.codecs.codec import codec_named
from grandrounds.wire.schedule import uplink_generator

SHAPES = {"m.lora_A.weight": (4, 32), "m.lora_B.weight": (48, 4)}
CODECS = ["none", "float32", "bf16", "int8", "int4", "int2", "ternary", "sign", "topk"]


def config_of(codec: str, rule: str = "fedprox") -> Config:
    return resolve(
        {
            "strategy.name": rule,
            "communication.uplink-codec": codec,
            "communication.block-size": 16,
            "communication.kept-share": 0.1,
        }
    )


def change_of(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}


def sent(
    change: Adapter, config: Config, state: RecordDict, number: int, start: int, end: int
) -> np.ndarray:
    """One visit from cursor `start` to `end`: what the server decodes of it."""
    feeds_back = STRATEGIES[config.strategy.name].error_feedback
    memory = uplink.ErrorMemory(state, start, end) if feeds_back else None
    generator = uplink_generator(config.federation.seed, number, 0)
    record = uplink.encode_change(change, config.communication, memory, generator)
    codec = codec_named(config.communication.uplink_codec, config.communication)
    shapes = shapes_of(change)
    return flatten(uplink.decode_change(record, codec, shapes))


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_is_lost_over_visits(codec: str) -> None:
    """What was decoded so far and the memory are together what the visits changed."""
    config, state = config_of(codec), RecordDict()
    changes = [change_of(number) for number in range(6)]
    decoded = sum(sent(c, config, state, n, 10 * n, 10 * n + 10) for n, c in enumerate(changes))
    everything = sum(flatten(c) for c in changes)
    memory = state.array_records.get("grandrounds-memory", {})
    kept = flatten({name: array.numpy() for name, array in memory.items()})
    lost = kept if kept.size else np.zeros_like(everything)
    assert np.allclose(decoded + lost, everything, atol=1e-4)
    if codec not in EXACT_CODECS:
        assert np.linalg.norm(lost) > 0
    else:
        assert not state


def test_the_memory_goes_back_with_the_cursor() -> None:
    """A reply that was not used: the server sends the cursor from before, the visit is done again,
    and it is the same to the bit as if the lost one had never been."""
    config, lost, never = config_of("sign"), RecordDict(), RecordDict()
    for state in (lost, never):
        sent(change_of(0), config, state, 1, 0, 10)
    sent(change_of(1), config, lost, 2, 10, 20)  # this reply is not used
    again, expected = (sent(change_of(2), config, c, 3, 10, 20) for c in (lost, never))
    assert np.array_equal(again, expected)


def test_a_memory_that_belongs_to_no_cursor_is_not_used() -> None:
    config, state = config_of("sign"), RecordDict()
    sent(change_of(0), config, state, 1, 0, 10)
    fresh = sent(change_of(1), config, RecordDict(), 2, 30, 40)
    assert np.array_equal(sent(change_of(1), config, state, 2, 30, 40), fresh)


def test_the_memory_of_a_factor_waits_until_it_is_trained_again() -> None:
    """RoLoRA: B, A, B. What was lost of B in round 1 is sent in round 3."""
    config, state = config_of("sign", "rolora"), RecordDict()
    a, b = ({n: t for n, t in change_of(0).items() if x in n} for x in ("lora_A", "lora_B"))
    first = sent(b, config, state, 1, 0, 10)
    sent(a, config, state, 2, 10, 20)
    nothing = {n: np.zeros_like(t) for n, t in b.items()}
    later = sent(nothing, config, state, 3, 20, 30)
    left = flatten(b) - first
    assert np.linalg.norm(left - later) < np.linalg.norm(left)
    assert later.any()


def test_rules_that_write_the_factors_anew_keep_no_memory() -> None:
    state = RecordDict()
    sent(change_of(0), config_of("int4", "product"), state, 1, 0, 10)
    assert not state


def test_a_visit_that_diverged_says_so() -> None:
    change = {n: np.full_like(t, np.nan) for n, t in change_of(0).items()}
    with pytest.raises(ReplyError, match="training diverged"):
        sent(change, config_of("int4"), RecordDict(), 1, 0, 10)


@pytest.mark.parametrize("codec", [c for c in CODECS if c != "none"])
def test_a_payload_of_another_length_name_or_type_is_refused(codec: str) -> None:
    config = config_of(codec)
    made = codec_named(codec, config.communication)
    generator = uplink_generator(0, 1, 0)
    record = uplink.encode_change(change_of(0), config.communication, None, generator)
    other = at_rank(SHAPES, 3)
    with pytest.raises(ReplyError):
        uplink.decode_change(record, made, other)
    with pytest.raises(ReplyError, match="expected one array"):
        uplink.decode_change(uplink.messages.to_arrays(change_of(0)), made, SHAPES)
    wrong = uplink.messages.to_payload(codec, np.zeros(8, np.float64))  # type: ignore[arg-type]
    with pytest.raises(ReplyError):
        uplink.decode_change(wrong, made, SHAPES)
