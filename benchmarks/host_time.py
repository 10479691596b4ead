"""What a step of a visit costs Python: processor time of many layers that compute next to nothing.

    python benchmarks/host_time.py [--profile]

A Llama of 32 layers and hidden size 32 with LoRA on q_proj and v_proj, adapted modules fused as on
a GPU. To compare two commits, alternate the script between their checkouts.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import time
from typing import Any

LAYERS, STEPS = 32, 10


def visit_of(layers: int) -> Any:
    """Return a function that trains a visit of some steps on a new base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from grandrounds.data.tokenization import TokenizedExample
    from grandrounds.model.loss import Forward
    from grandrounds.site.training import VisitSettings, train_visit
    from grandrounds.wire.schedule import VisitSchedule

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).requires_grad_(False), lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [tuple(3 + (i * 7 + j) % 290 for j in range(12)) for i in range(2)]
    batches = [[TokenizedExample(row, 4) for row in rows]]
    how = Forward(False, True, True, 1024, fused=True)

    def visit(steps: int) -> None:
        schedule = VisitSchedule(1e-3, steps)
        settings = VisitSettings(1, schedule, "adamw_torch", 0.0, 1.0, 0.01, how, 1)
        train_visit(model, parameters, batches * steps, settings, 0)

    return visit


def main() -> None:
    """Measure; print milliseconds a step, or where they go."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="a visit by function, 40 lines")
    given = parser.parse_args()
    from grandrounds.quiet import quiet_libraries

    quiet_libraries()
    visit = visit_of(given.layers)
    visit(2)
    if given.profile:
        with cProfile.Profile() as profile:
            visit(STEPS)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return
    found = []
    for _ in range(given.repeats):
        started = time.process_time()
        visit(STEPS)
        found.append(1000 * (time.process_time() - started) / STEPS)
    print(
        f"{given.layers} layers: {statistics.median(found):.1f} ms of processor time a step, "
        f"{min(found):.1f} at least"
    )


if __name__ == "__main__":
    main()
