"""Whether an adapter that a site received can have come out of its run. **A heuristic.**

A server that chooses the adapter chooses what a site's update tells: with A made of slices of the
identity and B = 0, the update of B is a slice of the gradient itself. So a site accepts

- before anything was trained: the run's start, which it draws itself from the seed, or the saved
  adapter whose hash its operator has approved with the recipe;
- afterwards: an adapter that the run can have reached from the start and from what the site
  accepted last, given rank, steps, learning rates, rule and codecs (see `reach`), whose B is not
  zero, and whose A has neither sparse nor nearly parallel rows.

What it cannot see: an adapter that moves slowly towards one that the server chose, within those
bounds. They are tight for the learning rates of real bases (1e-5 to 1e-4) and loose for 3e-3. With
`product` the server recomputes both factors, and only norms and rows are checked; with `flora` a
site trains fresh factors of its own, and only the size of the frozen stack is. A site that joins
late compares with the start alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from grandrounds.config.codecs import CODECS
from grandrounds.config.keys import Config
from grandrounds.config.strategies import STRATEGIES
from grandrounds.errors import PolicyError
from grandrounds.site.custody.reach import Reach
from grandrounds.site.custody.request import TRAINING, Request
from grandrounds.site.custody.saved_start import start_of
from grandrounds.site.visit import MOST_ROUNDS
from grandrounds.wire import downlink, messages
from grandrounds.wire.adapter import (
    A,
    Adapter,
    B,
    Shapes,
    factor_of,
    flatten,
    is_magnitude,
    rank_of,
    shapes_of,
    started_adapter,
    unflatten,
)
from grandrounds.wire.low_rank import cut, modules, truncate
from grandrounds.wire.personal import PERSONAL
from grandrounds.wire.subgroups import SUBGROUPS

SPARSE = 0.05
"""Smallest participation ratio of a row of A, (sum x^2)^2 / (n sum x^4): 1/n for a one-hot row,
0.56 for uniform values, 0.33 for normal ones."""

PARALLEL = 0.005
"""Smallest singular value of A relative to its largest, where A is at most half as high as wide."""

RELATIVE = 2e-3
"""Relative tolerance of comparisons: float32, and the float16 copy of the last adapter."""

ROUNDING = {"bf16": 0.01, "int8": 0.01, "int4": 0.15, "int2": 0.75}
"""Largest rounding error of a codec relative to the largest value of a message."""

_ACCEPTED = "grandrounds-accepted"


class ReceivedAdapter:
    """One received adapter, and what the run and the site's memory say about it."""

    def __init__(
        self,
        adapter: Adapter,
        config: Config,
        shapes: Shapes,
        after_round: int,
        steps: int,
        magnitudes: Adapter | None = None,
    ) -> None:
        """Collect what is compared.

        Parameters
        ----------
        adapter
            The tensors as the site decoded them.
        shapes
            The whole adapter's tensors at the configured rank.
        after_round : int
            Rounds that the adapter has been trained in; 0: untrained.
        steps : int
            Most optimizer steps of a visit at any site.
        magnitudes
            With DoRA, where its magnitudes start on the site's base.
        """
        self.magnitudes = magnitudes or {}
        self.adapter, self.config, self.shapes = adapter, config, shapes
        self.after_round = after_round
        self.reach = Reach(config, steps)
        self.strategy = STRATEGIES[config.strategy.name]

    def check(self, state: RecordDict, saved: Adapter | None = None) -> None:
        """Check the adapter against the run's start and the last accepted one.

        Parameters
        ----------
        saved
            The saved adapter from which the run goes on, whose hash was compared with the recipe's;
            None: it starts from a drawn one.

        Raises
        ------
        PolicyError
            If it is no plausible adapter of the run.
        """
        if self.after_round == 0:
            if saved is None:  # otherwise it is that one, by its hash
                self._check_start()
            return
        of_b = [name for name in self.adapter if name.endswith(B)]  # none where A is shared
        if of_b and not any(self.adapter[name].any() for name in of_b):
            raise PolicyError(self._told("its B is zero, as only the untrained one's is"))
        if not self.strategy.stacks:
            self._check_rows(saved or {})
        if self.strategy.error_feedback:
            self._check_distance(saved or self._start(), 0, "the run's start")
            if (accepted := self._accepted(state)) is not None:
                last, before = accepted
                what = f"the adapter that this site accepted after round {before}"
                self._check_distance(last, before, what)
        else:
            self._check_products(saved)

    def remember(self, state: RecordDict) -> None:
        """Keep the adapter as the last accepted one, where the next is compared with it."""
        if self._compares_with_last():
            vector = np.clip(flatten(self.adapter), -6e4, 6e4).astype(np.float16)
            state[_ACCEPTED] = ArrayRecord({"adapter": Array(vector)})
            state[f"{_ACCEPTED}-round"] = ConfigRecord({"after-round": self.after_round})

    # --- The checks -------------------------------------------------------------------------------

    def _start(self) -> Adapter:
        """Return the adapter with which the run starts.

        Drawn from the seed by everybody, with DoRA beside the norms of the site's base.
        """
        start = started_adapter(self.shapes, self.config.federation.seed, self.magnitudes)
        return {name: start[name] for name in self.adapter}

    def _check_start(self) -> None:
        start, tolerance = self._start(), 0.0
        if not self.strategy.error_feedback:  # the adapter itself is encoded, not a difference
            tolerance = ROUNDING.get(self.config.communication.downlink_codec, 0.0)
        if (rank := rank_of(self.adapter)) != rank_of(start):  # SVD: up to the signs of rows
            lower = cut if self.strategy.cuts else truncate
            start, tolerance = lower(start, rank), tolerance + RELATIVE
        largest = max(float(np.abs(tensor).max()) for tensor in start.values())
        if not all(_is_near(self.adapter[n], start[n], tolerance * largest) for n in start):
            raise PolicyError(
                self._told(f"it is not the start that seed {self.config.federation.seed} gives")
            )

    def _check_rows(self, saved: Adapter) -> None:
        """Check that the rows of each A are neither sparse nor nearly parallel.

        But where those of the saved start are so, which the site's operator has approved.
        """
        for name, tensor in self.adapter.items():
            if factor_of(name) != "A" or not (fault := _fault_of_rows(tensor)):
                continue
            if name not in saved or not _fault_of_rows(saved[name]):
                raise PolicyError(self._told(fault.format(_short(name))))

    def _check_distance(self, other: Adapter, before: int, what: str) -> None:
        """Check that the run can have moved every value from another adapter to this one.

        Parameters
        ----------
        before : int
            Rounds that the other adapter has been trained in. The last of them may have been
            repeated since, by a resume.
        """
        first, last = sorted((before, self.after_round))
        longest = max((float(norms.max()) for norms in self.magnitudes.values()), default=0.0)
        bounds = {
            factor: self.reach.value(factor, last) - self.reach.value(factor, max(0, first - 1))
            for factor in "AB"
        }
        if not CODECS[self.config.communication.downlink_codec].exact:
            bounds = dict.fromkeys(bounds, max(bounds.values()))  # a block may hold both factors
        for factor, bound in bounds.items():
            for name in (name for name in self.adapter if factor_of(name) == factor):
                moved = np.abs(self.adapter[name] - other[name])
                allowed = bound + RELATIVE * np.abs(other[name]) + 1e-7
                if is_magnitude(name):
                    allowed += self.reach.decayed(longest, max(0, first - 1), last)
                if (moved > allowed).any():
                    worst = float((moved - allowed).max()) + bound
                    raise PolicyError(
                        self._told(
                            f"a value of {_short(name)} differs by {worst:.2g} from {what}, and "
                            f"the run can have moved it by {bound:.2g} at most"
                        )
                    )

    def _check_products(self, saved: Adapter | None) -> None:
        """Check the norm of each module's product."""
        rounding = ROUNDING.get(self.config.communication.downlink_codec, 0.0)
        for module in modules(self.adapter):
            a = self.adapter[module + A].astype(np.float64)  # (rank, in-features)
            b = self.adapter[module + B].astype(np.float64)  # (out-features, rank)
            norm = math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))
            shape = self.shapes[module + A]
            began = (saved[module + A], saved[module + B]) if saved else None
            most = self.reach.product(self.after_round, (shape[0], shape[1]), len(b), began)
            noise = rounding * max(float(np.abs(a).max()), float(np.abs(b).max()))
            most += noise * math.sqrt(b.size) * float(np.linalg.norm(a))
            most += noise * math.sqrt(a.size) * float(np.linalg.norm(b))
            if norm > most:
                raise PolicyError(
                    self._told(
                        f"the update of {_short(module)} has a norm of {norm:.2g}, and the run can "
                        f"have reached {most:.2g} at most"
                    )
                )

    # --- The last accepted adapter ----------------------------------------------------------------

    def _compares_with_last(self) -> bool:
        """Whether rule and codecs bound the movement from one adapter to the next.

        Not where a codec may save up a change of many rounds, or the rule recomputes the factors.
        """
        how = self.config.communication
        up = CODECS[how.uplink_codec]
        saves_up = up.coarse or how.uplink_codec == "int2"
        return self.strategy.error_feedback and CODECS[how.downlink_codec].exact and not saves_up

    def _accepted(self, state: RecordDict) -> tuple[Adapter, int] | None:
        """Return the adapter that the site accepted last, and its rounds; None if there is none."""
        records: Mapping[str, ArrayRecord] = state.array_records
        if not self._compares_with_last() or _ACCEPTED not in records:
            return None
        vector = records[_ACCEPTED]["adapter"].numpy().astype(np.float32)
        shapes = shapes_of(self.adapter)
        if vector.size != sum(int(np.prod(shape)) for shape in shapes.values()):
            return None
        number = state.config_records[f"{_ACCEPTED}-round"]["after-round"]
        return unflatten(vector, shapes), int(number)  # type: ignore[arg-type]

    def _told(self, why: str) -> str:
        trained = f"after {self.after_round} rounds" if self.after_round else "before training"
        return (
            f"The adapter that the server sent is not one that this run can have {trained}: {why}. "
            "If the run is honest, start it again from a finished round, with the same version of "
            "grandrounds everywhere."
        )


CHECKED = (*TRAINING, "evaluate", SUBGROUPS, PERSONAL)
"""Kinds of messages whose adapter is checked; the formulary's exam asks nothing about the data."""


def check_received(
    request: Request,
    own: Config,
    shapes: Shapes,
    kept: RecordDict,
    magnitudes: Adapter | None = None,
) -> None:
    """Decode and check the adapter of a message, and keep it as the last accepted one.

    Its norm goes to the audit log, also if it is refused.

    Parameters
    ----------
    shapes
        The whole adapter's tensors at the configured rank.
    kept
        What the site keeps of the run; the adapter is added to it.
    magnitudes
        With DoRA, where its magnitudes start on the site's base.

    Raises
    ------
    ReplyError
        If the adapter cannot be decoded.
    PolicyError
        If it is no plausible adapter of the run.
    """
    if request.kind not in CHECKED:
        return
    number = messages.whole_number(request.instruction, "round", 0, MOST_ROUNDS)
    content, held = request.message.content, RecordDict(dict(kept))
    adapter = downlink.receive(content, held, own, shapes, magnitudes)
    norm = math.sqrt(sum(float(np.vdot(tensor, tensor)) for tensor in adapter.values()))
    request.entry["norm-in"] = norm
    steps = own.arguments.max_steps
    if steps < 1:  # whole epochs, of as many examples as each site has
        steps = request.site.policy.max_steps_per_visit
    rounds = after_round(request.kind, number)
    before = adapter if rounds == 0 else None
    saved = start_of(request.message.content, kept, own, shapes, before)
    received = ReceivedAdapter(adapter, own, shapes, rounds, steps, magnitudes)
    received.check(kept, saved)
    received.remember(kept)


def after_round(kind: str, round_number: int) -> int:
    """Return the rounds that the adapter of a message has been trained in."""
    return round_number - 1 if kind in TRAINING else round_number


def _fault_of_rows(tensor: NDArray[np.float32]) -> str:
    """Return what is wrong with the rows of an A, with a place for its name; empty if nothing."""
    values = tensor.astype(np.float64)  # (rank, in-features)
    squares = (values**2).sum(axis=1)
    fourth = (values**4).sum(axis=1) * values.shape[1]
    ratios = np.divide(squares**2, fourth, out=np.zeros_like(squares), where=fourth > 0)
    if (lowest := float(ratios.min())) < SPARSE:
        return f"a row of {{}} is sparse ({lowest:.2g} of its width)"
    if 2 * values.shape[0] <= values.shape[1]:
        sizes = np.linalg.svd(values @ values.T, compute_uv=False, hermitian=True)
        if sizes[-1] < PARALLEL**2 * sizes[0]:
            return "the rows of {} are nearly parallel"
    return ""


def _is_near(one: NDArray[np.float32], other: NDArray[np.float32], tolerance: float) -> bool:
    """Whether two tensors are equal up to a tolerance, and up to the signs of rows if there is
    one."""
    if tolerance == 0:
        return np.array_equal(one, other)
    near = np.minimum(np.abs(one - other).max(axis=1), np.abs(one + other).max(axis=1))
    return bool((near <= tolerance).all())


def _short(name: str) -> str:
    """Return a tensor's name without PEFT's prefix."""
    return name.removeprefix("base_model.model.").removesuffix(".weight")
