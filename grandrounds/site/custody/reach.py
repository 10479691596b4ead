"""How far an honest run can have moved its adapter: upper bounds from the run's configuration.

In one visit AdamW moves a value by at most lr * sum_t s_t, where s_t bounds |m_t| / sqrt(v_t) at
step t. With m_t = sum_i w_i g_i and v_t = sum_i u_i g_i^2 (bias-corrected weights, each summing to
1), Cauchy-Schwarz gives s_t = sqrt(sum_i w_i^2 / u_i): 1 at the first step, 2.2 at step 100.
The aggregation rule then moves the server's value by no more than it moves the longest of its
updates, times what the rule multiplies it by. Codecs add their rounding errors, which error
feedback repeats later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from grandrounds.config.codecs import CODECS
from grandrounds.config.keys import Config
from grandrounds.config.strategies import STRATEGIES
from grandrounds.wire.schedule import round_learning_rate_of

MARGIN = 1.5
"""Factor on every bound: 8-bit optimizer states, float32, dropped or late sites."""

ROUGH = 2.0
"""Factor for a lossy codec, per direction: a decoded value may be as large as its block's largest,
and an error that is fed back moves the value again."""

COARSE = 3.0
"""The same for codecs of at most 2 bits a value and for topk, which can save up a whole run's
change of a value and send it at once."""

ORTHONORMAL = 1.0
"""Largest singular value of an A with orthonormal rows, which `fedsvd` makes."""

_BETA_1, _BETA_2 = 0.9, 0.999
_MOST_STEPS = 2000
"""Steps for which the bound is computed; longer visits are extrapolated by its limit, 3.2."""


@lru_cache(maxsize=32)
def adamw_reach(steps: int) -> float:
    """Return the bound of a value's movement in a visit of so many steps, in learning rates."""
    counted = min(steps, _MOST_STEPS)
    limit = (1 - _BETA_1) / math.sqrt(1 - _BETA_2)
    if counted < 1:
        return 0.0
    age = np.arange(counted, dtype=np.float64)  # steps since gradient i
    ratio = (1 - _BETA_1) ** 2 * _BETA_1 ** (2 * age) / ((1 - _BETA_2) * _BETA_2**age)
    number = age + 1
    corrected = (1 - _BETA_2**number) / (1 - _BETA_1**number) ** 2
    per_step = np.sqrt(np.cumsum(ratio) * corrected)
    return float(per_step.sum()) + limit * (steps - counted)


@dataclass(frozen=True)
class Reach:
    """Bounds of what an honest run has done to an adapter after so many rounds."""

    config: Config
    """The run's configuration, as the site uses it."""
    steps: int
    """Most optimizer steps of a visit, at any site."""

    @property
    def stretch(self) -> float:
        """Factor of codecs and margin."""
        how = self.config.communication
        factors = (_roughness(how.uplink_codec), _roughness(how.downlink_codec))
        return MARGIN * math.prod(factors)

    def visit(self, round_number: int) -> float:
        """Return how far a visit of this round can move a value of a factor that it trains."""
        rate = round_learning_rate_of(self.config, round_number)
        decay = self.config.arguments.weight_decay * self.steps  # of values of at most 1
        return rate * (adamw_reach(self.steps) + decay)

    def value(self, factor: str, after_round: int) -> float:
        """Return how far a value of a factor can lie from the run's start after a round.

        Parameters
        ----------
        factor : str
            `A` or `B`; counted are the rounds that train it.
        after_round : int
            0: the start itself.
        """
        strategy, rule = STRATEGIES[self.config.strategy.name], self.config.strategy
        moved, velocity = 0.0, 0.0
        for number in range(1, after_round + 1):
            step = self.visit(number) if factor in strategy.trained(number) else 0.0
            if rule.outer_nesterov and step:
                velocity = rule.server_momentum * velocity + step
                step = rule.server_step * (step + rule.server_momentum * velocity)
            elif rule.name == "fedavgm":
                velocity = rule.server_momentum * velocity + step
                step = rule.server_step * velocity
            elif rule.server_step and step:
                step = self._adaptive(step)
            elif rule.name == "fedexp":
                step *= max(1, self.config.cohort_size)
            moved += step
        return moved * self.stretch

    def decayed(self, largest: float, after_first: int, after_last: int) -> float:
        """Return what weight decay takes of a value between two rounds beyond what `visit` counts.

        That counts it for values of at most 1; DoRA's magnitudes are norms, and may be larger.
        """
        share = self.config.arguments.weight_decay * self.steps * self.stretch
        rounds = range(after_first + 1, after_last + 1)
        rates = sum(round_learning_rate_of(self.config, number) for number in rounds)
        return rates * share * max(0.0, largest - 1) * max(1, self.config.cohort_size)

    def _adaptive(self, step: float) -> float:
        """Return the bound of eta m / (sqrt(v) + tau): by v, or by tau where changes are small."""
        rule = self.config.strategy
        by_moment = 2 * max(1.0, (1 - rule.beta_1) / math.sqrt(1 - rule.beta_2))
        by_tau = 2 * step / rule.tau
        return rule.server_step * min(by_moment, by_tau)

    def product(
        self,
        after_round: int,
        shape_a: tuple[int, int],
        rows_b: int,
        saved: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> float:
        """Return the largest Frobenius norm of B A in a module after a round.

        For rules that recompute the factors in every round, so that single values say little.

        Parameters
        ----------
        shape_a : (rank, in-features)
        rows_b : int
            Out-features.
        saved : (A, B), optional
            Factors of the saved adapter from which the run goes on; None: it drew its own.
        """
        if saved is not None:
            return self._product_from(after_round, *saved)
        rank, width = shape_a
        norm = 0.0
        for number in range(1, after_round + 1):
            moved_a = self.visit(number) * math.sqrt(rank * width)
            moved_b = self.visit(number) * math.sqrt(rank * rows_b)
            norm_a = math.sqrt(rank / 3)  # uniform in 1 / sqrt(in-features)
            norm += moved_b * (max(ORTHONORMAL, norm_a) + moved_a) + norm / norm_a * moved_a
        return norm * self.stretch

    def _product_from(
        self, after_round: int, a: NDArray[np.float32], b: NDArray[np.float32]
    ) -> float:
        """Return the same where the factors were trained before.

        B is as large as it was and what its visits add, or as the product asks for beside an A
        whose rows are orthogonal and which the rule keeps near the one before.
        """
        norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        norm = float(np.linalg.norm(b.astype(np.float64) @ a.astype(np.float64)))
        for number in range(1, after_round + 1):
            moved_a = self.visit(number) * math.sqrt(a.size)
            moved_b = self.visit(number) * math.sqrt(b.size)
            norm += moved_b * (max(ORTHONORMAL, norm_a) + moved_a) + norm_b * moved_a
            norm_b = max(norm_b + moved_b, norm * math.sqrt(len(a)) / norm_a)
        return norm * self.stretch


def _roughness(codec: str) -> float:
    kind = CODECS[codec]
    if kind.exact:
        return 1.0
    return COARSE if kind.coarse or codec == "int2" else ROUGH
