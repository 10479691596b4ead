"""What the federation costs: a whole run against a bare PyTorch loop of the same steps.

    python benchmarks/overhead.py [--size 6m|90m] [--rounds 4] [--times 3] [--out FILE]

Both arms are processes of their own, alternated: `grandrounds run` in process, and a loop that
loads the same base with PEFT, reads the same batches ready tokenised from a file (so it spends
nothing on data) and takes the same AdamW steps in the same precision with the same optimisations:
no padding, logits of answers only, products by the library that the run chose. Time is wall-clock
time of the whole process; what is not the rounds or the loop is start-up, shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bare_loops import ALPHA, BATCH, RANK, RATE, STEPS, bare_visit, lean_loss

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "6m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6},
    "90m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
}
"""Llama architectures with random weights, vocabulary 6,144."""

SITES, SEED = 20, 1


def make_base(size: str, folder: Path) -> int:
    """Save a random Llama with the embedded base's tokenizer; return its number of parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from grandrounds.data.formulary import base_path
    from grandrounds.quiet import quiet_libraries

    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(
        vocab_size=6144,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **heads,
        **SIZES[size],
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def settings(base: Path, data: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Return the recipe of the run: 3 of 20 sites a round, 6 steps of 16, as the JSL recipe."""
    return {
        "model.name": str(base),
        "static.dataset.name": str(data),
        "num-server-rounds": rounds,
        "seed": SEED,
        "model.lora.peft-lora-r": RANK,
        "model.lora.peft-lora-alpha": ALPHA,
        "model.lora.target-modules": "q_proj,v_proj",
        "train.learning-rate-max": RATE,
        "train.learning-rate-min": RATE,
        "train.num-threads": threads,
        "train.save-every-round": 4,
        "train.training-arguments.max-steps": STEPS,
        "train.training-arguments.per-device-train-batch-size": BATCH,
        "strategy.fraction-train": 0.15,
        "strategy.fraction-evaluate": 0.0,
        "data.num-partitions": SITES,
        "data.held-out-fraction": 0.0,
    }


def write_batches(flat: dict[str, Any], file: Path) -> int:
    """Write the token ids of every batch of the run, visit by visit; return the tokens."""
    from flwr.app import RecordDict

    from grandrounds.config import recipes
    from grandrounds.site import visit as visits
    from grandrounds.site.local_data import open_site
    from grandrounds.wire import messages
    from grandrounds.wire import schedule as sampling

    config = recipes.resolve(flat)
    visit_batches, cursors = [], dict.fromkeys(range(SITES), 0)
    for number in range(1, config.federation.num_server_rounds + 1):
        for p in sampling.training_cohort(SEED, number, SITES, config.cohort_size, True):
            site = open_site(config.static.name, config.data, config.model.name, 512, SEED, p)
            asked = messages.content(config={"round": number, "cursor": cursors[p]})
            visit = visits.Visit(asked, RecordDict(), config, site)
            batches = visits.next_batches(visit)
            cursors[p] = visit.cursor_after
            visit_batches.append(
                [[[list(e.input_ids), e.prompt_tokens] for e in batch] for batch in batches]
            )
    file.write_text(json.dumps(visit_batches))
    return sum(len(ids) for v in visit_batches for batch in v for ids, _ in batch)


def bare_loop(base: Path, file: Path, threads: int, library: str) -> None:
    """Take the same steps with nothing around them; print seconds of the loop as JSON."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from grandrounds.data.tokenization import TokenizedExample
    from grandrounds.model.loss import Forward, attending
    from grandrounds.model.products import computed_by

    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    visit_batches = json.loads(file.read_text())
    how, device = Forward(False, True, True, 1024), torch.device("cpu")
    started = time.perf_counter()
    with attending(model, how), computed_by(library):
        for visit in visit_batches:
            batches = [[TokenizedExample(tuple(ids), prompt) for ids, prompt in b] for b in visit]
            bare_visit(
                model,
                parameters,
                batches,
                "adamw_torch",
                lambda batch: lean_loss(model, batch, device, how),
            )
    print(json.dumps({"loop_seconds": time.perf_counter() - started}))


def timed(command: list[str]) -> tuple[float, str]:
    """Run a command; return its wall-clock seconds and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def measure(size: str, rounds: int, times: int, threads: int) -> dict[str, Any]:
    """Alternate both arms; return the medians and every single figure."""
    from grandrounds.config.recipes import to_toml
    from grandrounds.data.formulary import facts

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        parameters = make_base(size, work / "base")
        data = work / "cards.jsonl"
        data.write_text("".join(json.dumps(card) + "\n" for card in facts.flashcards()))
        flat = settings(work / "base", data, rounds, threads)
        recipe = work / "recipe.toml"
        recipe.write_text(to_toml(flat))
        tokens = write_batches(flat, work / "batches.json")
        rows = []
        for i in range(times):
            run_dir = work / f"run{i}"
            command = [sys.executable, "-m", "grandrounds", "run", "--plain", "--config"]
            ours, _ = timed([*command, str(recipe), "--run-dir", str(run_dir)])
            summary = json.loads((run_dir / "summary.json").read_text())
            metrics = [json.loads(m) for m in (run_dir / "metrics.jsonl").read_text().splitlines()]
            arm = [
                sys.executable,
                __file__,
                "--bare",
                str(work / "base"),
                str(work / "batches.json"),
            ]
            library = json.loads((run_dir / "sites.json").read_text())[0]["cpu-matmul"]
            bare, output = timed([*arm, "--threads", str(threads), "--products", library])
            rows.append(
                {
                    "products": library,
                    "ours_seconds": ours,
                    "ours_round_seconds": summary["seconds"],
                    "ours_visit_seconds": sum(m.get("visit-seconds", 0.0) for m in metrics),
                    "bare_seconds": bare,
                    "bare_loop_seconds": json.loads(output.splitlines()[-1])["loop_seconds"],
                }
            )
    figures = [name for name in rows[0] if name != "products"]
    medians = {name: statistics.median(row[name] for row in rows) for name in figures}
    ratios = [row["ours_seconds"] / row["bare_seconds"] for row in rows]
    return {
        "size": size,
        "parameters": parameters,
        "rounds": rounds,
        "steps": rounds * 3 * STEPS,
        "tokens": tokens,
        "threads": threads,
        "whole_run_ratio": statistics.median(ratios),
        "whole_run_ratio_range": [min(ratios), max(ratios)],
        "rounds_to_loop_ratio": medians["ours_round_seconds"] / medians["bare_loop_seconds"],
        **medians,
        "single": rows,
    }


def main() -> None:
    """Measure one size; print a table, write JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="6m")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--products", default="default", help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=Path, nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare_loop(*arguments.bare, arguments.threads, arguments.products)
        return
    result = measure(arguments.size, arguments.rounds, arguments.times, arguments.threads)
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['steps']} steps of {BATCH}, "
        f"{result['tokens']:,} tokens, {result['threads']} threads, "
        f"products by {', '.join(sorted({row['products'] for row in result['single']}))}, "
        f"median of {arguments.times} alternated pairs"
    )
    print(f"{'seconds':<28}{'grandrounds run':>16}{'bare loop':>12}{'ratio':>8}")
    for label, ours, bare in (
        ("whole process", "ours_seconds", "bare_seconds"),
        ("rounds / loop", "ours_round_seconds", "bare_loop_seconds"),
    ):
        ratio = result[ours] / result[bare]
        print(f"{label:<28}{result[ours]:>16.2f}{result[bare]:>12.2f}{ratio:>8.3f}")
    start = result["ours_seconds"] - result["ours_round_seconds"]
    bare_start = result["bare_seconds"] - result["bare_loop_seconds"]
    print(f"{'start-up and end':<28}{start:>16.2f}{bare_start:>12.2f}{start / bare_start:>8.3f}")
    print(f"{'visits only':<28}{result['ours_visit_seconds']:>16.2f}")
    low, high = result["whole_run_ratio_range"]
    print(f"whole-run ratio {result['whole_run_ratio']:.3f} (from {low:.3f} to {high:.3f})")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
