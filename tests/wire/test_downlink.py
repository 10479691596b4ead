"""The way down: server and site agree on every number, and on what is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from grandrounds.config.keys import Config
from grandrounds.config.recipes import resolve
from grandrounds.errors import ReplyError
from grandrounds.wire import downlink, messages
from grandrounds.wire.adapter import Adapter, Ranks, drawn_adapter, flatten
from grandrounds.wire.downlink import Parcel, Sender

SHAPES = {"m.lora_A.weight": (4, 32), "m.lora_B.weight": (48, 4)}
START = drawn_adapter(SHAPES, 42)


def config_of(down: str, mode: str = "complete", rule: str = "fedprox", **more: Any) -> Config:
    return resolve(
        {
            "strategy.name": rule,
            "model.lora.peft-lora-r": 4,
            "communication.downlink-codec": down,
            "communication.downlink": mode,
            "communication.block-size": 16,
            **more,
        }
    )


def sender_of(config: Config) -> Sender:
    return Sender(Ranks.of(config), config.communication, START, 42)


def arrived(parcel: Parcel, **changed: Any) -> RecordDict:
    return messages.content(arrays=parcel.arrays, config={"round": 1, **parcel.config, **changed})


def moved(seed: int = 0, scale: float = 0.01) -> Adapter:
    rng = np.random.default_rng(seed)
    return {n: (t + scale * rng.normal(size=t.shape)).astype(np.float32) for n, t in START.items()}


def size_of(parcel: Parcel) -> int:
    return sum(len(array.data) for array in parcel.arrays.values()) if parcel.arrays else 0


def same(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "int4", "int2"])
@pytest.mark.parametrize("rule", ["fedprox", "ffa", "rolora", "product"])
def test_the_site_has_what_the_server_thinks_it_has(codec: str, rule: str) -> None:
    config = config_of(codec, rule=rule)
    parcel = sender_of(config).parcel(1, 0, moved(), trains=True)
    received = downlink.receive(arrived(parcel), RecordDict(), config, SHAPES)
    assert same(received, parcel.received)
    assert set(received) == set(Ranks.of(config).shapes_down(SHAPES, 4))


def test_a_complete_message_is_made_once_for_a_cohort() -> None:
    sender, adapter = sender_of(config_of("int4")), moved()
    first = sender.parcel(1, 0, adapter, trains=True)
    assert sender.parcel(1, 3, adapter, trains=True) is first
    assert sender.parcel(2, 3, adapter, trains=True) is not first


def test_the_adapter_of_the_start_costs_nothing_encoded() -> None:
    config = config_of("int4")
    parcel = sender_of(config).parcel(1, 0, START, trains=True)
    assert parcel.arrays is None
    assert same(downlink.receive(arrived(parcel), RecordDict(), config, SHAPES), START)


def test_increments_come_ever_closer_to_an_adapter_that_stays() -> None:
    """One bit a message: what a message loses is part of the next one."""
    config, state = config_of("sign", "incremental"), RecordDict()
    sender, adapter, distances = sender_of(config), moved(), []
    for number in range(1, 9):
        parcel = sender.parcel(number, 0, adapter, trains=True)
        received = downlink.receive(arrived(parcel), state, config, SHAPES)
        assert same(received, parcel.received)
        sender.settle({0: parcel}, [0])
        distances.append(float(np.linalg.norm(flatten(received) - flat(adapter))))
    assert size_of(parcel) < 0.1 * 4 * flat(adapter).size + 128
    assert distances[-1] < 0.1 * distances[0]


def flat(adapter: Adapter) -> np.ndarray:
    return flatten(adapter)


def test_the_first_increment_is_complete_and_each_site_has_its_own() -> None:
    sender, adapter = sender_of(config_of("sign", "incremental")), moved()
    first = sender.parcel(1, 0, adapter, trains=True)
    assert first.config["codec"] == "int4"
    sender.settle({0: first}, [0])
    assert sender.parcel(2, 0, adapter, trains=True).config["codec"] == "sign"
    assert sender.parcel(2, 1, adapter, trains=True).config["codec"] == "int4"


def test_a_site_whose_reply_was_lost_is_sent_everything_again() -> None:
    config, state = config_of("sign", "incremental"), RecordDict()
    sender, adapter = sender_of(config), moved()
    parcel = sender.parcel(1, 0, adapter, trains=True)
    downlink.receive(arrived(parcel), state, config, SHAPES)
    sender.settle({0: parcel}, [])  # it arrived, but the server does not know
    again = sender.parcel(2, 0, adapter, trains=True)
    assert again.config["holds"] == 0
    assert same(downlink.receive(arrived(again), state, config, SHAPES), again.received)


def test_a_site_that_has_something_else_says_so() -> None:
    config = config_of("sign", "incremental")
    sender, adapter = sender_of(config), moved()
    sender.settle({0: sender.parcel(1, 0, adapter, trains=True)}, [0])
    parcel = sender.parcel(2, 0, adapter, trains=True)
    with pytest.raises(ReplyError, match="builds on its message 1, but this site has nothing"):
        downlink.receive(arrived(parcel), RecordDict(), config, SHAPES)


@pytest.mark.parametrize(
    "changed",
    [
        {"codec": "int8"},
        {"codec": "topk"},
        {"codec": 7},
        *({"rank": rank} for rank in (5, 0, -1, 1.5, True, "4", b"4", [4])),
        *({"holds": holds} for holds in (-1, 1.5, True, "x", b"x", [1])),
        *({"version": version} for version in (0, "x", [1])),
    ],
)
def test_a_message_of_another_configuration_is_refused(changed: dict[str, Any]) -> None:
    config = config_of("int4")
    parcel = sender_of(config).parcel(1, 0, moved(), trains=True)
    with pytest.raises(ReplyError, match=next(iter(changed))):
        downlink.receive(arrived(parcel, **changed), RecordDict(), config, SHAPES)


@pytest.mark.parametrize("missing", ["codec", "rank", "holds", "version"])
def test_a_message_without_what_it_must_say_is_refused(missing: str) -> None:
    config = config_of("int4")
    parcel = sender_of(config).parcel(1, 0, moved(), trains=True)
    message = arrived(parcel)
    del message.config_records["config"][missing]
    with pytest.raises(ReplyError, match=missing):
        downlink.receive(message, RecordDict(), config, SHAPES)
    message = messages.content(arrays=parcel.arrays)
    with pytest.raises(ReplyError, match="codec"):
        downlink.receive(message, RecordDict(), config, SHAPES)


def test_each_rank_of_a_cohort_is_encoded_once() -> None:
    config = config_of("int4", rule="product", **{"strategy.site-ranks": "4,2"})
    sender, adapter = sender_of(config), moved()
    parcels = [sender.parcel(1, site, adapter, trains=True) for site in range(6)]
    assert parcels[0] is parcels[2] is parcels[4]
    assert parcels[1] is parcels[3] is parcels[5]


def test_the_order_of_the_tensors_is_that_of_the_start() -> None:
    """A state that was loaded again has its tensors in another order."""
    config, adapter = config_of("int4"), moved()
    turned = dict(reversed(adapter.items()))
    parcel = sender_of(config).parcel(1, 0, turned, trains=True)
    received = downlink.receive(arrived(parcel), RecordDict(), config, SHAPES)
    assert np.abs(flat(received) - flat(adapter)).max() < 0.02


def test_a_site_of_lower_rank_receives_the_strongest_directions() -> None:
    config = config_of("none", rule="product", **{"strategy.site-ranks": "4,2"})
    sender, adapter = sender_of(config), moved()
    assert sender.parcel(1, 0, adapter, trains=True).received["m.lora_A.weight"].shape == (4, 32)
    lower = sender.parcel(1, 1, adapter, trains=True)
    assert lower.received["m.lora_A.weight"].shape == (2, 32)
    received = downlink.receive(arrived(lower), RecordDict(), config, SHAPES)
    product = adapter["m.lora_B.weight"] @ adapter["m.lora_A.weight"]
    left, sizes, right = np.linalg.svd(product, full_matrices=False)
    best = (left[:, :2] * sizes[:2]) @ right[:2]
    made = received["m.lora_B.weight"] @ received["m.lora_A.weight"]
    assert np.allclose(made, best, atol=1e-6)
    # Who only judges gets the whole adapter.
    judged = sender.parcel(1, 1, adapter, trains=False)
    assert judged.received["m.lora_A.weight"].shape == (4, 32)


def test_what_is_judged_at_the_end_is_the_adapter_itself() -> None:
    config, adapter = config_of("int4", rule="ffa"), moved()
    parcel = sender_of(config).exact(adapter)
    received = downlink.receive(arrived(parcel), RecordDict(), config, SHAPES)
    assert list(received) == ["m.lora_B.weight"]
    assert np.array_equal(received["m.lora_B.weight"], adapter["m.lora_B.weight"])
