"""Operations, rates and peaks for full_size.py; no script by itself."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from bare_loops import BATCH, RATE, TOKENS, synchronize
from peak_memory import peak_bytes

GIB = 2**30


def flops_per_round(base_name: str, visits: list[Any]) -> float:
    """Return the floating-point operations that a round of these batches must take.

    A frozen weight costs 2 operations a token forward and 2 for the gradient of its input; the
    head only where an answer is predicted; attention 4 t q forward for the t tokens of a sequence
    and twice that backward, half of it masked. Adapters, norms and anything computed again are left
    out: it is the model's work, not the machine's.
    """
    from grandrounds.model.headroom import architecture_of

    base = architecture_of(base_name)
    assert base is not None
    examples = [e for batches in visits for batch in batches for e in batch]
    tokens = sum(len(e.input_ids) for e in examples)
    answers = sum(len(e.input_ids) - e.prompt_tokens for e in examples)
    squares = sum(len(e.input_ids) ** 2 for e in examples)
    heads = base.num_heads * base.head_dim * base.num_layers
    head = base.vocabulary * base.hidden_size
    return 4.0 * (base.linear_parameters * tokens + head * answers) + 6.0 * heads * squares


def product_flops_per_second(dtype: Any, device: Any) -> float:
    """Return the rate of a large matrix product on this device: the best of five."""
    import torch

    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def peaks(config: Any, resident: Any) -> list[dict[str, Any]]:
    """Return measured and planned peaks with the memory there is, ample, half-way and scarce.

    The project decides by its own plan what to checkpoint and to keep: only the free memory that it
    sees is set, to what its plan needs without checkpointing, with it, and the mean of the two.
    """
    from grandrounds.model import headroom

    auto = dataclasses.replace(
        config, model=dataclasses.replace(config.model, gradient_checkpointing="auto")
    )
    ends = [headroom.site_needs(auto, checkpointing=again) for again in (False, True)]
    ample, scarce = (1.001 * end.total / headroom.HEADROOM for end in ends if end is not None)
    own = headroom.free_bytes
    found = [{"memory": "as it is", "free_gib": own() / GIB, **worst_case(auto, resident)}]
    for memory, free in (("ample", ample), ("half", (ample + scarce) / 2), ("scarce", scarce)):
        headroom.decide_again()
        headroom.free_bytes = lambda free=free: int(free)
        try:
            found.append({"memory": memory, "free_gib": free / GIB, **worst_case(auto, resident)})
        finally:
            headroom.free_bytes = own
            headroom.decide_again()
    return found


def worst_case(config: Any, resident: Any) -> dict[str, Any]:
    """Return the peak memory of a step with every example of full length, and what was planned."""
    import torch

    from grandrounds.data.tokenization import TokenizedExample
    from grandrounds.model import headroom, machine
    from grandrounds.model.resident import keep_weights, resident_bytes
    from grandrounds.site import training
    from grandrounds.wire.schedule import VisitSchedule

    again = headroom.checkpoints_activations(config)
    needs = headroom.visit_needs(config)
    assert needs is not None
    batch = [TokenizedExample(tuple([5] * TOKENS), 1)] * BATCH
    schedule, optimizer = VisitSchedule(RATE, 0), config.train.optimizer
    how = training.VisitSettings(1, schedule, optimizer, 0.0, 1.0, 0.01, machine.forward(config), 1)
    parameters = list(resident.parameters.values())

    def step() -> None:
        training.train_visit(resident.model, parameters, [batch], how, 0)

    keep_weights(resident, 0, config.arguments.bf16)  # of an earlier visit
    is_gpu = torch.cuda.is_available()
    held = torch.cuda.memory_allocated() if is_gpu else resident_bytes()
    measured = peak_bytes(lambda: headroom.run_visit(config, resident, step))
    planned_before = needs.base + 4 * sum(p.numel() for p in parameters)
    return {
        "checkpointing": again,
        "kept_layers": headroom.kept_layers(config),
        "measured_gib": (held + measured) / GIB,
        "planned_gib": needs.total / GIB,
        "visit_measured_gib": measured / GIB,
        "visit_planned_gib": (needs.total - planned_before) / GIB,
        "parts_gib": {k: v / GIB for k, v in dataclasses.asdict(needs).items()},
    }


def reset_peak() -> None:
    """Begin to count the peak of the GPU's memory anew."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Return the peak of the GPU's memory; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def held_gib() -> float:
    """Return the GPU's memory that is in use; 0 without one."""
    import torch

    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def parameters_in(base: Path) -> int:
    """Return the number of parameters in a base's files."""
    index = json.loads((base / "model.safetensors.index.json").read_text())
    config = json.loads((base / "config.json").read_text())
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[config["dtype"]]
    return int(index["metadata"]["total_size"]) // width


def saved(result: dict[str, Any], out: Path | None) -> None:
    """Write what was measured so far."""
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


def told(text: str) -> None:
    """Say how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
