"""What a run will send: against published budgets, by hand, and against real ledgers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from grandrounds.config import recipes
from grandrounds.model.architectures import adapter_shapes, find_architecture, target_modules
from grandrounds.wire.adapter import Shapes
from grandrounds.wire.codecs import encode
from grandrounds.wire.codecs.codec import Codec
from grandrounds.wire.ledger import MIB, Ledger
from grandrounds.wire.messages import to_arrays, to_payload
from grandrounds.wire.traffic import Plan, message_of, plan_config
from tests.places import ROOT
from tests.runs import play, read_json

ALL_SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def plan_of(
    shapes: Shapes, rounds: int, cohort: int, evaluated: int = 0, sites: int = 0, **settings: Any
) -> Plan:
    """Return the plan of an adapter of some shapes under FedAvg, on data of one's own."""
    sites = sites or max(cohort, evaluated)
    plain = {
        "static.dataset.name": "cards.jsonl",
        "num-server-rounds": rounds,
        "seed": 0,
        "model.lora.peft-lora-r": next(s for n, s in shapes.items() if ".lora_A." in n)[0],
        "data.num-partitions": sites,
        "strategy.name": "fedavg",
        "strategy.proximal-mu": 0.0,
        "strategy.cohorts": "uniform",
        "strategy.fraction-train": cohort / sites,
        "strategy.fraction-evaluate": evaluated / sites,
    }
    return plan_config(recipes.resolve({**plain, **settings}), shapes)


def entry(model: str, rank: int, modules: str, cohort: int, rounds: int) -> Plan:
    """Return the plan of a FlowerTune entry, which holds nothing out."""
    base = find_architecture(model)
    shapes = adapter_shapes(base, target_modules(base, modules), rank)
    return plan_of(shapes, rounds, cohort)


# --- Published budgets ----------------------------------------------------------------------------


def test_the_budget_published_without_digits_is_reproduced() -> None:
    """28 layers of 8 (2 * 7,168 + 2 * 4,096 + 3 * 22,528) = 20,185,088 numbers, 392 headers:
    80,790,528 bytes a message, 600 messages: 46,228.71 MiB, published as 46,228."""
    plan = entry("Qwen/Qwen2.5-7B-Instruct", 8, ALL_SEVEN, 3, 100)
    assert plan.adapter_parameters == 20_185_088
    assert plan.message_bytes == 80_790_528
    assert plan.total_bytes // MIB == 46_228


def test_the_jsl_recipe_costs_what_it_costs() -> None:
    """r = 8 on q and v of 32 layers: 32 * 8 (8,192 + 5,120) = 3,407,872 numbers, 128 headers:
    13,647,872 bytes a message; 3 * 100 * 2 messages: 7,809.38 MiB, not the 46,228 of all seven
    modules of Qwen2.5-7B."""
    recipe = recipes.load_recipe(ROOT / "configs" / "jsl-medllama-3-8b-100-rounds.toml")
    config = recipes.resolve(recipe)
    base = find_architecture(config.model.name)
    targets = target_modules(base, config.lora.target_modules)
    plan = plan_config(config, adapter_shapes(base, targets, config.lora.peft_lora_r))
    assert plan.message_bytes == 4 * 3_407_872 + 128 * 128 == 13_647_872
    assert plan.total_bytes == 600 * 13_647_872
    assert f"{plan.total_bytes / MIB:,.2f}" == "7,809.38"


# --- By hand --------------------------------------------------------------------------------------

SHAPES = {"m.lora_A.weight": (2, 3), "m.lora_B.weight": (5, 2)}
"""16 numbers: 64 bytes and two headers make 320; A alone 152, B alone 168."""


BF16 = {
    "communication.uplink-codec": "bf16",
    "communication.downlink-codec": "bf16",
    "communication.catch-up-codec": "int4",
}


def test_every_message_of_a_run_is_counted() -> None:
    """3 rounds of 2 sites: 6 messages each way; held-out loss of 1 site before the first round and
    after each: 4, down only; the formulary's questions: 1."""
    plan = plan_of(SHAPES, 3, 2, 1, **{"static.dataset.name": "formulary"})
    counted = {kind: (t.messages, t.tensor_bytes) for kind, t in plan.ledger.totals.items()}
    assert counted == {
        "train.down": (6, 6 * 320),
        "train.up": (6, 6 * 320),
        "evaluate.down": (4, 4 * 320),
        "formulary.down": (1, 320),
    }
    assert plan.total_bytes == 17 * 320
    assert plan.total_bytes_with_key_names == 17 * (320 + 2 * len("m.lora_A.weight"))
    assert plan.adapter_parameters == 16


def test_ffa_sends_one_factor_both_ways_and_rolora_and_fedsvd_both_down_and_one_up() -> None:
    """B alone is 168 bytes, A alone 152. rolora sends B up in rounds 1 and 3, A in round 2."""

    def up_and_down(rule: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        plan = plan_of(SHAPES, 3, 1, **{"strategy.name": rule})
        return plan.down_bytes, plan.up_bytes

    assert up_and_down("ffa") == ((168,) * 3, (168,) * 3)
    assert up_and_down("rolora") == ((320,) * 3, (168, 152, 168))
    assert up_and_down("fedsvd") == ((320,) * 3, (168,) * 3)


def test_floras_stack_grows_with_the_cohort_up_to_its_highest_rank() -> None:
    """Rank 2, then 1 * 2 * 2 = 4, then 8, cut to 6: 4 (3 + 5) rank + 256 bytes."""
    plan = plan_of(SHAPES, 3, 2, **{"strategy.name": "flora", "strategy.max-rank": 6})
    assert plan.down_bytes == tuple(32 * rank + 256 for rank in (2, 4, 6))
    assert plan.up_bytes == (320,) * 3


def test_sites_of_a_lower_rank_send_and_receive_less() -> None:
    """Sites 0, 1, 2, 3 of ranks 2, 1, 2, 1, all in one round: 2 * 320 + 2 * (32 + 256) bytes each
    way; held-out loss is of the whole adapter."""
    plan = plan_of(SHAPES, 1, 4, 4, **{"strategy.name": "product", "strategy.site-ranks": "2,1"})
    totals = plan.ledger.totals
    assert totals["train.down"].tensor_bytes == totals["train.up"].tensor_bytes == 1216
    assert totals["evaluate.down"].tensor_bytes == 8 * 320


def test_where_sites_prune_their_ranks_the_plan_is_an_upper_bound() -> None:
    mixed = {"strategy.name": "hetlora", "strategy.site-ranks": "2,1"}
    plan = plan_of(SHAPES, 1, 4, 4, **mixed)
    assert plan.ledger.totals["train.down"].tensor_bytes == 1216
    assert not plan.is_upper_bound
    assert plan_of(SHAPES, 1, 4, 4, **mixed, **{"strategy.rank-decay": 0.5}).is_upper_bound


def test_encoded_the_untrained_adapter_costs_nothing() -> None:
    """bf16: 1 + 32 bytes and a header of 128, 161. One site, two rounds, and held-out loss before
    round 1 and after both: down none + 161, held-out none + 161 + 161, up 2 * 161."""
    plan = plan_of(SHAPES, 2, 1, 1, **BF16)
    counted = {kind: (t.messages, t.tensor_bytes) for kind, t in plan.ledger.totals.items()}
    assert counted == {
        "train.down": (1, 161),
        "train.up": (2, 322),
        "evaluate.down": (2, 322),
    }
    assert plan.ledger.totals["train.up"].key_bytes == 2 * len("bf16")
    assert plan.down_bytes == (0, 161)


def test_incrementally_a_site_is_caught_up_once() -> None:
    """Two sites in turn, one a round: round 1 costs nothing, the other site is caught up in round
    2 (int4), and both then get changes (bf16)."""
    plan = plan_of(
        SHAPES,
        *(4, 1, 0, 2),
        **{**BF16, "communication.downlink": "incremental", "strategy.cohorts": "balanced"},
    )
    catch_up = message_of(SHAPES, Codec("int4", 64, 0.05, False)).tensor_bytes
    assert sorted(plan.down_bytes[:2]) == sorted((0, catch_up))
    assert plan.down_bytes[2:] == (161, 161)


def test_with_entropy_coding_the_plan_says_that_it_is_an_upper_bound() -> None:
    assert plan_of(SHAPES, 1, 1, **BF16, **{"communication.entropy-coding": True}).is_upper_bound
    assert not plan_of(SHAPES, 1, 1, **BF16).is_upper_bound


def test_the_plan_for_json_agrees_with_itself() -> None:
    plan = entry("HuggingFaceTB/SmolLM2-135M", 8, "q_proj,v_proj", 2, 200)
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["total-bytes"] == plan.total_bytes
    assert data["total-mib"] == pytest.approx(200 * data["mib-per-round"])
    assert data["mib-per-round"] == pytest.approx(4 * data["message-mib"])
    assert data["adapter-parameters"] == 460_800


def test_plan_and_ledger_are_told_apart_by_kind() -> None:
    plan = plan_of(SHAPES, 1, 1)
    counted = Ledger()
    counted.count("train.down", [("x", 320)])
    counted.count("evaluate.down", [("x", 7)])
    assert plan.differences(counted) == {"evaluate.down": (0, 7), "train.up": (320, 0)}
    assert plan.differences(plan.ledger) == {}


# --- Against what is really sent ------------------------------------------------------------------


def test_the_planned_bytes_of_a_message_are_the_real_ones() -> None:
    shapes = {"x.lora_A.weight": (4, 33), "x.lora_B.weight": (17, 4)}
    record = to_arrays({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    real = sum(len(array.data) for array in record.values())
    assert message_of(shapes, None).tensor_bytes == real


@pytest.mark.parametrize("name", ["none", "bf16", "int8", "int4", "int2", "sign", "topk"])
@pytest.mark.parametrize("count", [7, 100_000])
def test_the_planned_bytes_of_an_encoded_message_are_the_real_ones(name: str, count: int) -> None:
    generator = np.random.default_rng(1)
    codec = Codec(name, 64, 0.05, False)
    payload = encode(codec, generator.standard_normal(count, dtype=np.float32), generator)
    [(key, array)] = to_payload(name, payload).items()
    shapes = {"x.lora_A.weight": (1, count)}
    planned = message_of(shapes, codec)
    assert (planned.tensor_bytes, planned.key_bytes) == (len(array.data), len(key))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"communication.uplink-codec": "int4", "communication.downlink-codec": "int8"},
        {
            "communication.uplink-codec": "sign",
            "communication.downlink-codec": "sign",
            "communication.downlink": "incremental",
        },
        {"strategy.name": "ffa", "strategy.proximal-mu": 0.0},
        {"strategy.name": "product", "strategy.site-ranks": "4,2,1"},
        {"strategy.name": "flora", "communication.uplink-codec": "int8"},
    ],
    ids=["plain", "encoded", "incremental", "one factor", "mixed ranks", "stacked"],
)
def test_plan_and_ledger_of_a_run_are_equal_to_the_byte_in_every_kind(
    settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    config = recipes.resolve({**settings, **changes})
    base = find_architecture(config.model.name)
    targets = target_modules(base, config.lora.target_modules)
    plan = plan_config(config, adapter_shapes(base, targets, config.lora.peft_lora_r))
    ledger = read_json(play({**settings, **changes}) / "ledger.json")
    assert ledger["totals"] == plan.as_dict()["totals"]
