"""The aggregation rules by name, and what each requires of sites and server: one line per rule.

The rules themselves are in `grandrounds/server/aggregation/<name>.py`; this table holds what
planning, server and sites must agree on without loading them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """What a rule requires of the sites, and of the server's memory."""

    odd: str = "AB"
    """Factors trained and sent to the server in rounds 1, 3, 5, ..."""
    even: str = "AB"
    """The same for rounds 2, 4, 6, ..."""
    sends: str = "AB"
    """Factors sent to the sites."""
    keeps_replies: bool = False
    """Whether the server holds all updates of a round, so that its memory grows with the cohort."""
    mean_of_factors: bool = False
    """Whether A and B are averaged separately, which has an aggregation error to measure."""
    error_feedback: bool = True
    """Whether sites can feed compression error back at their next visit; not if the server
    recomputes the factors in every round."""
    stacks: bool = False
    """Whether the sites' adapters are stacked: each is trained afresh beside the frozen stack, so
    that the rank grows from round to round."""
    mixed_ranks: bool = False
    """Whether sites may train at a lower rank than the adapter's."""
    in_turn: bool = False
    """Whether a visit trains B and A in turn, B in its first step."""
    outer: bool = False
    """Whether the mean can be followed with Nesterov's momentum (`outer-nesterov`)."""
    cuts: bool = False
    """Whether a site of a lower rank receives the first ranks, not the strongest directions."""
    by_norm: bool = False
    """Whether updates weigh by the norms of the sites' models, not by numbers of examples."""
    keys: tuple[str, ...] = ()
    """Keys of `strategy.` that are specific to this rule."""

    @property
    def averages_tensors(self) -> bool:
        """Whether each tensor is averaged by itself in every round, as DoRA's magnitudes need."""
        return self.odd == self.even == self.sends == "AB" and self.error_feedback

    def trained(self, round_number: int) -> str:
        """Return the factors trained in a round: `A`, `B` or `AB`."""
        return self.odd if round_number % 2 else self.even


PRESETS: dict[str, dict[str, float]] = {
    "robust": {
        "strategy.largest-weight": 1.0,
        "defence.largest-spread": 1.4,
        "defence.min-cosine": -0.1,
    },
}
"""Value of `defence.preset` → the keys that it sets."""

PERSONALISATIONS = ("none", "local-tail", "interpolate", "shared-a", "dual")
"""Values of `personalisation.name`."""

OUTER_KEYS = ("server-learning-rate", "server-momentum")
"""Keys of `strategy.` that `outer-nesterov` reads."""

_ADAPTIVE = ("server-learning-rate", "beta-1", "beta-2", "tau")

STRATEGIES: dict[str, Strategy] = {
    "fedavg": Strategy(mean_of_factors=True, outer=True),
    "fedprox": Strategy(mean_of_factors=True, outer=True),
    "fedexp": Strategy(mean_of_factors=True),
    "fedavgm": Strategy(keeps_replies=True, keys=("server-learning-rate", "server-momentum")),
    "fedadam": Strategy(keeps_replies=True, keys=_ADAPTIVE),
    "fedyogi": Strategy(keeps_replies=True, keys=_ADAPTIVE),
    "fedadagrad": Strategy(keeps_replies=True, keys=("server-learning-rate", "tau")),
    "fedmedian": Strategy(keeps_replies=True),
    "fedtrimmedavg": Strategy(keeps_replies=True, keys=("trimmed-share",)),
    "krum": Strategy(keeps_replies=True, keys=("num-malicious-nodes",)),
    "multikrum": Strategy(keeps_replies=True, keys=("num-malicious-nodes", "num-nodes-to-select")),
    "bulyan": Strategy(keeps_replies=True, keys=("num-malicious-nodes",)),
    "geomedian": Strategy(keeps_replies=True),
    "nnm": Strategy(keeps_replies=True, keys=("num-malicious-nodes",)),
    "ffa": Strategy(odd="B", even="B", sends="B", outer=True),
    "rolora": Strategy(odd="B", even="A", outer=True),
    "la-lora": Strategy(mean_of_factors=True, in_turn=True, outer=True),
    "product": Strategy(
        keeps_replies=True, error_feedback=False, mixed_ranks=True, keys=("site-ranks",)
    ),
    "flora": Strategy(keeps_replies=True, error_feedback=False, stacks=True, keys=("max-rank",)),
    "hetlora": Strategy(
        keeps_replies=True,
        error_feedback=False,
        mixed_ranks=True,
        cuts=True,
        by_norm=True,
        keys=("site-ranks", "rank-decay", "rank-penalty"),
    ),
    "lora-fair": Strategy(keeps_replies=True, error_feedback=False, keys=("ridge",)),
    "fedsvd": Strategy(odd="B", even="B", error_feedback=False),
}
"""Name → requirements."""
