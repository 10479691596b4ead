"""LoRA adapters as float32 tensors under PEFT's names, and the ranks at which they travel.

With DoRA (Liu et al., 2024, equation 5) each module has a vector of magnitudes beside A and B. They
start as the norms of the base's weights, so nothing can draw them from a seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.keys import Config
from grandrounds.config.strategies import STRATEGIES, Strategy
from grandrounds.wire.schedule import adapter_generator

Adapter = Mapping[str, NDArray[np.float32]]
"""Name, such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, to tensor:
(rank, in-features) for A, (out-features, rank) for B, (out-features,) for DoRA's magnitudes."""

Shapes = Mapping[str, tuple[int, ...]]
"""Name → shape of each tensor."""

A, B = ".lora_A.weight", ".lora_B.weight"
"""Suffixes of the two factors' names."""

MAGNITUDE = ".lora_magnitude_vector"
"""Suffix of the names of DoRA's magnitudes."""

EVERYTHING = slice(None)


# --- Tensors --------------------------------------------------------------------------------------


def factor_of(name: str) -> str:
    """Return the LoRA factor to which a tensor belongs: `A` or `B`.

    DoRA's magnitudes have one value per output, as B has a row, and go where B goes.
    """
    return "A" if ".lora_A." in name else "B"


def is_magnitude(name: str) -> bool:
    """Whether a tensor is a vector of DoRA's magnitudes, which has no ranks."""
    return name.endswith(MAGNITUDE)


def magnitudes_of(adapter: Adapter) -> Adapter:
    """Return DoRA's magnitudes of an adapter; none without DoRA."""
    return {name: tensor for name, tensor in adapter.items() if is_magnitude(name)}


def of_factors(shapes: Shapes, factors: str) -> Shapes:
    """Return the tensors of the factors `A`, `B` or both (`AB`)."""
    return {name: shape for name, shape in shapes.items() if factor_of(name) in factors}


def at_rank(shapes: Shapes, rank: int) -> Shapes:
    """Return the shapes of the same tensors at another rank; magnitudes have none."""

    def of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if is_magnitude(name):
            return shape
        return (rank, *shape[1:]) if factor_of(name) == "A" else (*shape[:-1], rank)

    return {name: of(name, shape) for name, shape in shapes.items()}


def shapes_of(adapter: Adapter) -> Shapes:
    """Return the shapes of an adapter's tensors."""
    return {name: tensor.shape for name, tensor in adapter.items()}


def rank_of(adapter: Adapter) -> int:
    """Return the rank of an adapter, that of its first module."""
    name, tensor = next(item for item in adapter.items() if not is_magnitude(item[0]))
    return int(tensor.shape[0] if factor_of(name) == "A" else tensor.shape[-1])


def kept_ranks(rank: int, decay: float) -> int:
    """Return how many of its ranks a site keeps if it prunes: the share, rounded down, at least 1.

    (HetLoRA: Cho et al., 2024.)
    """
    return max(1, int(decay * rank))


def count_parameters(shapes: Shapes) -> int:
    """Return the number of parameters in tensors of these shapes."""
    return sum(int(np.prod(shape)) for shape in shapes.values())


def flatten(tensors: Adapter) -> NDArray[np.float32]:
    """Concatenate all tensors into one vector, in the order of the mapping."""
    if not tensors:
        return np.zeros(0, dtype=np.float32)
    return np.concatenate([tensor.ravel() for tensor in tensors.values()])


def unflatten(vector: NDArray[np.float32], shapes: Shapes) -> Adapter:
    """Return the tensors that `flatten` concatenated, as views of the vector."""
    tensors, start = {}, 0
    for name, shape in shapes.items():
        stop = start + int(np.prod(shape))
        tensors[name] = vector[start:stop].reshape(shape)
        start = stop
    return tensors


def rank_index(name: str, ranks: slice) -> tuple[slice, ...]:
    """Return the index that selects ranks of a tensor: rows of A, columns of B, all magnitudes."""
    if is_magnitude(name):
        return (EVERYTHING,)
    return (ranks,) if factor_of(name) == "A" else (EVERYTHING, ranks)


def assemble(shapes: Shapes, *parts: tuple[Adapter, int]) -> Adapter:
    """Place each part at its first rank in tensors of these shapes; the rest is zero.

    Parameters
    ----------
    parts : (adapter, first rank)
        Later parts overwrite earlier ones. A part need not have every tensor.
    """
    if len(parts) == 1 and shapes_of(parts[0][0]) == dict(shapes):
        return parts[0][0]
    assembled = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    for adapter, first in parts:
        for name, tensor in adapter.items():
            held = len(tensor) if factor_of(name) == "A" else tensor.shape[-1]
            ranks = slice(first, first + held)
            assembled[name][rank_index(name, ranks)] = tensor
    return assembled


def trained_part(change: Adapter, factors: str, ranks: slice) -> Adapter:
    """Return the trained part of a change, which is what a site sends."""
    return {
        name: np.ascontiguousarray(tensor[rank_index(name, ranks)])
        for name, tensor in change.items()
        if factor_of(name) in factors
    }


def adapter_sha256(adapter: Adapter) -> str:
    """Return the SHA-256 of an adapter, whatever file and number format it was read from.

    Of each tensor, in the order of their names: name, shape and float32 values in little-endian
    order, each preceded by its length in bytes.
    """
    found = hashlib.sha256()
    for name in sorted(adapter):
        values = np.ascontiguousarray(adapter[name], dtype="<f4")
        for part in (name.encode(), repr(values.shape).encode(), values.tobytes()):
            found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


# --- Fresh adapters -------------------------------------------------------------------------------


def initial_adapter(shapes: Shapes, generator: np.random.Generator) -> Adapter:
    """Return a fresh adapter: A uniform in ±1/sqrt(fan-in), B zero, so the base is unchanged.

    PEFT's initialisation (Kaiming uniform with a = sqrt(5); Hu et al., LoRA (2021), section 4.1,
    use a Gaussian for A), drawn without a base model. DoRA's magnitudes are left out.
    """
    adapter = {}
    for name, shape in shapes.items():
        if is_magnitude(name):
            continue
        if ".lora_A." in name:
            bound = 1.0 / np.sqrt(shape[1])
            adapter[name] = generator.uniform(-bound, bound, shape).astype(np.float32)
        else:
            adapter[name] = np.zeros(shape, dtype=np.float32)
    return adapter


def drawn_adapter(shapes: Shapes, seed: int, *round_number: int) -> Adapter:
    """Draw the factors of a run's initial adapter, or a round's fresh ones, as every site does."""
    return _drawn(tuple(shapes.items()), seed, *round_number)


def started_adapter(shapes: Shapes, seed: int, magnitudes: Adapter) -> Adapter:
    """Return the initial adapter of a run: drawn factors, and with DoRA the magnitudes' start."""
    start = {**drawn_adapter(shapes, seed), **magnitudes}
    return {name: start[name] for name in shapes if name in start}


@lru_cache(maxsize=2)
def _drawn(shapes: tuple[tuple[str, tuple[int, ...]], ...], *numbers: int) -> Adapter:
    drawn = initial_adapter(dict(shapes), adapter_generator(*numbers))
    for tensor in drawn.values():
        tensor.setflags(write=False)
    return drawn


# --- Ranks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The ranks of adapters on the base model, in training and in messages.

    Most strategies train the whole resident adapter; `ffa` and `rolora` train one factor. A site
    with a lower rank uses the first ranks and leaves the others at zero. A stacking strategy
    (`flora`) freezes the received stack in the first ranks and trains a fresh adapter in the last:

        ranks        0 ... stack      ... max_rank      max_rank ... max_rank + rank
        holds        received         zeros             fresh: A from seed and round, B zero

    All methods take the shapes of the whole adapter at its configured rank.
    """

    strategy: Strategy
    """What the strategy requires of the sites."""
    rank: int
    """The configured rank, `model.lora.peft-lora-r`."""
    max_rank: int = 0
    """Maximum rank of the stack, for a stacking strategy."""
    site_ranks: tuple[int, ...] = ()
    """Training ranks of sites 0, 1, 2, ..., cycled; empty: the configured rank at every site."""
    by_module: bool = False
    """Whether modules have ranks of their own (`model.lora.rank-pattern`). An adapter then has
    them everywhere: no rule that stacks, and no ranks of sites."""
    continued: bool = False
    """Whether training goes on from a saved adapter, whose A no site can draw."""
    stays: str = ""
    """Factors that a site trains beside those that it sends, and keeps: `B` where A is shared."""
    has_private: bool = False
    """Whether a site trains a private adapter beside the shared one, in the last ranks."""

    @classmethod
    def of(cls, config: Config) -> Ranks:
        """Return the ranks of a configured run."""
        strategy = STRATEGIES[config.strategy.name]
        lora, continued = config.lora, config.lora.is_continued
        if continued:
            strategy = replace(strategy, sends="AB")
        stays, name = "", config.personalisation.name
        if name == "shared-a":
            # FedSA-LoRA (Guo et al., 2024): both factors are trained, only A travels.
            strategy = replace(strategy, odd="A", even="A", sends="A", mean_of_factors=False)
            stays = "B"
        rank, by_module = lora.peft_lora_r, bool(lora.rank_pattern)
        mixed = config.max_rank, config.site_ranks
        return cls(strategy, rank, *mixed, by_module, continued, stays, name == "dual")

    def of_adapter(self, adapter: Adapter) -> int:
        """Return the rank of an adapter of the run; the configured one if its modules differ."""
        return self.rank if self.by_module else rank_of(adapter)

    def configured(self, shapes: Shapes) -> Shapes:
        """Return the shapes of the adapter on the base at its configured rank."""
        return self._at(shapes, self.rank)

    def _at(self, shapes: Shapes, rank: int) -> Shapes:
        return shapes if self.by_module else at_rank(shapes, rank)

    @property
    def resident(self) -> int:
        """Rank of the adapter on the base model."""
        if self.has_private:
            return 2 * self.rank
        return self.max_rank + self.rank if self.strategy.stacks else self.rank

    @property
    def highest_sent(self) -> int:
        """Highest rank at which the server sends the adapter."""
        return self.max_rank if self.strategy.stacks else self.rank

    @property
    def private(self) -> slice:
        """Which ranks of the resident adapter are private; none but with a private adapter."""
        return slice(self.rank, self.resident) if self.has_private else slice(0, 0)

    def sent(self, site: int, received: int = 0) -> slice:
        """Return which ranks of the resident adapter a site sends: what it trains, if not less."""
        return slice(0, self.rank) if self.has_private else self.trained(site, received)

    def trained_factors(self, round_number: int) -> str:
        """Return the factors that a site trains in a round, those that stay there included."""
        return self.strategy.trained(round_number) + self.stays

    def turns(self, round_number: int) -> tuple[str, ...]:
        """Return the factors that the steps of a visit train, step by step in turn."""
        return ("B", "A") if self.strategy.in_turn else (self.trained_factors(round_number),)

    def trained(self, site: int, received: int = 0) -> slice:
        """Return which ranks of the resident adapter a site trains.

        Parameters
        ----------
        received : int
            The rank that it was sent, if that may be lower than its own; 0: its own.
        """
        if self.strategy.stacks:
            return slice(self.max_rank, self.max_rank + self.rank)
        rank = self.carried(site, self.rank)
        rank = min(rank, received or rank)
        return EVERYTHING if rank == self.rank else slice(0, rank)

    def carried(self, site: int, whole: int) -> int:
        """Return the rank at which a training site receives an adapter of rank `whole`."""
        return self.site_ranks[site % len(self.site_ranks)] if self.site_ranks else whole

    def begun_with(self, round_number: int, cohort: int) -> int:
        """Return the adapter's rank at the start of a round, if every earlier update arrived.

        The untrained adapter has the training rank. Its B is zero, so the first stack consists of
        the cohort's adapters alone; every round adds as many ranks, up to `max_rank`. A saved
        adapter, from which training goes on, is the bottom of the stack.
        """
        if not self.strategy.stacks or round_number <= 1:
            return self.rank
        return min(self.max_rank, (self.continued + (round_number - 1) * cohort) * self.rank)

    def shapes_down(self, shapes: Shapes, rank: int) -> Shapes:
        """Return the shapes of the tensors that a site receives at this rank."""
        return self._at(of_factors(shapes, self.strategy.sends), rank)

    def shapes_up(self, shapes: Shapes, round_number: int, rank: int) -> Shapes:
        """Return the shapes of the tensors that a site training at this rank sends back."""
        return self._at(of_factors(shapes, self.strategy.trained(round_number)), rank)

    def start_of(self, received: Adapter, shapes: Shapes, seed: int, round_number: int) -> Adapter:
        """Return the tensors that a site's change is relative to, at its training rank."""
        if self.strategy.stacks:
            return drawn_adapter(shapes, seed, round_number)
        return received

    def on_base(
        self, received: Adapter, shapes: Shapes, seed: int, trains_in: int | None
    ) -> Adapter:
        """Return the resident adapter for a received one, without what a site keeps of its own.

        Parameters
        ----------
        trains_in : int or None
            The round, if the site trains; None if it only evaluates.
        """
        parts = [(received, 0)]
        if self.strategy.stacks and trains_in is not None:
            parts.append((drawn_adapter(shapes, seed, trains_in), self.max_rank))
        elif len(received) < len(shapes):
            parts.insert(0, (drawn_adapter(shapes, seed), 0))
        return assemble(self._at(shapes, self.resident), *parts)
