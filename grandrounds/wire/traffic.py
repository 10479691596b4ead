"""The planned traffic of a run, exact to the byte if nothing fails.

`adapter` and `codecs` determine the size of each message, and the seed determines who takes part:
the plan is the ledger that the run will have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grandrounds.config.keys import CommunicationConfig, Config
from grandrounds.wire.adapter import Ranks, Shapes, count_parameters, is_magnitude
from grandrounds.wire.codecs import encoded_bytes
from grandrounds.wire.codecs.codec import Codec, codec_named
from grandrounds.wire.ledger import MIB, NPY_HEADER_BYTES, Ledger, Traffic
from grandrounds.wire.masks import packed
from grandrounds.wire.masks.attempt import CONFIRM, KEYS, MASKED, MASKS, RIDES, SHARES, UNMASK
from grandrounds.wire.masks.fixed_point import numbers_of
from grandrounds.wire.schedule import cohorts_of, evaluation_cohort_of

TRAIN_DOWN, TRAIN_UP = "train.down", "train.up"
EVALUATE_DOWN, FORMULARY_DOWN = "evaluate.down", "formulary.down"
PERSONAL_DOWN, SUBGROUPS_DOWN = "personal.down", "subgroups.down"

MAGNITUDES_UP = "magnitudes.up"
"""Kind of message with which a site tells where DoRA's magnitudes start."""

STARTERS = 2
"""Sites that tell it: what a single one told could not be compared."""


@dataclass(frozen=True)
class Message:
    """The size of one message."""

    tensor_bytes: int
    """Bytes of tensor buffers with their npy headers."""
    key_bytes: int
    """Bytes of the tensors' names."""

    def __add__(self, other: Message) -> Message:
        """Return the size of a message with the tensors of both."""
        tensor_bytes = self.tensor_bytes + other.tensor_bytes
        return Message(tensor_bytes, self.key_bytes + other.key_bytes)


EMPTY = Message(0, 0)
"""No tensors: both ends can draw them from the seed."""


@dataclass(frozen=True)
class Plan:
    """The traffic of a run in which nothing fails."""

    adapter_parameters: int
    """Parameters of the adapter."""
    rounds: int
    """Training rounds."""
    ledger: Ledger
    """The run's ledger at its end."""
    down_bytes: tuple[int, ...]
    """Largest message to a training site, for each round."""
    up_bytes: tuple[int, ...]
    """Largest message from a training site, for each round."""
    last_updates_bytes: int
    """All messages from training sites in the last round."""
    is_upper_bound: bool = False
    """Whether entropy coding or pruned ranks may make messages smaller than planned."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole run by FlowerTune's counting rule."""
        return self.ledger.tensor_bytes

    @property
    def total_bytes_with_key_names(self) -> int:
        """The same with the tensors' names."""
        return self.total_bytes + sum(t.key_bytes for t in self.ledger.totals.values())

    @property
    def start_bytes(self) -> int:
        """Messages that tell where DoRA's magnitudes start; 0 without DoRA.

        FlowerTune's template has none: its server loads the base.
        """
        return self.ledger.totals.get(MAGNITUDES_UP, Traffic()).tensor_bytes

    @property
    def bytes_before_last_updates(self) -> int:
        """The total without the last round's client updates: a count that entries published too.

        Nor with what `start_bytes` counts.
        """
        return self.total_bytes - self.start_bytes - self.last_updates_bytes

    @property
    def message_bytes(self) -> int:
        """The largest message of a training round, either way."""
        return max(self.down_bytes + self.up_bytes)

    @property
    def mib_per_round(self) -> float:
        """Mean traffic of a training round with its evaluation, in MiB."""
        return self.total_bytes / self.rounds / MIB

    def differences(self, counted: Ledger) -> dict[str, tuple[int, int]]:
        """Return (planned, counted) bytes of the kinds of message in which a ledger differs."""
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


EXAMINERS = 3
"""Sites that hold the formulary's exam: the median of three is not one site's alone. One is enough
where all sites are one process."""


def plan_config(config: Config, shapes: Shapes, examiners: int = 1) -> Plan:
    """Return the traffic of a configured run.

    The held-out loss is evaluated before the first round and after each. At the end, in float32,
    every site is sent what its personal adapter is made of, and once more for losses by subgroup,
    and the formulary's exam is held. Where a run goes on from a saved adapter, a site's first
    message has that one too, unless it is the same.

    Parameters
    ----------
    shapes
        The adapter's float32 tensors at its configured rank. DoRA's magnitudes travel both ways,
        and before anything else `STARTERS` sites tell where they start.
    examiners
        Sites that hold the exam, if there are as many: 1 in process, else `EXAMINERS`.
    """
    ranks, how, cohort = Ranks.of(config), config.communication, config.cohort_size
    measure = _Measure(ranks, how, shapes)
    down = _Down(how, ranks.strategy.error_feedback, measure)
    ledger = Ledger()
    judges = evaluation_cohort_of(config)
    started = {name: shape for name, shape in shapes.items() if is_magnitude(name)}
    if started and not ranks.continued:
        message = message_of(started, None)
        for _ in range(min(STARTERS, config.data.num_partitions)):
            ledger.add(MAGNITUDES_UP, message.tensor_bytes, message.key_bytes)

    def judge(next_round: int) -> None:
        rank = ranks.begun_with(next_round, cohort)
        for site in judges:
            message = down.message(site, next_round, rank)
            ledger.add(EVALUATE_DOWN, message.tensor_bytes, message.key_bytes)

    judge(1)
    holding = set(judges)  # of the saved adapter from which the run goes on
    largest_down, largest_up = [], []
    sent: list[Message] = []
    cohorts = cohorts_of(config)
    for number, (chosen, following) in enumerate(zip(cohorts, (*cohorts[1:], ()), strict=True), 1):
        begun_with = ranks.begun_with(number, cohort)
        received = [down.message(site, number, ranks.carried(site, begun_with)) for site in chosen]
        if ranks.continued and number > 1:
            start = measure.down(how.downlink_codec, ranks.rank, exact=how.downlink_codec == "none")
            received = [
                message if site in holding else message + start
                for site, message in zip(chosen, received, strict=True)
            ]
        holding.update(chosen)
        if config.is_masked:
            if number == 1:
                exchange(ledger, (KEYS, SHARES), chosen, ())
            exchange(ledger, (CONFIRM, UNMASK), chosen, following)
            received, sent = masked(config, received, measure.values_up(number))
        else:
            sent = [measure.up(number, ranks.carried(site, ranks.rank)) for site in chosen]
        for kind, group in ((TRAIN_DOWN, received), (TRAIN_UP, sent)):
            for message in group:
                ledger.add(kind, message.tensor_bytes, message.key_bytes)
        largest_down.append(max(m.tensor_bytes for m in received))
        largest_up.append(max(m.tensor_bytes for m in sent))
        judge(number + 1)
    in_one = how.downlink_codec == "float32"
    at_the_end = [PERSONAL_DOWN] * config.is_personal
    at_the_end += [SUBGROUPS_DOWN] * bool(config.subgroup_columns)
    for kind in at_the_end:
        rank = ranks.begun_with(len(largest_down) + 1, cohort)
        message = measure.down(how.downlink_codec, rank, exact=not in_one)
        for site in range(config.data.num_partitions):
            both = message
            if ranks.continued and site not in holding:
                both += measure.down(how.downlink_codec, ranks.rank, exact=not in_one)
            ledger.add(kind, both.tensor_bytes, both.key_bytes)
    if config.is_on_formulary and not ranks.stays:  # an exam of a whole adapter
        rank = ranks.begun_with(len(largest_down) + 1, cohort)
        message = measure.down(how.downlink_codec, rank, exact=not in_one)
        for _ in range(min(examiners, config.data.num_partitions)):
            ledger.add(FORMULARY_DOWN, message.tensor_bytes, message.key_bytes)
    return Plan(
        adapter_parameters=count_parameters(shapes),
        rounds=config.federation.num_server_rounds,
        ledger=ledger,
        down_bytes=tuple(largest_down),
        up_bytes=tuple(largest_up),
        last_updates_bytes=sum(message.tensor_bytes for message in sent),
        is_upper_bound=config.strategy.prunes
        or (how.entropy_coding and (how.uplink_codec, how.downlink_codec) != ("none", "none")),
    )


def exchange(
    ledger: Ledger, exchanges: Sequence[str], chosen: Sequence[int], following: Sequence[int]
) -> None:
    """Add the exchanges of a masked sum that carry no adapter to the ledger.

    Parameters
    ----------
    chosen, following
        The cohort, and the one of the next round, whose keys and shares ride on its exchanges. A
        site of the next one only gets a message of its own.
    """
    this, then = packed.sizes(len(chosen)), packed.sizes(len(following))
    for way in ("down", "up"):
        for kind in exchanges:
            part = _bytes_of(getattr(this, way), kind)
            rider = _bytes_of(getattr(then, way), RIDES.get(kind, ""))
            for site in sorted({*chosen, *following}):
                message = part if site in chosen else EMPTY
                message += rider if site in following else EMPTY
                if message.tensor_bytes:
                    ledger.add(f"{MASKS}.{way}", message.tensor_bytes, message.key_bytes)


def _bytes_of(sizes: Mapping[str, int], kind: str) -> Message:
    """Return the size of one part of a message; `keys` is asked without bytes."""
    return Message(sizes[kind] + NPY_HEADER_BYTES, len(kind)) if kind in sizes else EMPTY


def masked(
    config: Config, received: list[Message], values: int
) -> tuple[list[Message], list[Message]]:
    """Return the messages that let sites train under masks, and their masked vectors.

    Parameters
    ----------
    received
        The messages with the adapter, one for each site.
    values : int
        Values of a change.
    """
    count = len(received)
    boxes = packed.sizes(count).down[MASKED] + NPY_HEADER_BYTES
    both = [Message(m.tensor_bytes + boxes, m.key_bytes + len(MASKED)) for m in received]
    numbers = numbers_of(config, config.train.learning_rate_max, count, values, 1)
    vector = Message(numbers.size_bytes + NPY_HEADER_BYTES, len(MASKED))
    return both, [vector] * count


class _Measure:
    """Message sizes, each computed once."""

    def __init__(self, ranks: Ranks, how: CommunicationConfig, shapes: Shapes) -> None:
        self._ranks, self._how, self._shapes = ranks, how, shapes
        self._made: dict[tuple[object, ...], Message] = {}

    def down(self, codec: str, rank: int, *, exact: bool) -> Message:
        """Return the size of a message to a site: float32 tensors if `exact`, else encoded."""
        return self._cached(
            ("down", codec, rank, exact),
            lambda: self._ranks.shapes_down(self._shapes, rank),
            None if exact else codec,
        )

    def up(self, round_number: int, rank: int) -> Message:
        """Return the size of a client update."""
        codec = self._how.uplink_codec
        return self._cached(
            ("up", self._ranks.strategy.trained(round_number), rank),
            lambda: self._ranks.shapes_up(self._shapes, round_number, rank),
            None if codec == "none" else codec,
        )

    def values_up(self, round_number: int) -> int:
        """Return the values of a client update at the adapter's rank."""
        ranks = self._ranks
        return count_parameters(ranks.shapes_up(self._shapes, round_number, ranks.rank))

    def _cached(
        self, key: tuple[object, ...], shapes: Callable[[], Shapes], codec: str | None
    ) -> Message:
        if key not in self._made:
            self._made[key] = message_of(
                shapes(), None if codec is None else codec_named(codec, self._how)
            )
        return self._made[key]


def message_of(tensors: Shapes, codec: Codec | None) -> Message:
    """Return the size of a message: tensors with their names, or one encoded array.

    Parameters
    ----------
    codec
        None: float32 tensors, each with an npy header.
    """
    count = count_parameters(tensors)
    if codec is None:
        keys = sum(len(name.encode()) for name in tensors)
        return Message(4 * count + NPY_HEADER_BYTES * len(tensors), keys)
    return Message(encoded_bytes(codec, count) + NPY_HEADER_BYTES, len(codec.name))


class _Down:
    """Sizes of the messages of `downlink.Sender`, given what each site already holds."""

    def __init__(self, how: CommunicationConfig, sends_changes: bool, measure: _Measure) -> None:
        self._how, self._sends_changes, self._measure = how, sends_changes, measure
        self._holding: set[int] = set()

    def message(self, site: int, round_number: int, rank: int) -> Message:
        """Return the size of the message that gives a site the adapter at the start of a round."""
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
