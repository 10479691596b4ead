"""Aggregation rules against attacks, one step at a time, on the recorded updates of honest runs.

    python benchmarks/hostile_screen.py FILE.npz [--record] [--hostile 2]

`--record` plays four runs of `hostile.py` under `fedavg` and writes every update to FILE: both
partitions, with nobody hostile and with false labels. Then each rule combines the honest updates of
a round with those of an attack, and the result g is compared with the mean m of the honest ones:

    along   <g, m> / |m|^2                 1: as far as with the hostile sites absent
    across  |g - along * m| / |m|          0: in the same direction

Both are means over the rounds. This is how rules were chosen for whole runs, which cost minutes
where this costs seconds; it does not see what an attack does over several rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from hostile import SCHEDULE, SITES, Cell, HostileGrid, arrays_of, flat, play
from hostile_attacks import ATTACKS, HELD_BACK, Situation
from numpy.typing import NDArray

from grandrounds.quiet import quiet_libraries
from grandrounds.server.aggregation import defence
from grandrounds.server.aggregation.combination import geometric_median, squared_distances
from grandrounds.server.aggregation.nnm import neighbours

Rows = NDArray[np.float64]
Step = Callable[[Rows, int], NDArray[np.float64]]
"""Updates (sites, values), bounded, and the number expected to be hostile → the step."""


def mean(rows: Rows, hostile: int) -> NDArray[np.float64]:
    """The mean."""
    return rows.mean(axis=0)


def median(rows: Rows, hostile: int) -> NDArray[np.float64]:
    """The coordinate-wise median."""
    return np.median(rows, axis=0)  # type: ignore[no-any-return]


def trimmed(rows: Rows, hostile: int) -> NDArray[np.float64]:
    """The coordinate-wise trimmed mean."""
    return np.sort(rows, axis=0)[hostile : len(rows) - hostile].mean(axis=0)  # type: ignore[no-any-return]


def multi_krum(rows: Rows, hostile: int) -> NDArray[np.float64]:
    """Multi-Krum, all but the hostile selected."""
    near = np.sort(squared_distances(rows @ rows.T), axis=1)[:, 1 : len(rows) - hostile - 1]
    return rows[np.argsort(near.sum(axis=1))[: len(rows) - hostile]].mean(axis=0)  # type: ignore[no-any-return]


def rfa(rows: Rows, hostile: int) -> NDArray[np.float64]:
    """The geometric median."""
    return geometric_median(rows @ rows.T, np.full(len(rows), 1 / len(rows))) @ rows


def centred_clipping(rows: Rows, hostile: int) -> NDArray[np.float64]:
    """Five iterations from 0, with the median distance as the radius (Karimireddy et al., 2021)."""
    center = np.zeros(rows.shape[1])
    for _ in range(5):
        away = rows - center
        far = np.linalg.norm(away, axis=1)
        center = center + (away * np.minimum(1, np.median(far) / far)[:, None]).mean(axis=0)
    return center


def bucketing(rows: Rows, hostile: int) -> NDArray[np.float64]:
    """The median of the means of random pairs (Karimireddy et al., 2022)."""
    order = np.random.default_rng(0).permutation(len(rows))
    return median(
        np.stack([rows[order[i : i + 2]].mean(0) for i in range(0, len(rows), 2)]), hostile
    )


def mixing(rows: Rows, hostile: int) -> NDArray[np.float64]:
    """Nearest-neighbour mixing before the geometric median."""
    return rfa(neighbours(rows @ rows.T, hostile) @ rows, hostile)


def mixing_trimmed(rows: Rows, hostile: int) -> NDArray[np.float64]:
    """Nearest-neighbour mixing before the trimmed mean."""
    return trimmed(neighbours(rows @ rows.T, hostile) @ rows, hostile)


def screened(spread: float, cosine: float) -> Step:
    """The mean after the product's screens."""

    def step(rows: Rows, hostile: int) -> NDArray[np.float64]:
        held = {i: {"a": row} for i, row in enumerate(rows)}
        if spread:
            for site in defence.outlying(held, spread):  # type: ignore[arg-type]
                del held[site]
        for site in defence.screen(held, cosine):  # type: ignore[arg-type]
            del held[site]
        return rows[list(held)].mean(axis=0) if held else np.zeros(rows.shape[1])  # type: ignore[no-any-return]

    return step


STEPS: dict[str, Step] = {
    "mean": mean,
    "median": median,
    "trimmed": trimmed,
    "multi-Krum": multi_krum,
    "RFA": rfa,
    "centred clipping": centred_clipping,
    "bucketing, median": bucketing,
    "nnm": mixing,
    "NNM, trimmed": mixing_trimmed,
    "cosine 0": screened(0.0, 0.0),
    "spread 1.3": screened(1.3, -1.0),
    "spread 1.5": screened(1.5, -1.0),
    "robust": screened(1.4, -0.1),
}


class Recorder(HostileGrid):
    """Keeps every update of a run."""

    kept: dict[tuple[int, int], Any]

    def _call(self, message: Message) -> Message:
        reply = super()._call(message)
        if message.metadata.message_type == "train":
            number = int(message.content.config_records["config"]["round"])  # type: ignore[arg-type]
            start = arrays_of(message.content)
            self.kept[number, -1] = flat(start)
            self.kept[number, self._site(message)] = flat(arrays_of(reply.content))
            self.kept[0, 0] = self._module(start)
        return reply


def record(file: Path) -> None:
    """Play the runs, and write starts, updates and the attacked module."""
    out: dict[str, Any] = {}
    for partition in ("natural", "iid"):
        for attack, hostile in (("none", 0), ("labels", 2)):
            Recorder.kept = {}
            play(Cell(partition, "fedavg", attack, hostile, 1), Recorder)
            out["module"] = Recorder.kept[0, 0]
            for number in range(1, SCHEDULE["num-server-rounds"] + 1):
                rows = [Recorder.kept[number, site] for site in range(-1, SITES)]
                out[f"{partition} {attack} {number}"] = np.stack(rows).astype(np.float32)
    np.savez(file, **out)


def situations(found: Any, partition: str, attack: str, hostile: int) -> list[tuple[Rows, int]]:
    """Return the updates of each round, the honest first, and how many these are."""
    rounds = []
    first = found[f"{partition} none 1"][0].astype(float)
    for number in range(1, SCHEDULE["num-server-rounds"] + 1):
        kind = "labels" if attack == "labels" else "none"
        start, *updates = found[f"{partition} {kind} {number}"].astype(float)
        honest = np.stack(updates[: SITES - hostile])
        if attack == "none":
            rounds.append((np.stack(updates), SITES))
        elif attack == "labels":  # recorded with two hostile sites
            rounds.append((np.stack(updates[: SITES - 2] + updates[SITES - hostile :]), SITES - 2))
        else:
            sent = [
                ATTACKS[attack](
                    Situation(
                        own=updates[SITES - hostile + i],
                        honest=honest,
                        progress=start - first,
                        module=found["module"],
                        number=i,
                        seed=100 * number + i,
                    )
                )
                for i in range(hostile)
            ]
            rounds.append((np.vstack([honest, *sent]), SITES - hostile))
    return rounds


def compared(rounds: list[tuple[Rows, int]], step: Step, hostile: int) -> str:
    """Return along and across, means over the rounds."""
    along, across = [], []
    for updates, honest in rounds:
        lengths = np.linalg.norm(updates, axis=1)
        rows = updates * np.minimum(1, 3 * np.median(lengths) / lengths)[:, None]
        target, got = updates[:honest].mean(axis=0), step(rows, hostile)
        part = float(got @ target / (target @ target))
        along.append(part)
        across.append(float(np.linalg.norm(got - part * target) / np.linalg.norm(target)))
    return f"{np.mean(along):.2f}/{np.mean(across):.2f}"


def main() -> None:
    """Record if asked to, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--hostile", type=int, default=2)
    parser.add_argument("--held-back", action="store_true", help=f"also {HELD_BACK}")
    options = parser.parse_args()
    quiet_libraries()
    if options.record:
        record(options.file)
    found = dict(np.load(options.file))
    attacks = ["none", "labels", *(a for a in ATTACKS if a not in ("claims", HELD_BACK))]
    attacks += [HELD_BACK] * options.held_back
    for partition in ("natural", "iid"):
        print(f"\n| {partition} | " + " | ".join(attacks) + " |\n|" + "---|" * (len(attacks) + 1))
        known = {a: situations(found, partition, a, options.hostile) for a in attacks}
        for name, step in STEPS.items():
            row = [compared(known[a], step, options.hostile) for a in attacks]
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
