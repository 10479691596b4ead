"""What a run will send, against the budgets that FlowerTune entries published."""

from __future__ import annotations

import numpy as np
import pytest

from grandrounds.ledger import MIB
from grandrounds.messages import to_arrays
from grandrounds.planning import Plan, plan_run

Shapes = dict[str, tuple[int, ...]]


def query_and_value(layers: int, rank: int, hidden: int, query_out: int, value_out: int) -> Shapes:
    """Return the shapes of LoRA on q_proj and v_proj under the names that PEFT saves."""
    shapes: Shapes = {}
    for layer in range(layers):
        for module, out in (("q_proj", query_out), ("v_proj", value_out)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            shapes[f"{name}.lora_A.weight"] = (rank, hidden)
            shapes[f"{name}.lora_B.weight"] = (out, rank)
    return shapes


def flowertune(shapes: Shapes, *, rounds: int, cohort: int) -> Plan:
    return plan_run(shapes, rounds=rounds, cohort=cohort, evaluation_cohort=0, formulary=False)


SMOLLM2_135M = query_and_value(30, 8, 576, 576, 192)
SMOLLM2_360M = query_and_value(32, 8, 960, 960, 320)
LLAMA_3_8B = query_and_value(32, 32, 4096, 4096, 1024)


@pytest.mark.parametrize(
    ("shapes", "cohort", "rounds", "message", "published_mib"),
    [
        # 30 (3 * 8 * 576 + 8 * 192) = 460,800 numbers; 4 bytes each; 120 headers of 128 bytes
        (SMOLLM2_135M, 2, 200, 1_858_560, 1_417.97),
        # 32 (3 * 8 * 960 + 8 * 320) = 819,200 numbers; 128 headers
        (SMOLLM2_360M, 2, 200, 3_293_184, 2_512.50),
        # 32 (3 * 32 * 4096 + 32 * 1024) = 13,631,488 numbers; 128 headers
        (LLAMA_3_8B, 2, 10, 54_542_336, 2_080.62),
        (LLAMA_3_8B, 2, 100, 54_542_336, 20_806.25),
    ],
    ids=["TNI 135M", "TNI 360M", "0-1-ai Aloe 8B", "Gachon Llama-3-8B"],
)
def test_published_budgets_are_reproduced(
    shapes: Shapes, cohort: int, rounds: int, message: int, published_mib: float
) -> None:
    plan = flowertune(shapes, rounds=rounds, cohort=cohort)
    assert plan.message_bytes == message
    assert plan.total_bytes == message * 2 * cohort * rounds
    assert plan.total_bytes / MIB == pytest.approx(published_mib, abs=0.00501)


def test_the_published_budget_with_key_names_is_reproduced() -> None:
    """128 names, 4 a layer: 62 letters in the 10 layers of one digit, 63 in the other 22: 40 * 62 +
    88 * 63 = 8,024 bytes in each of 2 * 2 * 10 = 40 messages, 0.306 MiB in all."""
    names = [len(name) for name in LLAMA_3_8B]
    assert names.count(62) == 40
    assert names.count(63) == 88
    with_names = 54_542_336 + 40 * 62 + 88 * 63
    assert 40 * with_names / MIB == pytest.approx(2_080.93, abs=0.00501)


def test_every_message_of_a_run_is_counted() -> None:
    """Tensors of 4 * 6 + 128 = 152 bytes; 3 rounds of 2 sites: 12 messages; held-out loss of 1
    site before the first round and after each: 4, down only; the formulary's questions: 1."""
    plan = plan_run({"a": (2, 3)}, rounds=3, cohort=2, evaluation_cohort=1, formulary=True)
    assert (plan.train_messages, plan.evaluate_messages, plan.formulary_messages) == (12, 4, 1)
    assert plan.total_bytes == 17 * 152
    assert plan.adapter_parameters == 6


def test_the_plan_for_json_agrees_with_itself() -> None:
    plan = flowertune(SMOLLM2_135M, rounds=200, cohort=2)
    data = plan.as_dict()
    assert data["total-bytes"] == plan.total_bytes
    assert data["total-mib"] == pytest.approx(200 * float(data["mib-per-round"]))
    assert data["mib-per-round"] == pytest.approx(4 * float(data["message-mib"]))
    assert data["adapter-parameters"] == 460_800


def test_the_planned_bytes_of_a_message_are_the_real_ones() -> None:
    shapes: Shapes = {"x.lora_A.weight": (4, 33), "x.lora_B.weight": (17, 4)}
    record = to_arrays({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    real = sum(len(array.data) for array in record.values())
    assert flowertune(shapes, rounds=1, cohort=1).message_bytes == real
