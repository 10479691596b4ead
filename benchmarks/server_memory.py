"""Peak memory of the server for replies of a full-size adapter: does it grow with the cohort?

    python benchmarks/server_memory.py [--replies 3 64] [--out FILE]

Each cohort is one round in a process of its own, through the project's own round code and the
in-process engine; the sites answer random changes and hold no model. The adapter is that of
Llama-3-8B with r = 8 on q_proj and v_proj: 13 MiB of float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 2**20


def llama_3_8b_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of the adapter: 32 layers, hidden 4096, 8 key-value heads of 128."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(32):
        for module, outputs in (("q_proj", 4096), ("v_proj", 1024)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            shapes[f"{stem}.lora_A.weight"] = (8, 4096)
            shapes[f"{stem}.lora_B.weight"] = (outputs, 8)
    return shapes


def one_round(replies: int) -> dict[str, float]:
    """Play one round with this many replies; return peak memory in MiB before and after it."""
    import numpy as np
    from flwr.app import Context, Message

    from grandrounds.config.recipes import resolve
    from grandrounds.engines.in_process import InProcessGrid
    from grandrounds.model.lora import LoraSpec
    from grandrounds.model.targets import Targets
    from grandrounds.server import rounds
    from grandrounds.server.aggregation.make import filled_in, make_rule
    from grandrounds.server.exchange import Exchange
    from grandrounds.server.listeners import Listener
    from grandrounds.server.roll_call import Roster, SiteCard
    from grandrounds.server.run import Run, State
    from grandrounds.wire import messages
    from grandrounds.wire.adapter import Ranks
    from grandrounds.wire.downlink import Sender

    config = resolve({})

    shapes = llama_3_8b_shapes()
    generator = np.random.default_rng(0)

    def client_app(message: Message, context: Context) -> Message:
        change = {n: generator.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
        metrics = {**dict.fromkeys(messages.TRAIN_METRICS, 1), "num-examples": 1700}
        return Message(
            messages.content(arrays=messages.to_arrays(change), metrics=metrics), reply_to=message
        )

    grid = InProcessGrid(client_app, {}, replies)
    facts = {"train-examples": 1700, messages.THREADS: 1}
    cards = {p: SiteCard(p + 1, facts) for p in range(replies)}
    adapter = {n: np.zeros(s, dtype=np.float32) for n, s in shapes.items()}
    before = peak_mib()
    state = State(0, adapter, "0")
    nothing: Any = None  # a round reads neither plan nor run directory
    run = Run(
        config=config,
        directory=nothing,
        is_new=True,
        plan=nothing,
        lora=LoraSpec(8, 32.0, "q_proj,v_proj", 0.0),
        targets=Targets(("q_proj", "v_proj")),
        state=state,
        rule=make_rule(filled_in(config)),
        sender=Sender(Ranks.of(config), config.communication, adapter, 0),
        exchange=Exchange(grid, state.ledger, state.run, 600.0),
        roster=Roster(replies, cards=cards),
        listener=Listener(),
        evaluation_cohort=[],
    )
    rounds.train(run, rounds.Round(1, 1e-3, list(cards), {}, True, 0.0, 0.0))
    adapter_mib = sum(a.nbytes for a in adapter.values()) / MIB
    return {
        "replies": replies,
        "adapter_mib": adapter_mib,
        "before_mib": before,
        "peak_mib": peak_mib(),
        "round_in_adapters": (peak_mib() - before) / adapter_mib,
    }


def peak_mib() -> float:
    """Return the highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure each cohort in a fresh process; print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--replies", type=int, nargs="+", default=[3, 64])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(one_round(arguments.child)))
        return
    rows = []
    for replies in arguments.replies:
        command = [sys.executable, __file__, "--child", str(replies)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    print(f"{'replies':>8} {'peak MiB':>10} {'round, in adapters':>20}")
    for row in rows:
        print(f"{row['replies']:>8} {row['peak_mib']:>10.1f} {row['round_in_adapters']:>20.2f}")
    growth = (rows[-1]["peak_mib"] - rows[0]["peak_mib"]) / rows[0]["adapter_mib"]
    print(
        f"{rows[-1]['replies']} replies take {growth:.2f} adapters of {rows[0]['adapter_mib']:.1f} "
        f"MiB more than {rows[0]['replies']}"
    )
    if arguments.out:
        result = {"rows": rows, "growth_in_adapters": growth}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
