"""Masked sums in words: for console, plan, report, comparison and model card."""

from __future__ import annotations

from grandrounds.config.keys import Config
from grandrounds.server.described import Sites, are_real

BETA = "secure aggregation (beta, unreviewed)"
"""What masked sums are called, everywhere."""

SUM_ONLY = "Updates were masked: the server learned their sum, and no figure of a single one."
"""Said in the place of figures that nobody has."""


def masks_text(config: Config, sites: Sites = ()) -> str:
    """Return how updates are summed; empty if each travels by itself.

    Parameters
    ----------
    sites
        As in sites.json; only real ones have keys of their own.
    """
    if not config.is_masked:
        return ""
    what = f"{BETA}, {config.federation.secure_aggregation}"
    if are_real(sites):
        return f"{what}; the server learns the sum of a round's updates, and no single one"
    return f"{what}; a rehearsal, since this machine holds the keys of all sites"


def still_told(config: Config) -> str:
    """Return what a server gets of each site although updates are masked."""
    told = [
        "its introduction, with its training examples (rounded; of private visits the units that "
        "it declares)",
        "the rounds in which it takes part",
        "when it answers",
    ]
    if config.strategy.fraction_evaluate:
        how = "in a rehearsal only" if config.is_private else "rounded, if its policy lets it"
        told.append(f"its held-out loss ({how})")
    if config.is_private:
        told.append("the epsilon that it has spent")
    if config.privacy.report_train_loss:
        told.append("the noised training loss of a visit, if its policy lets it")
    return f"{', '.join(told[:-1])}, and {told[-1]}; message sizes are the same for all"
