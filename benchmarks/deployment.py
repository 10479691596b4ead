"""Rounds on Flower's deployment engine: real processes on this machine, with agents and without.

    python benchmarks/deployment.py --architecture 90m --sites 3 --rounds 4
    python benchmarks/deployment.py --masks --rounds 11

A SuperLink with TLS and node keys, a SuperNode for each site, and the same short run twice: each
site with its agent, then each visit in the process that Flower starts for it. What a round takes
beyond the visit is told apart by what the processes print, each line timed as it comes:

    polling    from the end of the round before to the SuperNode's question for messages, and from
               the reply that is sent last to the end of the round
    transfer   from `Receiving` to `Received`, and from `Sending` to `Sent`
    start      Flower's process for the message, from its start until its reply is with the
               SuperNode, less the visit; without an agent torch is imported here too, and the base
               is loaded within the visit

With --masks the same run twice with agents, plain and under masks: what a masked round takes beyond
a plain one.

All sites share this machine's cores, so that visits take longer than on machines of their own. The
first round is start-up and not counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_base import SMALL, write_base, write_cards

from grandrounds.site.custody import audit
from tests.real import Consortium
from tests.runs import Settings, metrics_of, summary_of

FOLLOW_SECONDS = 0.01
PARTS = ("polling", "transfer", "start")


@dataclass
class Follower:
    """Notes when each line of some logs was written."""

    logs: list[Path]
    lines: list[tuple[float, str, str]] = field(default_factory=list)
    """Seconds, name of the log, line."""

    def __enter__(self) -> Follower:
        """Begin."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, once everything written is read."""
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        read: dict[Path, int] = {}
        while True:
            last = self._ended.is_set()
            for log in self.logs:
                if not log.exists() or log.stat().st_size == read.get(log, 0):
                    continue
                with log.open("rb") as file:
                    file.seek(read.get(log, 0))
                    new = file.read()
                whole = new[: new.rfind(b"\n") + 1]
                read[log] = read.get(log, 0) + len(whole)
                now = time.monotonic()
                text = re.sub(r"\x1b\[[0-9;]*m", "", whole.decode(errors="replace"))
                self.lines += [(now, log.stem, line) for line in text.splitlines()]
            if last:
                return
            time.sleep(FOLLOW_SECONDS)

    def times(self, log: str, words: str) -> list[float]:
        """Return when a log said words, in order."""
        return [t for t, name, line in self.lines if name == log and words in line]


def parts_of(seen: Follower, sites: int, number: int, visits: dict[int, float]) -> dict[str, float]:
    """Return the seconds of a round, and what of them is no visit, on the way of its last reply.

    Parameters
    ----------
    visits
        Site → seconds of its visit.
    """
    begin, end = (seen.times("run", f"round {n}/")[0] for n in (number - 1, number))
    ways = []
    for site in range(sites):
        log = f"node{site}"
        # By number: a SuperNode may ask before the run has told that the round before has ended.
        receiving = seen.times(log, "Receiving: train")[number - 1]
        received = min(t for t in seen.times(log, "Received successfully") if t >= receiving)
        sending = seen.times(log, "Sending: train")[number - 1]
        sent = min(t for t in seen.times(log, "Sent successfully") if t >= sending)
        ways.append((sent, receiving, received, sending, site))
    sent, receiving, received, sending, site = max(ways)
    return {
        "round": end - begin,
        "polling": (receiving - begin) + (end - sent),
        "transfer": (received - receiving) + (sent - sending),
        "start": (sending - received) - visits[site],
        "visit": visits[site],
    }


def play_masked(folder: Path, settings: Settings, rounds: int) -> dict[str, Any]:
    """Play a plain and a masked run with the same agents; return the seconds of their rounds."""
    of_policy = {"policy__max_examples_per_visit": 10**6, "policy__max_runs_per_day": 2}
    kinds = {"plain": {}, "masked": {"secure-aggregation": "masked32", "defence.largest-norm": 0.0}}
    found: dict[str, Any] = {}
    with Consortium(folder, settings, secure__min_cohort=3, **of_policy) as consortium:
        consortium.share_roster()
        consortium.start_all()
        for kind, changes in kinds.items():
            process = consortium.begin_run(folder / kind, rounds, **changes)
            if consortium.finished(process, 3600) != 0:
                sys.exit(f"deployment: the run failed:\n{consortium.log(kind)[-3000:]}")
            lines = metrics_of(folder / kind)[2:]  # after start and the first round
            found[kind] = [line["train-seconds"] for line in lines]
            summary = summary_of(folder / kind)
            assert summary["communication_mib"] == summary["planned_mib"]
    exchanges = [line["masked-sum"]["exchanges"] for line in lines]
    return {**found, "exchanges": exchanges}


def play(folder: Path, settings: Settings, rounds: int, *, agents: bool) -> dict[str, Any]:
    """Play a run of one kind; return what was counted and timed."""
    with Consortium(folder, settings, policy__max_examples_per_visit=10**6) as consortium:
        consortium.start_all(agents=agents)
        run = folder / "run"
        parts = timed_run(consortium, run, rounds)[1:]  # the first round is start-up
    lines, summary = metrics_of(run), summary_of(run)
    return {
        "seconds": {name: statistics.median(p[name] for p in parts) for name in parts[0]},
        "rounds": parts,
        "base_loads": summary["base_loads"],
        "visits": sum(len(line["good"]) for line in lines[1:]),
        "message_mib": summary["communication_mib"] / max(1, 2 * len(consortium.sites) * rounds),
    }


def timed_run(consortium: Consortium, run: Path, rounds: int) -> list[dict[str, float]]:
    """Play the first run of a started consortium; return the parts of each of its rounds.

    Parameters
    ----------
    run : Path
        Run directory, called `run`.
    """
    sites = len(consortium.sites)
    names = ["run", *(f"node{i}" for i in range(sites))]
    with Follower([consortium.folder / f"{name}.log" for name in names]) as seen:
        code = consortium.finished(consortium.begin_run(run, rounds), 3600)
    if code != 0:
        sys.exit(f"deployment: the run failed:\n{consortium.log('run')[-3000:]}")
    numbers = range(1, rounds + 1)
    return [parts_of(seen, sites, n, visit_seconds(consortium, n)) for n in numbers]


def visit_seconds(consortium: Consortium, number: int) -> dict[int, float]:
    """Return the seconds of each site's visit in a round, as its audit log has them."""
    return {
        i: entry["seconds"]
        for i, site in enumerate(consortium.sites)
        for entry in audit.read(site.place(site.agent.state))
        if entry["asked"] == "train" and entry["round"] == number
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Play both kinds of run on one base and return their figures."""
    with tempfile.TemporaryDirectory(prefix="deployment-") as scratch:
        place = Path(scratch)
        vocabulary = SMALL[given.architecture].get("vocab_size", 32_000)
        parameters = write_base(given.architecture, place / "base", "cpu", "float32")
        write_cards(place / "cards.jsonl", 100 * given.sites, vocabulary)
        settings: Settings = {
            "model.name": str(place / "base"),
            "model.quantization": 0,
            "model.lora.peft-lora-r": 8,
            "model.lora.target-modules": "q_proj,v_proj",
            "static.dataset.name": str(place / "cards.jsonl"),
            "data.num-partitions": given.sites,
            "data.held-out-fraction": 0.05,
            "strategy.fraction-train": 1.0,
            "strategy.fraction-evaluate": 0.0,
            "train.training-arguments.max-steps": given.steps,
            "train.training-arguments.per-device-train-batch-size": given.batch,
            "train.num-threads": 1,
            "train.save-every-round": 1000,
            "seed": 42,
        }
        kinds: dict[str, Any] = (
            {"masks": play_masked(place / "masks", settings, given.rounds)} if given.masks else {}
        )
        kinds = kinds or {
            kind: play(place / kind, settings, given.rounds, agents=kind == "agents")
            for kind in ("agents", "alone")
        }
    return {
        "architecture": given.architecture,
        "parameters": parameters,
        "sites": given.sites,
        "rounds": given.rounds - 1,
        "steps": given.steps,
        "batch": given.batch,
        "cores": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        **kinds,
    }


def masked_table(r: dict[str, Any]) -> str:
    """Return the seconds of plain and masked rounds, in lines."""
    plain, masked = (statistics.median(r["masks"][kind]) for kind in ("plain", "masked"))
    return "\n".join(
        [
            f"{r['architecture']}, {r['parameters'] / 1e6:,.1f} M parameters, {r['sites']} sites "
            f"with agents on {r['cores']} cores; medians of {r['rounds']} rounds after the first",
            f"{'a plain round, s':<34}{plain:>10.2f}",
            f"{'a masked round, s':<34}{masked:>10.2f}",
            f"{'beyond a plain one, s':<34}{masked - plain:>10.2f}",
            f"{'exchanges a masked round':<34}{statistics.median(r['masks']['exchanges']):>10.0f}",
        ]
    )


def table(r: dict[str, Any]) -> str:
    """Return the result in lines."""
    lines = [
        f"{r['architecture']}, {r['parameters'] / 1e6:,.1f} M parameters, {r['sites']} sites on "
        f"{r['cores']} cores, {r['steps']} steps of {r['batch']}, a message of "
        f"{r['agents']['message_mib']:.2f} MiB; median of {r['rounds']} rounds",
        f"{'seconds':<34}{'with agents':>14}{'without':>14}",
    ]
    labels = {
        "round": "a round",
        "visit": "  the visit of its last reply",
        "polling": "  polling",
        "transfer": "  transfer",
        "start": "  process start and hand-over",
    }
    for name, label in labels.items():
        with_agents, alone = (r[kind]["seconds"][name] for kind in ("agents", "alone"))
        lines.append(f"{label:<34}{with_agents:>14.2f}{alone:>14.2f}")
    loads = [f"{r[kind]['base_loads']}" for kind in ("agents", "alone")]
    lines.append(f"{'base loads in the whole run':<34}{loads[0]:>14}{loads[1]:>14}")
    return "\n".join(lines)


def main() -> None:
    """Measure; print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architecture", default="90m", choices=SMALL)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4, help="at least 2; the first is start-up")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--masks", action="store_true", help="plain and masked rounds, with agents")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds must be 2 or more")
    result = measure(given)
    print(masked_table(result) if given.masks else table(result))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
