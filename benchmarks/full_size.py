"""A base of full size on one device: whole rounds, a bare loop and the template's way.

    python benchmarks/full_size.py --architecture llama-3-8b --quantization 4 --rounds 3
    python benchmarks/full_size.py --architecture 90m --quantization 0 --rounds 2

The recipe is that of JSL-MedLlama-3-8B: 3 of 20 sites a round, 6 steps of 16, LoRA r = 8 on q_proj
and v_proj, FedProx, at most 512 tokens, examples as long as real ones. Arms, alternated round by
round in this one process on the same base:

    ours      whole rounds of the project: messages, visits, aggregation, run directory
    same      a bare PyTorch loop of the same steps by the same means
    neither   a bare loop with padded batches as drawn and transformers' own loss over all logits
    grouped   `neither`, but batches of similar length
    answers   `neither`, but logits of answers only
    template  FlowerTune's way: base loaded again at each visit, bitsandbytes' defaults where it is
              in 4 bits (FP4; products in float32, or in bfloat16 under autocast), gradient
              checkpointing always, padded batches, all logits

The base has random weights; it is written to disk and loaded by the project's own code. The first
round is start-up and not counted. `--profile` and `--peaks` add a step by kind of work, and peaks
against plans.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bare_loops import (
    ALPHA,
    BARE,
    BATCH,
    RANK,
    RATE,
    STEPS,
    TARGETS,
    TOKENS,
    bare_visit,
    free,
    lean_loss,
    synchronize,
    template_visit,
    whole_loss,
)
from full_size_figures import (
    GIB,
    flops_per_round,
    held_gib,
    parameters_in,
    peak_gib,
    peaks,
    product_flops_per_second,
    reset_peak,
    saved,
    told,
    worst_case,
)
from full_size_table import summary, table
from random_base import SMALL, write_base, write_cards
from step_profile import profiled

SITES, SEED = 20, 1


def settings(base: Path, data: Path, run: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe as a flat configuration."""
    words = {"auto": "auto", "on": True, "off": False}
    return {
        "model.name": str(base),
        "static.dataset.name": str(data),
        "run-directory": str(run),
        "num-server-rounds": given.rounds + 1,
        "seed": SEED,
        "model.quantization": given.quantization,
        "model.gradient-checkpointing": words[given.checkpointing],
        "model.lora.peft-lora-r": RANK,
        "model.lora.peft-lora-alpha": ALPHA,
        "model.lora.target-modules": ",".join(TARGETS),
        "train.learning-rate-max": RATE,
        "train.learning-rate-min": RATE,
        "train.num-threads": given.threads,
        "train.seq-length": TOKENS,
        "train.optimizer": given.optimizer,
        "train.batching": given.batching,
        "train.fused-kernels": given.fused,
        "train.training-arguments.torch-compile": given.compile,
        "train.training-arguments.max-steps": STEPS,
        "train.training-arguments.per-device-train-batch-size": BATCH,
        "train.training-arguments.lr-scheduler-type": "constant_with_warmup",
        "train.training-arguments.warmup-steps": 2,
        "strategy.name": "fedprox",
        "strategy.proximal-mu": 0.01,
        "strategy.fraction-train": 0.15,
        "strategy.cohorts": "uniform",
        "strategy.fraction-evaluate": 0.0,
        "data.num-partitions": SITES,
        "data.held-out-fraction": 0.0,
    }


class Bench:
    """The run in progress, and the same visits for the other arms."""

    def __init__(self, flat: dict[str, Any]) -> None:
        from grandrounds import client_app
        from grandrounds.config import recipes
        from grandrounds.engines.in_process import InProcessGrid
        from grandrounds.server import lifecycle
        from grandrounds.server.listeners import Listener

        self.config = recipes.resolve(flat)
        self.grid = InProcessGrid(client_app.app, self.config.flat(), SITES)
        self.run = lifecycle.begin(self.grid, self.config, Listener())
        lifecycle.open_session(self.run)
        self.cursors = dict.fromkeys(range(SITES), 0)

    def play_round(self) -> dict[str, Any]:
        """Play the next round; return its line of metrics.jsonl."""
        from grandrounds.server import rounds

        rounds.play_round(self.run)
        synchronize()
        return self.run.directory.read_metrics()[-1]

    def visits(self, number: int) -> list[list[list[Any]]]:
        """Return the batches of each visit of a round, as the sites draw them."""
        from flwr.app import RecordDict

        from grandrounds.site import visit as visits
        from grandrounds.site.local_data import open_site
        from grandrounds.wire import messages
        from grandrounds.wire import schedule as sampling

        config, found = self.config, []
        for p in sampling.training_cohort(SEED, number, SITES, config.cohort_size, False):
            site = open_site(config.static.name, config.data, config.model.name, TOKENS, SEED, p)
            asked = messages.content(config={"round": number, "cursor": self.cursors[p]})
            visit = visits.Visit(asked, RecordDict(), config, site)
            found.append(visits.next_batches(visit))
            self.cursors[p] = visit.cursor_after
        return found

    def resident(self) -> Any:
        """Return the model that the run's visits use."""
        from grandrounds.model import machine

        return machine.prepare_model(self.config)

    def means(self) -> str:
        """Return the optimisations in use."""
        from grandrounds.model import machine

        return machine.means(self.config)

    def profile(self, batches: list[Any]) -> dict[str, Any]:
        """Return where the time of one visit goes."""
        from grandrounds.model import headroom, machine
        from grandrounds.site.training import VisitSettings, train_visit
        from grandrounds.wire.schedule import VisitSchedule

        resident, config = self.resident(), self.config
        schedule, forward = VisitSchedule(RATE, 0), machine.forward(config)
        how = VisitSettings(1, schedule, config.train.optimizer, 0.0, 1.0, 0.01, forward, 1)
        parameters = list(resident.parameters.values())

        def visit() -> None:
            train_visit(resident.model, parameters, batches, how, 0)

        return profiled(lambda: headroom.run_visit(config, resident, visit), len(batches))


def bare_round(bench: Bench, arm: str, visits: list[Any]) -> None:
    """Take all steps of a round on the run's own model."""
    import dataclasses

    from grandrounds.model import machine
    from grandrounds.model.loss import attending

    resident, how = bench.resident(), machine.forward(bench.config)
    plain = dataclasses.replace(how, padding_free=False, fused=False)
    means = {
        "same": how,
        "answers": dataclasses.replace(plain, chunk_tokens=0),
    }.get(arm)
    for batches in visits:
        if arm == "grouped":
            examples = sorted((e for b in batches for e in b), key=lambda e: len(e.input_ids))
            batches = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]

        def loss(batch: Any) -> Any:
            if means is None:
                return whole_loss(resident.model, batch, resident.device, how.bf16)
            return lean_loss(resident.model, batch, resident.device, means)

        with attending(resident.model, means or plain):
            parameters = list(resident.parameters.values())
            bare_visit(resident.model, parameters, batches, bench.config.train.optimizer, loss)
    synchronize()


# --- Measuring ------------------------------------------------------------------------------------


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Alternate the arms; return every figure. What fails after the rounds is in `failed`.

    With `--out` the figures so far are on disk after every step, in case there is no next.
    """
    import torch

    from grandrounds.model.base import base_loads, device_and_dtype

    device, dtype = device_and_dtype("auto")
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        work = Path(folder)
        base, written = given.base or work / "base", 0.0
        if given.base is None:
            started = time.perf_counter()
            stored = str(dtype).removeprefix("torch.")
            write_base(given.architecture, base, str(device), stored)
            free()
            written = time.perf_counter() - started
        vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
        write_cards(work / "cards.jsonl", 6_000, vocabulary, given.lengths)
        started = time.perf_counter()
        bench = Bench(settings(base, work / "cards.jsonl", work / "run", given))
        bench.visits(1)
        bench.resident()
        synchronize()
        loaded = time.perf_counter()
        bench.play_round()
        start_up = time.perf_counter() - started
        cuda = device.type == "cuda"
        result: dict[str, Any] = {
            "architecture": given.architecture,
            "parameters": parameters_in(base),
            "quantization": given.quantization,
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {given.threads} threads",
            "torch": torch.__version__,
            "rounds": given.rounds,
            "means": bench.means(),
            "write_seconds": written,
            "load_seconds": loaded - started,
            "start_up_seconds": start_up,
            "product_tflops": product_flops_per_second(dtype, device) / 1e12,
            "template": None,
            "failed": {},
        }
        if given.memory_gib:
            limit_memory(given.memory_gib)
        told(f"loaded in {result['load_seconds']:.1f} s, start-up {start_up:.1f} s")
        arms = [arm for arm in BARE if arm in given.arms]
        visits: list[Any] = []
        for rows, latest in play_rounds(bench, arms, given):
            visits = latest
            result |= {"rows": rows, **summary(rows, arms, None, result["product_tflops"] * 1e12)}
            saved(result, given.out)
            told(f"round {len(rows)}: " + ", ".join(f"{k} {v:.2f}" for k, v in rows[-1].items()))
        result["base_loads"] = base_loads()
        parts: dict[str, Callable[[], Any]] = {
            **({"profile": lambda: bench.profile(visits[0])} if given.profile else {}),
            "template": lambda: template(base, visits, given),
            **({"peaks": lambda: peaks(bench.config, bench.resident())} if given.peaks else {}),
            "memory": lambda: worst_case(bench.config, bench.resident()),
        }
        if "template" not in given.arms:
            del parts["template"]
        if given.peaks:
            del parts["memory"]  # the same step once more
        for name, part in parts.items():
            try:
                result[name] = part()
            except Exception as error:
                traceback.print_exc()
                result["failed"][name] = f"{type(error).__name__}: {error}"
            free()
            saved(result, given.out)
            told(f"{name} done")
        if result["template"]:
            result["template_to_ours"] = result["template"]["seconds"] / result["seconds"]["ours"]
            saved(result, given.out)
    return result


def template(base: Path, visits: list[Any], given: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a round in the template's way, and its peak beside what is resident."""
    free()
    reset_peak()
    held = held_gib()
    started = time.perf_counter()
    for batches in visits[: given.template_visits]:
        template_visit(base, batches, given.quantization, given.optimizer)
    seconds = (time.perf_counter() - started) * 3 / given.template_visits
    return {"seconds": seconds, "peak_gib": peak_gib() - held}


def play_rounds(
    bench: Bench, arms: list[str], given: argparse.Namespace
) -> Iterator[tuple[list[dict[str, Any]], list[Any]]]:
    """Play the rounds, the last ones followed by the other arms.

    Yield a row for each round so far, and the visits of the last one.
    """
    rows: list[dict[str, Any]] = []
    for number in range(2, given.rounds + 2):
        visits = bench.visits(number)
        tokens = sum(len(e.input_ids) for v in visits for b in v for e in b)
        flops = flops_per_round(bench.config.model.name, visits)
        row: dict[str, Any] = {"tokens": tokens, "flops": flops}
        reset_peak()
        line = bench.play_round()
        row["ours"] = line["seconds"]
        row["ours_visits"] = line["visit-seconds"]
        row["ours_peak_gib"] = peak_gib()
        rows.append(row)
        for arm in arms if number > given.rounds + 1 - given.arm_rounds else ():
            started = time.perf_counter()
            bare_round(bench, arm, visits)
            row[arm] = time.perf_counter() - started
        yield rows, visits


def limit_memory(gib: float) -> None:
    """Let this process have so much memory and no more: of the GPU, or else beside what it has."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
        os.environ["GRANDROUNDS_GPU_SHARE"] = str(gib * GIB / total)
        return
    import resource

    import psutil

    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gib * GIB),) * 2)


def main() -> None:
    """Measure one architecture; print a table, write JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = ", ".join(SMALL)
    parser.add_argument("--architecture", default="90m", help=f"{known}, llama-3-8b, or a name")
    parser.add_argument("--quantization", type=int, choices=(0, 4, 8), default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=[*BARE, "template"])
    parser.add_argument("--arm-rounds", type=int, default=99, help="last rounds with bare loops")
    parser.add_argument("--template-visits", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--batching", default="auto")
    parser.add_argument("--optimizer", default="adamw_torch")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fused", choices=("auto", "off"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--lengths", type=Path, help="real question-answer pairs to be as long as")
    parser.add_argument("--memory-gib", type=float, help="have no more memory than this")
    parser.add_argument("--peaks", action="store_true", help="with ample, half and scarce memory")
    parser.add_argument("--profile", action="store_true", help="a step by kind of work")
    parser.add_argument("--scratch", type=Path, help="where the base is written")
    parser.add_argument("--base", type=Path, help="a base that random_base.py wrote")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import torch

    from grandrounds.errors import GrandRoundsError
    from grandrounds.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(given.threads)
    try:
        result = measure(given)
    except GrandRoundsError as error:
        sys.exit(f"full_size: {error}")
    print(table(result))
    if result["failed"]:
        sys.exit(f"full_size: failed: {result['failed']}")


if __name__ == "__main__":
    main()
