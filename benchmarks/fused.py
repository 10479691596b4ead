"""Steps with and without fused kernels and kept weights on a 4-bit base; peaks against the plan.

    python benchmarks/fused.py --architecture llama-3-8b
    python benchmarks/fused.py --architecture tiny      (on a CPU: that it runs, not what it gains)

The base has random weights and is made on the device, in NF4. A step is 16 sequences as long as
WikiDoc's, r = 8 on q_proj and v_proj; the second visit of the same shapes is timed. Peaks are of
full batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import random_base
from bare_loops import ALPHA, BATCH, RANK, RATE, STEPS, TARGETS, TOKENS, free, synchronize

GIB = 2**30
PROMPT_TOKENS = 30


def four_bit_base(architecture: str, device: Any) -> Any:
    """Return a base of random weights in NF4 with double quantisation, made on the device."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM

    config = random_base.model_config(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    def drawn(shape: Any) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)

    torch.manual_seed(0)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is not torch.nn.Linear or name == "lm_head":
                continue
            sizes = (module.in_features, module.out_features)
            with torch.device("meta"):
                four = bitsandbytes.nn.Linear4bit(*sizes, False, torch.bfloat16, True, "nf4")
            weight = bitsandbytes.nn.Params4bit(drawn(sizes[::-1]), False, quant_type="nf4")
            four.weight, four.support_avx512bf16_for_cpu = weight.to(device), False
            setattr(parent, name, four)
    for parent in list(model.modules()):
        for name, parameter in list(parent.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                ones = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
                value = ones if parameter.dim() == 1 else drawn(parameter.shape)
                setattr(parent, name, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.config.use_cache = False
    model.is_loaded_in_4bit = model.is_quantized = True
    return model.requires_grad_(False)


def batches(vocabulary: int, *, full: bool = False) -> list[list[Any]]:
    """Return a visit's batches: of WikiDoc's lengths, or two of full length."""
    from grandrounds.data.tokenization import TokenizedExample

    draw = random.Random(7)

    def example() -> Any:
        tokens, prompt = TOKENS, 1
        if not full:
            question, answer = (
                random_base._quantile(q, draw.random()) / random_base.CHARACTERS_PER_TOKEN
                for q in (random_base.QUESTION_CHARACTERS, random_base.ANSWER_CHARACTERS)
            )
            prompt = PROMPT_TOKENS + round(question)
            tokens = min(TOKENS, prompt + 1 + round(answer))
        ids = tuple(draw.randrange(3, vocabulary) for _ in range(tokens))
        return TokenizedExample(ids, min(prompt, tokens - 1))

    return [[example() for _ in range(BATCH)] for _ in range(2 if full else STEPS)]


class Bench:
    """A base with a random adapter, and its visits."""

    def __init__(self, architecture: str) -> None:
        import torch

        from grandrounds.model import fused
        from grandrounds.model.lora import LoraSpec, adapter_parameters, add_lora
        from grandrounds.model.resident import Resident

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lora = LoraSpec(RANK, float(ALPHA), ",".join(TARGETS), 0.0)
        model = add_lora(four_bit_base(architecture, device), lora, architecture)
        self.resident = Resident(None, lora, model, adapter_parameters(model))  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in self.resident.parameters.items():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.01)
        fused.keep_weights(model, 1, bf16=True)  # proves
        found = fused.of_model(model)
        assert found is not None
        self.fused, self.proved = found, found.proved

    @contextmanager
    def arranged(self, pieces: tuple[str, ...], one_call: bool, kept: int) -> Iterator[None]:
        """Compute by these pieces and this way of attention within the context."""
        from grandrounds.model import attention, fused

        own = attention.PATHS
        attention.PATHS = own if one_call else own[-1:]
        attention._paths.clear()
        self.fused.proved = pieces
        fused.keep_weights(self.resident.model, kept, bf16=True)
        try:
            yield
        finally:
            attention.PATHS = own
            self.fused.proved = self.proved

    def visit(self, data: list[Any], is_fused: bool) -> float:
        """Train on the batches; return the seconds of a step. The adapter is put back."""
        import torch

        from grandrounds.model.loss import Forward
        from grandrounds.site.training import VisitSettings, train_visit
        from grandrounds.wire.schedule import VisitSchedule

        parameters = list(self.resident.parameters.values())
        before = [p.detach().clone() for p in parameters]
        forward = Forward(True, True, True, 1024, fused=is_fused)
        how = VisitSettings(
            1, VisitSchedule(RATE, 0), "adamw_torch", 0.0, 1.0, 0.01, forward=forward, seed=1
        )
        synchronize()
        started = time.perf_counter()
        train_visit(self.resident.model, parameters, data, how, 0)
        synchronize()
        seconds = (time.perf_counter() - started) / len(data)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        return seconds


def steps(bench: Bench) -> list[dict[str, Any]]:
    """Return milliseconds, kernels and the GPU's share of a step by each way."""
    import torch

    base = bench.resident.model.get_base_model()
    layers, data = len(base.model.layers), batches(base.config.vocab_size)
    every = bench.proved
    rows = []
    for name, pieces, one_call, kept in (
        ("as before", (), False, 0),
        ("attention in one call", (), True, 0),
        ("and fused kernels", every, True, 0),
        ("and kept weights", every, True, layers),
    ):
        with bench.arranged(pieces, one_call, kept):
            bench.visit(data, bool(pieces))
            seconds = bench.visit(data, bool(pieces))
            row: dict[str, Any] = {"arm": name, "ms": 1000 * seconds}
            if torch.cuda.is_available():
                kernels = [torch.profiler.ProfilerActivity.CUDA]
                with torch.profiler.profile(activities=kernels, acc_events=True) as run:
                    bench.visit(data[:1], bool(pieces))
                spent = [e.device_time for e in run.events() if "CUDA" in str(e.device_type)]
                row |= {"launches": len(spent), "busy_ms": sum(spent) / 1000}
        rows.append(row)
    return rows


def peaks(bench: Bench) -> list[dict[str, Any]]:
    """Return measured and planned GiB of full batches at both ends of checkpointing, and half."""
    from peak_memory import peak_bytes

    from grandrounds.config import recipes
    from grandrounds.model.architectures import from_config
    from grandrounds.model.memory import Precision, site_memory
    from grandrounds.model.resident import checkpoint_activations

    base = bench.resident.model.get_base_model()
    layers, data = len(base.model.layers), batches(base.config.vocab_size, full=True)
    flat = {
        "model.quantization": 4,
        "model.lora.peft-lora-r": RANK,
        "strategy.name": "fedprox",
        "strategy.proximal-mu": 0.01,
        "train.seq-length": TOKENS,
        "train.training-arguments.per-device-train-batch-size": BATCH,
    }
    config, shapes = recipes.resolve(flat), from_config("base", base.config.to_dict(), "base")
    rows = []
    every = bench.proved
    ways = [(p, m, 0) for p in (every, ()) for m in (layers, layers // 2, 0)]
    for pieces, again, kept in (*ways, (every, 0, layers)):
        checkpoint_activations(bench.resident, again)
        with bench.arranged(pieces, True, 0):
            bench.visit(data[:1], bool(pieces))
        with bench.arranged(pieces, True, kept):
            free()
            held = _held_bytes()
            measured = held + peak_bytes(lambda p=pieces: bench.visit(data, bool(p)))
        precision = Precision(4, 2, True, True, frozenset(pieces))
        needs = site_memory(
            config, shapes, TARGETS, precision, checkpointing=again, kept_layers=kept
        )
        row = {"fused": bool(pieces), "checkpointed": again, "kept": kept}
        planned = dataclasses.replace(needs, cuda_context=0).total
        rows.append({**row, "measured_gib": measured / GIB, "planned_gib": planned / GIB})
    checkpoint_activations(bench.resident, False)
    return rows


def _held_bytes() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def main() -> None:
    """Measure; print both tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architecture", default="llama-3-8b")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import torch

    bench = Bench(given.architecture)
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "proved": bench.proved,
        "errors": bench.fused.errors,
        "steps": steps(bench),
        "peaks": peaks(bench),
    }
    print(f"{found['device']}, torch {torch.__version__}; proved: {', '.join(bench.proved)}")
    for piece, errors in bench.fused.errors.items():
        print(f"{piece:24}", *(f"{name} {error:.3e} " for name, error in errors.items()))
    for row in [*found["steps"], *found["peaks"]]:
        told = (f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  ".join(told))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
