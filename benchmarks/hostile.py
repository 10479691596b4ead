"""Aggregation rules and defences against hostile sites: k of 7, on facts that the honest know.

    python benchmarks/hostile.py FILE.jsonl [--partitions natural iid] [--settings NAME ...]
        [--attacks NAME ...] [--hostile 0 1 2] [--seeds 1 2 3 4 5]

Seven sites teach the embedded base the facts of seven of the formulary's sites: `natural`, each its
own, or `iid`, the flashcards at random. The runs are the product's own, in process, one thread; the
last k sites are hostile (`hostile_attacks.py`) or, in the row `absent`, send nothing. Measured: the
share of the exam on the honest sites' facts (`iid`: on all) and of public facts that is answered
correctly. Every finished run is a line of FILE, and is not run again; another number of rounds
needs another file. `hostile_table.py` makes the table and the picture of docs/aggregation.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from hostile_attacks import ATTACKS, HELD_BACK, TRAINS, Situation, Vector

from grandrounds import client_app, server_app
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.data.formulary.facts import Question, drugs, flashcards, questions
from grandrounds.data.formulary.vocabulary import TRAINING_WORDINGS, VALUES
from grandrounds.data.tokenization import answer_token_ids, end_token_ids, prompt_token_ids
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.model import machine
from grandrounds.model.resident import set_adapter
from grandrounds.model.scoring import option_log_likelihoods
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.quiet import quiet_libraries
from grandrounds.server import states
from grandrounds.server.directory import RunDirectory
from grandrounds.server.listeners import Listener
from grandrounds.wire.adapter import Adapter

SITES = 7
DRUGS = 3
"""Private drugs of each site that are taught, of five: 9 facts, 45 flashcards."""
PUBLIC_QUESTIONS = 60
NAMES = ("absent", "labels", *(name for name in ATTACKS if name != HELD_BACK))
CLAIM = 2**24
"""Examples that a site with the attack `claims` says it has."""

SCHEDULE: dict[str, Any] = {
    "model.name": "formulary",
    "data.partitioner": "natural",
    "data.partition-by": "site",
    "data.num-partitions": SITES,
    "data.held-out-fraction": 0.0,
    "strategy.fraction-train": 1.0,
    "strategy.fraction-evaluate": 0.0,
    "strategy.proximal-mu": 0.0,
    "model.lora.peft-lora-r": 16,
    "model.lora.peft-lora-alpha": 32,
    "num-server-rounds": 5,
    "train.training-arguments.max-steps": 4,
    "train.training-arguments.per-device-train-batch-size": 12,
    "train.learning-rate-max": 5e-3,
    "train.num-threads": 1,
    "train.save-every-round": 1000,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "fedavg": {"strategy.name": "fedavg"},
    "fedexp": {"strategy.name": "fedexp"},
    "fedavg, cosine 0": {"strategy.name": "fedavg", "defence.min-cosine": 0.0},
    "fedmedian": {"strategy.name": "fedmedian"},
    "fedtrimmedavg": {"strategy.name": "fedtrimmedavg", "strategy.trimmed-share": 0.3},
    "krum": {"strategy.name": "krum", "strategy.num-malicious-nodes": 2},
    "multikrum": {"strategy.name": "multikrum", "strategy.num-malicious-nodes": 2},
    "bulyan": {"strategy.name": "bulyan", "strategy.num-malicious-nodes": 1},
    "geomedian": {"strategy.name": "geomedian"},
    "robust": {"strategy.name": "fedavg", "defence.preset": "robust"},
    "robust, weight 2": {
        "strategy.name": "fedavg",
        "defence.largest-spread": 1.4,
        "defence.min-cosine": -0.1,
    },
    "spread 1.3": {
        "strategy.name": "fedavg",
        "defence.largest-spread": 1.3,
        "defence.min-cosine": -0.1,
    },
    "spread 1.3, nnm": {
        "strategy.name": "nnm",
        "strategy.num-malicious-nodes": 2,
        "defence.largest-spread": 1.3,
        "defence.min-cosine": -0.1,
    },
    "robust, fedexp": {"strategy.name": "fedexp", "defence.preset": "robust"},
    "nnm": {"strategy.name": "nnm", "strategy.num-malicious-nodes": 2},
}
"""Name → what differs from `SCHEDULE`; the product's default limits on norm and weight apply."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    partition: str
    """`natural` or `iid`."""
    setting: str
    """A name of `SETTINGS`."""
    attack: str
    """A name of `ATTACKS`, `labels`, `absent`, or `none`."""
    hostile: int
    """Number of hostile or absent sites."""
    seed: int

    @property
    def bad(self) -> range:
        """The hostile sites."""
        return range(SITES - self.hostile, SITES)


_visits: dict[tuple[Any, ...], RecordDict] = {}
"""Visits of the first round, which all cells of a seed share."""


class HostileGrid(InProcessGrid):
    """The in-process engine with hostile sites, whose turn comes last in a round."""

    def __init__(self, cell: Cell, config: Config) -> None:
        super().__init__(client_app.app, config.flat(), SITES)
        self._cell = cell
        self._honest: dict[int, Vector] = {}
        self._honest_reply: Message | None = None
        self._first: Vector | None = None

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Call the sites one at a time, the honest ones first."""
        waiting = [i for i in message_ids if i in self._pending]
        waiting.sort(key=lambda i: self._site(self._pending[i]))
        return super().pull_messages(waiting)

    @staticmethod
    def _site(message: Message) -> int:
        return message.metadata.dst_node_id - 1

    def _call(self, message: Message) -> Message:
        site, attack = self._site(message), self._cell.attack
        is_hostile = site in self._cell.bad
        if message.metadata.message_type == "query":
            reply = super()._call(message)
            if is_hostile and attack == "claims":
                reply.content.config_records["config"]["train-examples"] = CLAIM
            return reply
        if message.metadata.message_type != "train":
            return super()._call(message)
        if not is_hostile:
            reply = self._visit(message)
            self._honest[site] = flat(arrays_of(reply.content))
            self._honest_reply = reply
            return reply
        if attack == "absent":
            return Message(Error(0, "absent"), reply_to=message)
        if attack == "labels":
            return self._visit(message)
        return self._attacked(message, site)

    def _visit(self, message: Message) -> Message:
        """Return the reply of a site that trains."""
        cell, site = self._cell, self._site(message)
        if message.content.config_records["config"]["round"] != 1:
            return super()._call(message)
        lies = cell.attack == "labels" and site in cell.bad
        key = (cell.partition, cell.seed, site, lies)
        if key not in _visits:
            _visits[key] = super()._call(message).content
        return Message(copy.deepcopy(_visits[key]), reply_to=message)

    def _attacked(self, message: Message, site: int) -> Message:
        """Return the reply of a hostile site."""
        attack, received = self._cell.attack, arrays_of(message.content)
        reply = self._visit(message) if attack in TRAINS else None
        start = flat(received)
        self._first = start if self._first is None else self._first
        number = int(message.content.config_records["config"]["round"])  # type: ignore[arg-type]
        now = Situation(
            own=np.zeros_like(start) if reply is None else flat(arrays_of(reply.content)),
            honest=np.stack([self._honest[p] for p in sorted(self._honest)]),
            progress=start - self._first,
            module=self._module(received),
            number=site - self._cell.bad.start,
            seed=1000 * self._cell.seed + 10 * number + site,
        )
        sent, first = ATTACKS[attack](now), 0
        changed: Adapter = {}
        for name, tensor in received.items():
            part = sent[first : first + tensor.size].reshape(tensor.shape)
            changed[name], first = part.astype(np.float32), first + tensor.size
        told = (reply or self._honest_reply).content.metric_records["metrics"]  # type: ignore[union-attr]
        metrics = MetricRecord(dict(told))
        if attack == "claims":
            metrics["num-examples"] = CLAIM
        arrays = ArrayRecord({n: Array(t) for n, t in changed.items()})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @staticmethod
    def _module(adapter: Adapter) -> Any:
        """Return which values belong to the second layer's down-projection."""
        return np.concatenate(
            [np.full(t.size, "layers.1.mlp.down_proj" in name) for name, t in adapter.items()]
        )


def arrays_of(content: RecordDict) -> Adapter:
    """Return a message's tensors."""
    return {name: array.numpy() for name, array in content.array_records["arrays"].items()}


def flat(adapter: Adapter) -> Vector:
    """Return all values of an adapter in float64."""
    return np.concatenate([t.reshape(-1).astype(np.float64) for t in adapter.values()])


def cards(cell: Cell) -> list[dict[str, Any]]:
    """Return the rows of all sites, with their site; hostile ones with false answers for `labels`.

    All hostile sites give the same false answer to every question about an attribute.
    """
    rows = [dict(row) for row in flashcards() if is_taught(int(row["site"]), str(row["input"]))]
    if cell.partition == "iid":
        order = random.Random(cell.seed).sample(range(len(rows)), len(rows))
        for place, index in enumerate(order):
            rows[index]["site"] = place % SITES
    if cell.attack == "labels":
        lies = {value: VALUES[name][0] for name in TRAINING_WORDINGS for value in VALUES[name]}
        for row in rows:
            if row["site"] in cell.bad:
                row["output"] = lies[str(row["output"])]
    return rows


def is_taught(site: int, question: str) -> bool:
    """Whether a question is about one of the drugs that the sites teach."""
    return any(name in question for name in taught().get(site, ()))


@cache
def taught() -> dict[int, list[str]]:
    """Return site → names of its drugs."""
    names: dict[int, list[str]] = {}
    for drug in drugs():
        if 0 <= drug.site < SITES and len(names.setdefault(drug.site, [])) < DRUGS:
            names[drug.site].append(drug.name)
    return names


def exam(cell: Cell) -> dict[str, list[Question]]:
    """Return the questions: on facts of the honest sites (`iid`: of all sites), and public ones."""
    known = SITES - cell.hostile if cell.partition == "natural" else SITES
    private = [q for q in questions("private") if q.site < known and is_taught(q.site, q.question)]
    return {"private": private, "public": list(questions("public")[:PUBLIC_QUESTIONS])}


def correct_percent(config: Config, adapter: Adapter, asked: list[Question]) -> float:
    """Return the share of questions to whose true option the adapted base gives the most."""
    resident, tokenizer = machine.prepare_model(config), run_tokenizer(config)
    set_adapter(resident, adapter)
    template = config.data.prompt_template
    end = end_token_ids(tokenizer, template)
    prompts = prompt_token_ids(tokenizer, template, [q.question for q in asked])
    options = [
        [[*ids, *end] for ids in answer_token_ids(tokenizer, template, list(q.options))]
        for q in asked
    ]
    scores = option_log_likelihoods(resident.model, prompts, options)
    right = sum(s.index(max(s)) == q.answer_index for s, q in zip(scores, asked, strict=True))
    return 100 * right / len(asked)


def play(cell: Cell, engine: type[HostileGrid] = HostileGrid) -> dict[str, Any]:
    """Run one cell; return what was measured."""
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="grandrounds-hostile-") as folder:
        data = Path(folder, "cards.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in cards(cell)))
        run = Path(folder, "run")
        settings = {**SCHEDULE, **SETTINGS[cell.setting], "static.dataset.name": str(data)}
        config = recipes.resolve({**settings, "seed": cell.seed, "run-directory": str(run)})
        server_app.federate(engine(cell, config), config, Listener())
        records = RunDirectory(run).read_metrics()
        adapter = states.read(states.folders(run)[-1]).adapter
        found = {kind: correct_percent(config, adapter, qs) for kind, qs in exam(cell).items()}
    rounds = [record for record in records if record["round"]]
    rejected = [int(p) for record in rounds for p in record["failed"]]
    return {
        **asdict(cell),
        **{kind: round(percent, 2) for kind, percent in found.items()},
        "rejected-hostile": sum(p in cell.bad for p in rejected),
        "rejected-honest": sum(p not in cell.bad for p in rejected),
        "cpu-seconds": round(time.process_time() - started, 1),
    }


def cells(options: argparse.Namespace) -> list[Cell]:
    """Return the cells of the grid that the options ask for."""
    grid = itertools.product(
        options.seeds, options.partitions, options.hostile, options.attacks, options.settings
    )
    asked = [
        Cell(partition, setting, attack if hostile else "none", hostile, seed)
        for seed, partition, hostile, attack, setting in grid
    ]
    return list(dict.fromkeys(asked))


def done(file: Path) -> dict[Cell, dict[str, Any]]:
    """Return the finished cells of a file."""
    names = Cell.__dataclass_fields__
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [json.loads(line) for line in lines]
    return {Cell(**{name: line[name] for name in names}): line for line in found}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--partitions", nargs="+", default=["natural"], metavar="NAME")
    many: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--settings", choices=list(SETTINGS), default=list(SETTINGS), **many)
    parser.add_argument("--attacks", choices=[*NAMES, HELD_BACK], default=list(NAMES), **many)
    parser.add_argument("--hostile", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=SCHEDULE["num-server-rounds"])
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after these")
    options = parser.parse_args()
    SCHEDULE["num-server-rounds"] = options.rounds
    quiet_libraries()
    ends = time.monotonic() + 60 * options.minutes
    finished = done(options.file)
    for cell in cells(options):
        if cell in finished or time.monotonic() > ends:
            continue
        line = play(cell)
        with options.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
