"""What a run will send, known before it starts: to the byte, if nothing fails.

What travels in a message is said by `protocol` and `codecs`; who takes part follows from the seed.
So the plan is the ledger of a run that has not happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from grandrounds.config.keys import CommunicationConfig, Config, share_of
from grandrounds.config.strategies import STRATEGIES
from grandrounds.data.formulary import FORMULARY
from grandrounds.wire import protocol
from grandrounds.wire import schedule as sampling
from grandrounds.wire.adapter import Shapes
from grandrounds.wire.codecs import Codec, encoded_bytes
from grandrounds.wire.ledger import MIB, NPY_HEADER_BYTES, Ledger, Traffic

TRAIN_DOWN, TRAIN_UP = "train.down", "train.up"
EVALUATE_DOWN, FORMULARY_DOWN = "evaluate.down", "formulary.down"

PLAIN = CommunicationConfig("none", "none", "complete", "none", 64, 1.0, False)
"""Everything travels as float32 tensors."""

MAGNITUDE = ".lora_magnitude_vector"
"""How the names of DoRA's magnitudes end."""


@dataclass(frozen=True)
class Message:
    """The tensors of one message."""

    tensor_bytes: int
    """Bytes of tensor buffers with their npy headers."""
    key_bytes: int
    """Bytes of the tensors' names."""


EMPTY = Message(0, 0)
"""Nothing travels: both ends can draw it from the seed."""


@dataclass(frozen=True)
class Plan:
    """The traffic of a run in which nothing fails."""

    adapter_parameters: int
    """Numbers in the adapter."""
    rounds: int
    """Rounds of training."""
    ledger: Ledger
    """What the run's ledger will hold at its end."""
    down_bytes: tuple[int, ...]
    """Largest message of each round to a site that trains."""
    up_bytes: tuple[int, ...]
    """Largest message of each round from a site that trained."""
    is_upper_bound: bool = False
    """Whether entropy coding may make messages smaller than planned."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run by FlowerTune's counting rule."""
        return self.ledger.tensor_bytes

    @property
    def total_bytes_with_key_names(self) -> int:
        """The same with the tensors' names."""
        return self.total_bytes + sum(t.key_bytes for t in self.ledger.totals.values())

    @property
    def message_bytes(self) -> int:
        """The largest message of a training round, either way."""
        return max(self.down_bytes + self.up_bytes)

    @property
    def mib_per_round(self) -> float:
        """MiB of one training round with its evaluation, in the mean."""
        return self.total_bytes / self.rounds / MIB

    def differences(self, counted: Ledger) -> dict[str, tuple[int, int]]:
        """Return (planned, counted) bytes of every kind in which a run's ledger differs."""
        kinds = sorted({*self.ledger.totals, *counted.totals})
        nothing = Traffic()
        pairs = {
            kind: (
                self.ledger.totals.get(kind, nothing).tensor_bytes,
                counted.totals.get(kind, nothing).tensor_bytes,
            )
            for kind in kinds
        }
        return {kind: pair for kind, pair in pairs.items() if pair[0] != pair[1]}

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON and for display."""
        return {
            "adapter-parameters": self.adapter_parameters,
            "message-mib": self.message_bytes / MIB,
            "message-down-mib": max(self.down_bytes) / MIB,
            "message-up-mib": max(self.up_bytes) / MIB,
            "mib-per-round": self.mib_per_round,
            "total-mib": self.total_bytes / MIB,
            "total-mib-with-key-names": self.total_bytes_with_key_names / MIB,
            "total-bytes": self.total_bytes,
            "upper-bound": self.is_upper_bound,
            "totals": {kind: asdict(t) for kind, t in sorted(self.ledger.totals.items())},
        }


def plan_config(config: Config, shapes: Shapes) -> Plan:
    """Return the traffic of a configured run.

    Parameters
    ----------
    shapes
        The adapter's float32 tensors at its configured rank.
    """
    return plan_run(
        shapes,
        rounds=config.federation.num_server_rounds,
        cohort=config.cohort_size,
        evaluation_cohort=share_of(config.strategy.fraction_evaluate, config.data.num_partitions),
        formulary=config.static.name == FORMULARY,
        rule=config.strategy.name,
        how=config.communication,
        seed=config.federation.seed,
        num_partitions=config.data.num_partitions,
        balanced=config.strategy.cohorts == "balanced",
        max_rank=config.max_rank,
        site_ranks=config.site_ranks,
    )


def plan_run(
    shapes: Shapes,
    *,
    rounds: int,
    cohort: int,
    evaluation_cohort: int,
    formulary: bool,
    rule: str = "fedavg",
    how: CommunicationConfig = PLAIN,
    seed: int = 0,
    num_partitions: int | None = None,
    balanced: bool = False,
    max_rank: int = 0,
    site_ranks: Sequence[int] = (),
) -> Plan:
    """Return the traffic of a run.

    Parameters
    ----------
    shapes
        The adapter's float32 tensors at its configured rank. DoRA's magnitudes travel both ways.
    cohort, evaluation_cohort : int
        Sites that train, and that answer held-out loss, in a round. Held-out loss is also asked
        once before the first round.
    formulary : bool
        Whether the formulary's questions are asked at the end, of one site and in float32.
    rule : str
        A value of `strategy.name`.
    how
        How adapters are encoded.
    seed, num_partitions, balanced
        Decide who takes part, which matters where sites differ in rank, or in what they hold; no
        number: as many sites as are asked.
    max_rank : int
        Highest rank of `flora`'s stack.
    site_ranks
        Ranks of the sites, repeated; empty: the adapter's.
    """
    sites = num_partitions or max(cohort, evaluation_cohort)
    rank = protocol.rank_of(shapes)
    measure = _Measure(rule, shapes, how)
    down = _Down(how, STRATEGIES[rule].error_feedback, measure)
    ledger = Ledger()
    judges = sampling.evaluation_cohort(seed, sites, evaluation_cohort)

    def own_rank(round_number: int) -> int:
        if rule != "flora":
            return rank
        return protocol.stacked_rank(rank, max_rank, cohort, round_number)

    def judge(round_number: int) -> None:
        for site in judges:
            _count(ledger, EVALUATE_DOWN, down.message(site, round_number, own_rank(round_number)))

    judge(1)
    largest_down, largest_up = [], []
    for number, chosen in enumerate(cohorts(seed, rounds, sites, cohort, balanced), 1):
        received, sent = [], []
        for site in chosen:
            trained = protocol.site_rank(site_ranks, site, rank)
            carried = own_rank(number) if rule == "flora" else trained
            received.append(down.message(site, number, carried))
            sent.append(measure.up(number, trained))
        for message in received:
            _count(ledger, TRAIN_DOWN, message)
        for message in sent:
            _count(ledger, TRAIN_UP, message)
        largest_down.append(max(m.tensor_bytes for m in received))
        largest_up.append(max(m.tensor_bytes for m in sent))
        judge(number + 1)
    if formulary:
        in_one = how.downlink_codec == "float32"
        message = measure.down(how.downlink_codec, own_rank(rounds + 1), exact=not in_one)
        _count(ledger, FORMULARY_DOWN, message)
    return Plan(
        adapter_parameters=protocol.count(shapes),
        rounds=rounds,
        ledger=ledger,
        down_bytes=tuple(largest_down),
        up_bytes=tuple(largest_up),
        is_upper_bound=how.entropy_coding
        and (how.uplink_codec, how.downlink_codec) != ("none", "none"),
    )


@lru_cache(maxsize=8)
def cohorts(
    seed: int, rounds: int, num_partitions: int, size: int, balanced: bool
) -> tuple[tuple[int, ...], ...]:
    """Return who trains in each round."""
    if balanced:
        drawn = sampling.balanced_cohorts(seed, num_partitions, size)
        return tuple(tuple(next(drawn)) for _ in range(rounds))
    return tuple(
        tuple(sampling.training_cohort(seed, number, num_partitions, size, False))
        for number in range(1, rounds + 1)
    )


def _count(ledger: Ledger, kind: str, message: Message) -> None:
    """Add one message to a ledger; one without tensors adds nothing, as in a run."""
    if not message.tensor_bytes:
        return
    traffic = ledger.totals.setdefault(kind, Traffic())
    traffic.messages += 1
    traffic.tensor_bytes += message.tensor_bytes
    traffic.key_bytes += message.key_bytes


class _Measure:
    """The sizes of messages, each worked out once."""

    def __init__(self, rule: str, shapes: Shapes, how: CommunicationConfig) -> None:
        self._rule, self._how = rule, how
        self._magnitudes = {n: s for n, s in shapes.items() if n.endswith(MAGNITUDE)}
        self._factors = {n: s for n, s in shapes.items() if n not in self._magnitudes}
        self._made: dict[tuple[object, ...], Message] = {}

    def down(self, codec: str, rank: int, *, exact: bool) -> Message:
        """Return a message to a site: float32 tensors if `exact`, else encoded."""
        return self._cached(
            ("down", codec, rank, exact),
            lambda: protocol.shapes_down(self._rule, self._factors, rank),
            None if exact else codec,
        )

    def up(self, round_number: int, rank: int) -> Message:
        """Return a site's reply."""
        codec = self._how.uplink_codec
        return self._cached(
            ("up", STRATEGIES[self._rule].trained(round_number), rank),
            lambda: protocol.shapes_up(self._rule, self._factors, round_number, rank),
            None if codec == "none" else codec,
        )

    def _cached(
        self, key: tuple[object, ...], shapes: Callable[[], Shapes], codec: str | None
    ) -> Message:
        if key not in self._made:
            tensors = {**shapes(), **self._magnitudes}
            self._made[key] = message_of(tensors, None if codec is None else self._codec(codec))
        return self._made[key]

    def _codec(self, name: str) -> Codec:
        how = self._how
        return Codec(name, how.block_size, how.kept_share, how.entropy_coding)


def message_of(tensors: Shapes, codec: Codec | None) -> Message:
    """Return the size of a message: tensors with their names, or one encoded array.

    Parameters
    ----------
    codec
        None: float32 tensors, each with an npy header.
    """
    count = protocol.count(tensors)
    if codec is None:
        keys = sum(len(name.encode()) for name in tensors)
        return Message(4 * count + NPY_HEADER_BYTES * len(tensors), keys)
    return Message(encoded_bytes(codec, count) + NPY_HEADER_BYTES, len(codec.name))


class _Down:
    """What each site is sent, from what it holds already: the sizes of `downlink.Sender`."""

    def __init__(self, how: CommunicationConfig, sends_changes: bool, measure: _Measure) -> None:
        self._how, self._sends_changes, self._measure = how, sends_changes, measure
        self._holding: set[int] = set()

    def message(self, site: int, round_number: int, rank: int) -> Message:
        """Return the message that gives a site the adapter with which a round begins."""
        incremental = self._how.downlink == "incremental"
        codec = self._how.downlink_codec
        if incremental and site not in self._holding:
            codec = self._how.catch_up_codec
            self._holding.add(site)
        if codec == "none" and not incremental:
            return self._measure.down(codec, rank, exact=True)
        if self._sends_changes and round_number == 1 and codec != "float32":
            return EMPTY  # the untrained adapter, which every site draws from the seed
        return self._measure.down(codec, rank, exact=False)
